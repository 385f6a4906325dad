"""The public names."""

from __future__ import annotations

from importlib.metadata import version

import optimum_modegpt
from optimum_modegpt import errors


def test_every_public_name_is_there_and_listed_in_order() -> None:
    names = optimum_modegpt.__all__
    assert names == sorted(names)
    assert len(names) == len(set(names))
    assert all(getattr(optimum_modegpt, name) is not None for name in names)


def test_every_error_is_public() -> None:
    ours = {
        name for name, item in vars(errors).items() if isinstance(item, type) and issubclass(item, errors.ModeGPTError)
    }
    assert ours <= set(optimum_modegpt.__all__)


def test_every_measurement_of_the_commands_is_public() -> None:
    measurements = {
        "benchmark": "Benchmark",
        "compare": "Comparison",
        "fidelity": "Fidelity",
        "perplexity": "Perplexity",
    }
    assert {*measurements, *measurements.values()} <= set(optimum_modegpt.__all__)


def test_the_version_is_that_of_the_distribution() -> None:
    assert optimum_modegpt.__version__ == version("optimum-modegpt")
