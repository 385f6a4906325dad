"""Tell which serving engines run a model: one function for each engine, from the facts of a `Shape`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from optimum_modegpt.config import ModeGPTConfig, as_config
from optimum_modegpt.export.gguf_architecture import GGUFSupport
from optimum_modegpt.loading.models import load_config
from optimum_modegpt.loading.source import Source
from optimum_modegpt.serving import engines
from optimum_modegpt.serving.engines import Engine
from optimum_modegpt.serving.shape import Shape, shape_of

Works = Literal["yes", "with package", "no", "unknown"]
RESULT = "<result>"
"""Stands for the folder of a model that has no name, or is not made yet. It is quoted in commands."""
EXPORT = "optimum-cli modegpt export"
LOAD = "import optimum_modegpt, transformers; model = transformers.AutoModelForCausalLM.from_pretrained({name!r})"


@dataclass(frozen=True)
class Verdict:
    """The answer of one engine for a model, before the evidence is known.

    Attributes:
        works: as in `Servable`.
        reason: one sentence.
        command: with {model} for the name of the model in a shell, or {name!r} in Python; None if the engine does not
            run it.
        inferred: whether the source of the engine does not say it directly.
    """

    works: Works
    reason: str
    command: str | None = None
    inferred: bool = False


@dataclass(frozen=True)
class Servable:
    """Whether a serving engine runs a model.

    Attributes:
        engine: its name.
        works: "yes", by the engine alone; "with package", if this package is installed next to the engine or has
            converted the model; "no"; "unknown", if nobody has looked.
        reason: one sentence that says why.
        command: the shell command that serves the model, or the Python line that loads it; None if the engine does not
            run it.
        evidence: "run", if compressed models were run with `version`; "source", if the source of `version` says so;
            "inferred", if it follows from that source but was not tried.
        version: of the engine. For exporters, it names the library whose exporter it is.
    """

    engine: str
    works: Works
    reason: str
    command: str | None
    evidence: Literal["run", "source", "inferred"]
    version: str

    @property
    def serves(self) -> bool:
        """Whether the engine runs the model, alone or with this package."""
        return self.works in ("yes", "with package")

    @property
    def checked(self) -> str:
        """The evidence and the version in words."""
        words = {"run": "run with", "source": "source of", "inferred": "inferred from"}
        return "–" if self.works == "unknown" else f"{words[self.evidence]} {self.version}"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, safe for JSON."""
        return asdict(self)


def check_servable(model: Any, compression_config: Any = None, *, name: str | None = None) -> list[Servable]:
    """Return, for every known serving engine, whether it runs a model, why, and the command.

    No weights are read.

    Args:
        model: a model, its configuration, its folder, or its name on the Hub.
        compression_config: a `ModeGPTConfig` or a dict of its fields. If given, `model` is dense, and the rows
            are about the model that the compression would make.
        name: folder or name of the model for the commands. None takes that of `model`, or a placeholder.

    Raises:
        AlreadyCompressed, UnsupportedModel: `compression_config` is given, and the model cannot be compressed.
        EvaluationError: the configuration of a compressed model was edited, and cannot be read.
        InvalidConfig: `compression_config` is of another type, or a field is unknown.
        OSError: the configuration of the model cannot be found.
    """
    if isinstance(model, str | os.PathLike):
        name, config = name or os.fspath(model), load_config(Source(os.fspath(model)))
    else:
        config = getattr(model, "config", model)
        name = name or getattr(config, "_name_or_path", None)
    compression: ModeGPTConfig | None = None
    if compression_config is not None:
        name, compression = RESULT, as_config(compression_config)
    return servable(shape_of(config, compression), name or RESULT)


def servable(shape: Shape, name: str) -> list[Servable]:
    """Return the verdict of every engine on a model of this shape; `name` is for the commands."""
    return [_servable(engine, rule(shape), shape, name) for engine, rule in RULES]


def best(found: Sequence[Servable]) -> Servable:
    """Return the engine to recommend: vLLM if it needs no package or was run with such a model, else transformers."""
    by_name = {each.engine: each for each in found}
    fast = by_name[engines.VLLM.name]
    return fast if fast.works == "yes" or (fast.serves and fast.evidence == "run") else by_name["transformers"]


