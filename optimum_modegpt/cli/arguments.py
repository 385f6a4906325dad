"""The arguments of the commands: one function per command, with the name of the command, declares them.

This module imports neither torch nor transformers, so help and argument errors are printed at once. The modules in
`optimum_modegpt.cli.commands` run the commands.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect as introspection
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from optimum_modegpt.export.formats import FORMATS, GGUF_TYPES
from optimum_modegpt.recipe import ALLOCATIONS, DEFAULT_ALLOCATIONS, LAYOUTS, QUANTIZATIONS, SIZES, Recipe
from optimum_modegpt.recovery.config import RecoveryConfig

BROKEN = 1
"""Exit code of `compare` if a threshold is not met."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
"""The data types in which a model can be loaded."""
COMMAND_LINE_TEXTS = {
    "dataset": "calibration text: wikitext2, c4, alpaca, a dataset id of the Hub, or a local .txt, .jsonl, .json or "
    ".parquet file, or a folder saved by datasets; self is text that the model writes. Several are a mixture, in equal "
    "shares or by weight: c4=0.7 chats.jsonl=0.3. MODEL must not follow them.",
    "tokenizer": "name or folder of a tokenizer; by default the model's own.",
    "allow_foreign_tokenizer": "accept a --tokenizer that differs from the model's own in vocabulary, special tokens "
    "or chat template, with a warning.",
}
"""Descriptions of the fields that accept more in Python than on the command line."""
SERVABLE_FIELDS = ("sparsity", "expert_sparsity", "layout")
"""The fields on which it depends which engines run a result."""


class Mixture(argparse.Action):
    """Stores a single name, or the weights of several, each written NAME or NAME=WEIGHT."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the dataset. Raise `ArgumentError` if a name is repeated, or if only some of them have a weight."""
        weights, weighted = {}, 0
        for word in values:
            name, weight = _name_and_weight(word)
            if name in weights:
                raise argparse.ArgumentError(self, f"found {name!r} twice")
            weights[name] = 1.0 if weight is None else weight
            weighted += weight is not None
        if weighted not in (0, len(weights)):
            raise argparse.ArgumentError(self, "expected NAME=WEIGHT for all names or for none")
        is_mixture = len(weights) > 1 or weighted
        setattr(namespace, self.dest, weights if is_mixture else values[0])


def compress(commands: Any) -> None:
    parser = _command(commands, "compress", "Compress MODEL and save it.")
    _add_output(parser)
    add = parser.add_argument
    add("--fresh", action="store_true", help="discard the checkpoint of an interrupted run")
    add("--ignore-estimate", action="store_true", help="continue even if memory or disk seem too small")
    add("--report", type=path, metavar="FILE.json", help="also write the report to this file")
    add("--push-to-hub", metavar="REPO", help="also upload the result to the Hub, as user/name")
    add("--private", action="store_true", help="make REPO private if it is new")
    add("--create-pr", action="store_true", help="upload as a pull request")
    _add_configuration(parser)
    _add_device(parser)


def evaluate(commands: Any) -> None:
    text = "Measure perplexity or task scores of MODEL, and compare them with those of DENSE."
    parser = _command(commands, "evaluate", text)
    add = parser.add_argument
    add("--reference", metavar="DENSE", help="model to compare with, usually the dense one")
    _add_reference_revision(parser)
    _add_tokenizer(parser, "MODEL's own, else that of DENSE")
    add("--batch-size", type=count, metavar="N", help="windows or requests per forward pass; chosen by default")
    _add_json(parser)
    add("--update-card", action="store_true", help="also add the result to the folder MODEL and its model card")
    _add_device(parser)
    text = "Measured if --tasks is omitted, and in addition to tasks if --dataset is given."
    group = parser.add_argument_group("perplexity", text)
    text = "texts, measured one by one; by default c4 and wikitext2, or the demo's own; MODEL must not follow them"
    group.add_argument("--dataset", nargs="+", metavar="NAME_OR_FILE", help=text)
    _add_reading(group, "test, validation or train")
    group.add_argument("--max-windows", type=count, metavar="N", help="score only the first N windows")
    group = parser.add_argument_group("tasks", "Measured with lm-eval: pip install 'optimum-modegpt[eval]'.")
    add = group.add_argument
    add("--tasks", type=_names, metavar="NAME,NAME", help="tasks, groups or tags; lm_eval ls tasks lists them")
    add("--num-fewshot", type=_shots, metavar="N", help="examples before each question; by default the task's")
    add("--limit", type=count, metavar="N", help="score only the first N samples of each task, as a trial")
    add("--include-path", type=path, metavar="DIR", help="folder with YAML files that define your own tasks")


