"""Compare a model with the one it should replace: prompt by prompt, on one page, and on live requests."""