def _servable(engine: Engine, verdict: Verdict, shape: Shape, name: str) -> Servable:
    command = None if verdict.command is None else verdict.command.format(model=shlex.quote(name), name=name)
    evidence, version = "inferred" if verdict.inferred else "source", engine.source
    for run in engine.runs:
        is_covered = run.model_types is None or shape.model_type in run.model_types
        if command is not None and is_covered and shape.layout in run.layouts:
            evidence, version = "run", run.version
    return Servable(engine.name, verdict.works, verdict.reason, command, evidence, version)


def _transformers(shape: Shape) -> Verdict:
    if shape.layout == "stock":
        return Verdict("yes", "It is a checkpoint of a class of transformers.", "transformers serve {model}")
    reason = "The class comes from this package, or with trust_remote_code=True from the folder."
    return Verdict("with package", reason, LOAD)


def _vllm(shape: Shape) -> Verdict:
    if shape.layout == "stock":
        return _native(
            shape,
            "vllm serve {model}",
            native=engines.VLLM_NATIVE,
            own_head_dim=engines.VLLM_OWN_HEAD_DIM,
            backend=engines.VLLM_BACKEND,
        )
    if refusal := _outside_backend(shape):
        return refusal
    if shape.model_type not in engines.VLLM_PLUGIN:
        return Verdict("no", f"The plugin of this package registers {', '.join(sorted(engines.VLLM_PLUGIN))} only.")
    reason = "Through its Transformers backend, without tensor parallelism."
    if any(width % 8 or width > 256 for width in shape.cached_widths):
        widths = ", ".join(map(str, shape.cached_widths))
        reason += f" Its FlashAttention requires head dims of multiples of 8 up to 256, found {widths}."
    return Verdict("with package", reason, "vllm serve {model}")


def _sglang(shape: Shape) -> Verdict:
    command = "sglang serve --model-path {model}"
    if shape.layout == "stock":
        return _native(shape, command, native=engines.SGLANG_NATIVE, own_head_dim=engines.SGLANG_OWN_HEAD_DIM)
    if refusal := _outside_backend(shape):
        return refusal
    if shape.soft_cap or shape.sinks:
        name = "soft cap" if shape.soft_cap else "sinks"
        return Verdict("no", f"Its Transformers backend does not pass on the {name} of the attention scores.")
    if shape.one_window:
        return Verdict("no", "Its Transformers backend ignores a window that is not given by layer types.")
    command += " --model-impl transformers"
    if shape.layout == "mlp":
        return Verdict("with package", "Through its Transformers backend.", command)
    reason = "Through its Transformers backend, with heads padded to the dense head dim. The cache stays as large."
    return Verdict("with package", reason, command, inferred=True)


def _llama_cpp(shape: Shape) -> Verdict:
    """Return the verdict on a GGUF file, which has one width for all keys, and one for all values."""
    export = f"{EXPORT} {{model}} --format gguf --output model.gguf && llama-server -m model.gguf"
    if shape.gguf is not None:
        return _exported_to_gguf(shape.gguf, export)
    if shape.layout == "stock":
        return _llama_cpp_stock(shape, export)
    architecture = engines.LLAMA_CPP_PER_LAYER.get(shape.model_type)
    if architecture is None or shape.experts:
        kind = "experts" if shape.experts else f"blocks of type {shape.model_type}"
        return Verdict("no", f"None of its architectures with an MLP width for each block holds {kind}.")
    start = f"Its architecture {architecture}"
    if architecture == "deci" and shape.window:
        return Verdict("no", f"{start} has no sliding window.")
    if architecture == "openelm" and (not shape.tied or shape.attention_bias or shape.window):
        return Verdict("no", f"{start} requires tied embeddings, and no biases and no window.")
    if architecture == "openelm" and shape.narrow_keys:
        return Verdict("no", f"{start} has one gain for all heads in the norms of queries and keys.")
    reason = f"{start} has an MLP width for each block."
    if shape.layout == "per_layer":
        reason += " Heads are padded to the dense head dim. The cache stays as large."
    return Verdict("with package", reason, export, inferred=True)


def _exported_to_gguf(support: GGUFSupport, export: str) -> Verdict:
    if support.architecture is None:
        assert support.reason is not None
        return Verdict("no", support.reason.removeprefix("GGUF: ").rstrip(".") + ".")
    reason = f"Its architecture {support.architecture} holds it after an export."
    if support.padded:
        reason += " Heads are padded to the dense head dim, so the cache stays as large."
    return Verdict("with package", reason, export, inferred=True)