def compare(commands: Any) -> None:
    text = "Compare COMPRESSED with DENSE prompt by prompt; thresholds determine the exit code."
    parser = commands.add_parser("compare", help=text, description=text)
    add = parser.add_argument
    add("reference", metavar="DENSE", help="name on the Hub, folder, or demo for the embedded model")
    add("model", metavar="COMPRESSED", help="name on the Hub, or folder")
    _add_access(parser, "COMPRESSED")
    _add_reference_revision(parser)
    text = (
        '.txt: one prompt per line; .jsonl: {"prompt": …}, {"text": …} or {"messages": […]} per line; .json: a list of '
        "these or of strings. Required unless DENSE is demo, which has its own text"
    )
    add("--prompts", type=path, metavar="FILE", help=text)
    add("--max-new-tokens", type=count, default=48, metavar="N", help="length of a continuation; default %(default)s")
    _add_tokenizer(parser, "that of the models")
    _add_device(parser)
    text = f"Exit code {BROKEN} if a threshold is not met, 0 if all are met or none is set, 2 for an error."
    add = parser.add_argument_group("thresholds", text).add_argument
    add("--max-kl", type=float, metavar="X", help="maximum mean KL divergence, in nats per position")
    add("--min-agreement", type=float, metavar="X", help="minimum top-1 agreement, as a fraction")
    add("--max-perplexity-ratio", type=float, metavar="X", help="maximum perplexity of COMPRESSED over that of DENSE")
    add = parser.add_argument_group("files").add_argument
    add("--html", type=path, metavar="FILE", help="write the comparison as one self-contained page")
    add("--jsonl", type=path, metavar="FILE", help="write one record per prompt as soon as it is measured")
    add("--json", type=path, metavar="FILE", help="write all results at the end")


def benchmark(commands: Any) -> None:
    parser = _command(commands, "benchmark", "Measure prefill speed, decode speed and memory of MODEL.")
    add = parser.add_argument
    add("--reference", metavar="DENSE", help="model to measure in alternation with MODEL; ratios are relative to it")
    _add_reference_revision(parser)
    add("--batch-sizes", type=_counts, default=(1, 8), metavar="N,…", help="prompts per batch; default 1,8")
    text = "tokens, truncated to the context; default 128,1024"
    add("--prompt-lengths", type=_counts, default=(128, 1024), metavar="N,…", help=text)
    add("--new-tokens", type=count, default=32, metavar="N", help="decoding steps; default %(default)s")
    add("--repeats", type=count, default=5, metavar="N", help="measurements per setting; default %(default)s")
    add("--compile", action="store_true", help="measure again under torch.compile; takes minutes")
    _add_device(parser)
    add = parser.add_argument_group("files").add_argument
    add("--json", type=path, metavar="FILE", help="write all measurements, the machine and versions")
    add("--plot", type=path, metavar="FILE", help="plot the speeds; .png, .svg or .pdf")


def recover(commands: Any) -> None:
    text = "Fine-tune a compressed MODEL with LoRA, merge the adapters and save the result."
    parser = _command(commands, "recover", text)
    _add_output(parser)
    add = parser.add_argument
    text = "distill this model's predictions instead of training on the text's tokens"
    add("--teacher", dest="reference", metavar="DENSE", help=text)
    _add_reference_revision(parser, "--teacher-revision")
    text = "text or mixture as for compress; by default c4 and wikitext2, or the demo's own; MODEL must not follow it"
    add("--dataset", nargs="+", action=Mixture, metavar="NAME_OR_FILE[=WEIGHT]", help=text)
    _add_reading(parser, "train")
    text = "text of another kind, whose perplexity selects the best step; by default the last 5 %% of the windows"
    add("--held-out", metavar="NAME_OR_FILE", help=text)
    add("--num-samples", type=count, default=4096, metavar="N", help="maximum number of windows; default %(default)s")
    add("--learning-rate", type=float, metavar="X", help="peak learning rate; default 0.03 / sqrt(d_model)")
    texts = {
        "steps": "optimizer steps",
        "batch_size": "windows per step",
        "lora_rank": "rank of the LoRA adapters",
        "seed": "seed of the choice and order of the windows and of the initial adapters",
    }
    for name, text in texts.items():
        kind, default = int if name == "seed" else count, getattr(RecoveryConfig, name)
        add(f"--{name.replace('_', '-')}", type=kind, default=default, metavar="N", help=f"{text}; default {default}")
    _add_device(parser)


