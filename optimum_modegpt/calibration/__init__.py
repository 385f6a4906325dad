"""What flows through a model: the text it is calibrated on, and what is summed while that text runs."""