def _llama_cpp_stock(shape: Shape, export: str) -> Verdict:
    if shape.model_type not in engines.LLAMA_CPP_NATIVE:
        return _not_looked_up(shape)
    if not shape.frequencies:
        convert = "python convert_hf_to_gguf.py {model} --outfile model.gguf && llama-server -m model.gguf"
        return Verdict("yes", "It has an architecture for this type, and a script that converts the folder.", convert)
    if shape.model_type not in engines.LLAMA_CPP_FREQUENCIES:
        return Verdict("no", f"Its architecture for {shape.model_type} computes the rotary frequencies itself.")
    reason = "Its own converter does not write the kept rotary frequencies; the export of this package does."
    return Verdict("with package", reason, export, inferred=True)


def _onnx_runtime(shape: Shape) -> Verdict:
    return _exported(shape, "onnx")


def _openvino(shape: Shape) -> Verdict:
    return _exported(shape, "openvino")


def _executorch(shape: Shape) -> Verdict:
    return _exported(shape, "executorch")


def _tensorrt_llm(shape: Shape) -> Verdict:
    if shape.layout != "stock":
        return Verdict(
            "no", "Its PyTorch backend has no class for these widths. Its AutoDeploy has not been looked at."
        )
    if shape.model_type not in engines.TENSORRT_LLM_NATIVE or shape.window:
        return _not_looked_up(shape)
    if shape.frequencies:
        return Verdict("unknown", "Its class reads the head dim; whether it reads the kept rotary frequencies is open.")
    return Verdict("yes", "It has a class for this type, which reads the head dim.", "trtllm-serve {model}")


RULES: tuple[tuple[Engine, Callable[[Shape], Verdict]], ...] = (
    (engines.TRANSFORMERS, _transformers),
    (engines.VLLM, _vllm),
    (engines.SGLANG, _sglang),
    (engines.LLAMA_CPP, _llama_cpp),
    (engines.ONNX_RUNTIME, _onnx_runtime),
    (engines.OPENVINO, _openvino),
    (engines.EXECUTORCH, _executorch),
    (engines.TENSORRT_LLM, _tensorrt_llm),
)
"""The engines in the order of the table, each with its rule."""


def _native(
    shape: Shape,
    command: str,
    *,
    native: Collection[str],
    own_head_dim: Collection[str],
    backend: Collection[str] = (),
) -> Verdict:
    """Return the verdict of an engine with own classes, and a Transformers backend for the types `backend`."""
    if shape.model_type not in (*native, *backend):
        return _not_looked_up(shape)
    if shape.odd_head_dim and shape.model_type in own_head_dim:
        return Verdict("no", f"Its class for {shape.model_type} computes the head dim as hidden size / heads.")
    if shape.frequencies and shape.model_type in native and shape.model_type not in engines.KEPT_FREQUENCIES:
        return Verdict("unknown", "It is open whether its class reads the kept rotary frequencies.")
    if shape.model_type in backend:
        return Verdict("yes", "Through its Transformers backend.", command)
    return Verdict("yes", "It has a class for this type, which reads all widths.", command)


def _outside_backend(shape: Shape) -> Verdict | None:
    """Return why the Transformers backends of vLLM and SGLang cannot run our class, or None if they can."""
    if shape.own_scores:
        return Verdict("no", "The attention computes its own scores; a Transformers backend requires the interface.")
    if shape.other_mixers:
        return Verdict("no", "Its Transformers backend has full and sliding attention only.")
    if shape.experts:
        return Verdict("no", "Its Transformers backend reads one expert width for all blocks, the dense one.")
    if shape.images:
        return Verdict("unknown", "Models with images have not been looked at.")
    return None


def _exported(shape: Shape, target: str) -> Verdict:
    """Return the verdict on an exported graph, whose nodes have their own widths."""
    if not shape.known or shape.experts or shape.other_mixers or shape.images:
        return _not_looked_up(shape)
    command = f"{EXPORT} {{model}} --format {target} --output exported"
    return Verdict("with package", "A graph has the widths of every block.", command, inferred=True)


def _not_looked_up(shape: Shape) -> Verdict:
    kind = f"type {shape.model_type}"
    if shape.experts:
        kind += " with experts"
    return Verdict("unknown", f"Models of {kind} have not been looked at.")