def inspect(commands: Any) -> None:
    text = "Show the ranks, parameters, compression record and measurements of MODEL without loading it."
    parser = _command(commands, "inspect", text)
    text = "also load MODEL and compare its logits with and without the key-value cache on a few tokens"
    parser.add_argument("--check", action="store_true", help=text)
    _add_json(parser)


def export(commands: Any) -> None:
    text = "Export MODEL to the format of another tool."
    parser = _command(commands, "export", text)
    formats = "; ".join(f"{each.name}: {each.text}" for each in FORMATS.values())
    parser.add_argument("--format", choices=tuple(FORMATS), required=True, help=formats)
    _add_output(parser, text="folder to write, or file for gguf; appears only once complete", metavar="PATH")
    text = f"data type of the weights: {', '.join(DTYPES[1:])}, or for gguf {', '.join(GGUF_TYPES)}; auto keeps the "
    text += "stored one, and is f16 for gguf"
    parser.add_argument("--dtype", choices=(*DTYPES, *GGUF_TYPES), default="auto", metavar="TYPE", help=text)
    text = "longest text of a program for executorch, in tokens; default 2048, or the context of the model if shorter"
    parser.add_argument("--cache-length", type=count, metavar="N", help=text)


def estimate(commands: Any) -> None:
    text = "Estimate the memory and work of compressing MODEL without loading its weights."
    parser = _command(commands, "estimate", text)
    _add_json(parser)
    text = "number of processes that share the work on this machine; default %(default)s"
    parser.add_argument("--processes", type=count, default=1, metavar="N", help=text)
    _add_configuration(parser)
    _add_device(parser)


def servable(commands: Any) -> None:
    text = "Show which serving engines run MODEL, and how, without loading its weights."
    parser = _command(commands, "servable", text)
    _add_json(parser)
    text = "Given any of these, MODEL is dense, and the table is about the model that compress would make of it."
    _add_configuration(parser, SERVABLE_FIELDS, text)


def demo(commands: Any) -> None:
    parser = commands.add_parser("demo", help="Compress the embedded model, reload it, evaluate it and generate text.")
    parser.set_defaults(model="demo", revision=None, token=None, trust_remote_code=False)
    parser.set_defaults(dtype="auto", config=None, report=None, fresh=False, ignore_estimate=True)
    _add_output(parser, required=False)
    # A model this small no longer writes well without 30 % of its weights.
    parser.add_argument("--sparsity", type=float, default=0.2, help="as in compress; default %(default)s")
    parser.add_argument("--method", default=argparse.SUPPRESS, help="as in compress")
    _add_device(parser, dtype=False)
    _add_debug(parser)


