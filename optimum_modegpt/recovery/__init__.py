"""Recovery: a short fine-tuning that regains some of a compressed model's quality. Requires the extra `recover`."""
