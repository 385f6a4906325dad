"""MoDeGPT compression of language models without training, for Transformers and Optimum.

Importing this package registers the compressed families with the Auto classes, the quantizer "modegpt", and the
keyword `compression_config` of `from_pretrained` (unless the environment sets OPTIMUM_MODEGPT_NO_PATCH=1). torch and
transformers take seconds to import, so the package imports them lazily: a public name is imported when it is first
used, and each registration happens as soon as its part of transformers is imported.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from optimum_modegpt.integration.registration import register

if TYPE_CHECKING:
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
        InsufficientResources,
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
    from optimum_modegpt.export.model import export_model
    from optimum_modegpt.integration.auto import ModeGPTModelForCausalLM
    from optimum_modegpt.integration.quantizer import ModeGPTQuantizer
    from optimum_modegpt.recovery.config import RecoveryConfig
    from optimum_modegpt.recovery.recover import Recovery, recover
    from optimum_modegpt.report import Report, plot_ranks
    from optimum_modegpt.serving.servable import Servable, check_servable
    from optimum_modegpt.walk.checkpoint import Checkpoint

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
    "InsufficientResources",
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
    "Servable",
    "Thresholds",
    "UnsupportedModel",
    "UploadError",
    "__version__",
    "benchmark",
    "check_servable",
    "compare",
    "comparison_page",
    "export_model",
    "fidelity",
    "harness",
    "load_tasks",
    "perplexity",
    "plot_ranks",
    "recover",
]

_NAMES_BY_MODULE = {
    "comparison.compare": ("compare",),
    "comparison.monitor": ("CanaryMonitor",),
    "comparison.page": ("comparison_page",),
    "comparison.records": ("Comparison",),
    "comparison.thresholds": ("Thresholds",),
    "config": ("ModeGPTConfig",),
    "errors": (
        "AlreadyCompressed",
        "CalibrationDataError",
        "CheckpointError",
        "EvaluationError",
        "InsufficientResources",
        "InvalidConfig",
        "ModeGPTError",
        "NotEnoughRoom",
        "NumericalError",
        "OutputError",
        "ProcessError",
        "UnsupportedModel",
        "UploadError",
    ),
    "evaluation.fidelity": ("Fidelity", "fidelity"),
    "evaluation.harness": ("harness", "load_tasks"),
    "evaluation.perplexity": ("Perplexity", "perplexity"),
    "evaluation.speed": ("Benchmark", "benchmark"),
    "export.model": ("export_model",),
    "integration.auto": ("ModeGPTModelForCausalLM",),
    "integration.quantizer": ("ModeGPTQuantizer",),
    "recovery.config": ("RecoveryConfig",),
    "recovery.recover": ("Recovery", "recover"),
    "report": ("Report", "plot_ranks"),
    "serving.servable": ("Servable", "check_servable"),
    "walk.checkpoint": ("Checkpoint",),
}
"""The public names by the module that defines them, for `__getattr__`; type checkers read the imports above."""
_MODULES = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
