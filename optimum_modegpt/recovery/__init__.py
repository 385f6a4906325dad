"""Recovery: a short fine-tuning that gives a compressed model back some of what it lost. Needs the extra `recover`."""

from optimum_modegpt.recovery.recover import Recovery, RecoveryConfig, check_compressed, recover

__all__ = ["Recovery", "RecoveryConfig", "check_compressed", "recover"]