COMMANDS = (compress, evaluate, compare, benchmark, recover, inspect, servable, export, estimate, demo)
"""The commands, in the order in which the help lists them."""


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """Add the parser of a command that works on one model."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("model", metavar="MODEL", help="name on the Hub, folder, or demo for the embedded model")
    _add_access(parser, "MODEL")
    return parser


def _add_access(parser: Any, model: str) -> None:
    parser.add_argument("--revision", metavar="R", help=f"branch, tag or commit of {model}")
    parser.add_argument("--token", metavar="T", help="access token of the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    _add_debug(parser)


def _add_reference_revision(parser: Any, flag: str = "--reference-revision") -> None:
    parser.add_argument(flag, dest="reference_revision", metavar="R", help="branch, tag or commit of DENSE")


def _add_debug(parser: Any) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_output(
    parser: Any,
    *,
    required: bool = True,
    text: str = "folder to write; appears only once complete",
    metavar: str = "DIR",
) -> None:
    add = parser.add_argument
    add("--output", type=path, required=required, metavar=metavar, help=text)
    add("--overwrite", action="store_true", help="overwrite an existing result once the command succeeds")


def _add_json(parser: Any) -> None:
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the result to this file")


def _add_reading(parser: Any, splits: str) -> None:
    add = parser.add_argument
    add("--dataset-split", metavar="NAME", help=f"split or slice such as train[:10%%]; by default {splits}")
    add("--text-column", metavar="NAME", help="column that holds the text or token ids")
    add("--sequence-length", type=int, metavar="N", help="tokens per window; default min(2048, context)")


def _add_device(parser: Any, *, dtype: bool = True) -> None:
    text = "device to compute on; auto uses an accelerator if one is available"
    parser.add_argument("--device", default="auto", help=text)
    if dtype:
        text = "data type of the weights; auto keeps the stored one"
        parser.add_argument("--dtype", choices=DTYPES, default="auto", help=text)


def _add_tokenizer(parser: Any, default: str) -> None:
    parser.add_argument("--tokenizer", metavar="NAME", help=f"name or folder; by default {default}")
    text = "accept a --tokenizer that differs from the model's own, with a warning"
    parser.add_argument("--allow-foreign-tokenizer", action="store_true", help=text)


def _add_configuration(parser: Any, names: Collection[str] | None = None, text: str = "") -> None:
    """Add a flag for every field of `ModeGPTConfig`, or for those of `names`, with its name, type and description."""
    text = f"{text} Flags override --config, which overrides the defaults.".strip()
    group = parser.add_argument_group("configuration", text)
    group.add_argument("--config", type=path, metavar="FILE", help="JSON file with any of these fields")
    texts = field_texts()
    kinds: dict[str, dict[str, Any]] = {
        "bool": {"action": "store_true"},
        "int": {"type": int, "metavar": "N"},
        "float": {"type": float, "metavar": "X"},
        "method": {"choices": tuple(DEFAULT_ALLOCATIONS)},
        "allocation": {"choices": ALLOCATIONS},
        "layout": {"choices": LAYOUTS},
        "target_size": {"metavar": "SIZE"},
        "target_parameters": {"metavar": "N"},
        "target_quantization": {"choices": QUANTIZATIONS},
        "round_to": {"type": _integer_or_word, "metavar": "N|auto"},
        "dataset": {"nargs": "+", "action": Mixture, "metavar": "NAME[=WEIGHT]"},
    }
    one_size = group.add_mutually_exclusive_group()
    for field in dataclasses.fields(Recipe):
        if names is not None and field.name not in names:
            continue
        text = texts[field.name]
        if field.default is not None and field.default is not False:
            default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
            text += f" Default: {default}."
        kind = str(field.type).removesuffix(" | None")
        options = kinds.get(field.name) or kinds.get(kind) or {"metavar": "NAME"}
        flags = [f"--{field.name.replace('_', '-')}"]
        if field.name == "target_quantization":
            flags.append("--quantize")
        add = (one_size if field.name in SIZES else group).add_argument
        add(*flags, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)


def field_texts() -> dict[str, str]:
    """Return the description of each field in the docstring of `Recipe`, worded for the command line."""
    section = introspection.cleandoc(Recipe.__doc__ or "").partition("Args:\n")[2].partition("\nRaises:")[0]
    texts = {}
    for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE):
        words = " ".join(re.sub('[`"]', "", text).split())
        texts[name] = re.sub(r"\bNone (?=takes|chooses)", "left out, it ", words)
    return texts | COMMAND_LINE_TEXTS


def count(text: str) -> int:
    """Parse an integer of at least 1."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, found {text!r}")
    return int(text)


def path(text: str) -> Path:
    """Parse a path, and refuse an empty one: it would mean the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found nothing")
    return Path(text)


def _name_and_weight(word: str) -> tuple[str, float | None]:
    """Split NAME=WEIGHT. A word without a number after "=", and the path of a file, is a name."""
    name, _, weight = word.rpartition("=")
    if re.fullmatch(r"\d*\.?\d+", weight) and name and not os.path.exists(word):
        return name, float(weight)
    return word, None


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(count(part.strip()) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"expected integers of at least 1 such as 1,8, found {text!r}") from error


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names separated by commas, found {text!r}")
    return names


def _shots(text: str) -> int:
    return 0 if text == "0" else count(text)


def _integer_or_word(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d+", text) else text
