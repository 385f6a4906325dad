"""Recovery: a short fine-tuning that gives a compressed model back some of what it lost. Needs the extra `recover`."""
