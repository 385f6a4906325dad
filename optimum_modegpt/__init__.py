"""MoDeGPT compression of language models without training, for Transformers and Optimum.

Importing this package registers the compressed families with the Auto classes, the quantizer "modegpt", and the
keyword `compression_config` of `from_pretrained` (not where the environment sets OPTIMUM_MODEGPT_NO_PATCH=1).
"""

from importlib.metadata import version

from optimum_modegpt.checkpoint import Checkpoint
from optimum_modegpt.comparison.compare import compare
from optimum_modegpt.comparison.monitor import CanaryMonitor
from optimum_modegpt.comparison.page import comparison_page
from optimum_modegpt.comparison.records import Comparison
from optimum_modegpt.comparison.thresholds import Thresholds
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import (
    AlreadyCompressed,
    CalibrationDataError,
    CheckpointError,
    EvaluationError,
    InvalidConfig,
    ModeGPTError,
    NotEnoughRoom,
    NumericalError,
    OutputError,
    ProcessError,
    UnsupportedModel,
    UploadError,
)
from optimum_modegpt.evaluation.fidelity import Fidelity, fidelity
from optimum_modegpt.evaluation.harness import harness, load_tasks
from optimum_modegpt.evaluation.perplexity import Perplexity, perplexity
from optimum_modegpt.evaluation.speed import Benchmark, benchmark
from optimum_modegpt.integration.adapters import register_targets
from optimum_modegpt.integration.auto import ModeGPTModelForCausalLM, install_keyword
from optimum_modegpt.integration.hf_quantizer import register
from optimum_modegpt.integration.hub import install_companion
from optimum_modegpt.integration.quantizer import ModeGPTQuantizer
from optimum_modegpt.plot import plot_ranks
from optimum_modegpt.recovery import Recovery, RecoveryConfig, recover
from optimum_modegpt.report import Report

__version__ = version("optimum-modegpt")

__all__ = [
    "AlreadyCompressed",
    "Benchmark",
    "CalibrationDataError",
    "CanaryMonitor",
    "Checkpoint",
    "CheckpointError",
    "Comparison",
    "EvaluationError",
    "Fidelity",
    "InvalidConfig",
    "ModeGPTConfig",
    "ModeGPTError",
    "ModeGPTModelForCausalLM",
    "ModeGPTQuantizer",
    "NotEnoughRoom",
    "NumericalError",
    "OutputError",
    "Perplexity",
    "ProcessError",
    "Recovery",
    "RecoveryConfig",
    "Report",
    "Thresholds",
    "UnsupportedModel",
    "UploadError",
    "__version__",
    "benchmark",
    "compare",
    "comparison_page",
    "fidelity",
    "harness",
    "load_tasks",
    "perplexity",
    "plot_ranks",
    "recover",
]

register()
register_targets()
install_keyword()
install_companion()
