"""The formats that a model can be exported to. This module imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class Format:
    """A format of exported models.

    Attributes:
        name: the value of `--format`, and the name of the extra that installs `packages`.
        text: a description for the help.
        module, function: the function that writes it, and its module in this package. It takes the model, the
            tokenizer and a path. If the result is a file, it also takes `overwrite` and perhaps `dtype`, and writes the
            file atomically. Otherwise it writes into an empty folder, which is moved to its place afterwards.
        packages: the packages that the extra installs, by the names with which they are imported.
        dtypes: the data types of the matrices of a file. A folder has that of the model; then it is None.
        fixed_cache: whether the key-value cache of a program has a fixed length, which `function` takes as
            `cache_length`.
    """

    name: str
    text: str
    module: str
    function: str
    packages: tuple[str, ...] = ()
    dtypes: tuple[str, ...] | None = None
    fixed_cache: bool = False

    @property
    def is_file(self) -> bool:
        """Whether the result is one file."""
        return self.dtypes is not None

    def check_installed(self) -> None:
        """Check that the packages are installed.

        Raises:
            ImportError: one is missing. The message names the extra to install.
        """
        if missing := [package for package in self.packages if find_spec(package) is None]:
            raise ImportError(
                f"--format {self.name} requires {', '.join(missing)}: pip install 'optimum-modegpt[{self.name}]'"
            )

    def writer(self) -> Callable[..., Any]:
        """Import and return the function that writes the format."""
        return getattr(import_module(f"optimum_modegpt.export.{self.module}"), self.function)


GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")

FORMATS = {
    each.name: each
    for each in (
        Format("dense", "the stock class of transformers, padded with zeros", "dense", "export_dense"),
        Format("onnx", "ONNX Runtime", "runtimes", "export_onnx", ("onnx", "onnxscript", "onnxruntime")),
        Format("openvino", "OpenVINO", "runtimes", "export_openvino", ("openvino",)),
        Format("executorch", "ExecuTorch on CPUs", "runtimes", "export_executorch", ("executorch",), fixed_cache=True),
        Format("gguf", "llama.cpp, one file", "gguf", "export_gguf", ("gguf",), GGUF_TYPES),
    )
}
