"""The arguments of `recover`."""

from __future__ import annotations

from typing import Any

from optimum_modegpt.cli.arguments.common import add_device, add_reference_revision, count, path, verb
from optimum_modegpt.recovery.config import RecoveryConfig

MOST_WINDOWS = 4096


def add(verbs: Any) -> None:
    """Declare the arguments."""
    parser = verb(verbs, "recover", "Fine-tune a compressed MODEL with LoRA, merge the adapters and save the result.")
    parser.add_argument(
        "--output", type=path, required=True, metavar="DIR", help="folder to write; it appears only once complete"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="overwrite an existing result once the command succeeds"
    )
    parser.add_argument(
        "--teacher",
        dest="reference",
        metavar="DENSE",
        help="distill this model's predictions instead of training on the text's tokens",
    )
    add_reference_revision(parser, "--teacher-revision")
    parser.add_argument("--dataset", metavar="NAME_OR_FILE", help="text; by default wikitext2, or the demo's own")
    parser.add_argument(
        "--dataset-split", metavar="NAME", help="split to read, or a slice such as train[:10%%]; by default train"
    )
    parser.add_argument("--text-column", metavar="NAME", help="column that holds the text or token ids")
    parser.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens per window; default min(2048, context)"
    )
    parser.add_argument(
        "--num-samples",
        type=count,
        default=MOST_WINDOWS,
        metavar="N",
        help="maximum number of windows; default %(default)s",
    )
    parser.add_argument(
        "--learning-rate", type=float, metavar="X", help="peak learning rate; default 0.03 / sqrt(d_model)"
    )
    for flag, kind, text in (
        ("steps", count, "optimizer steps"),
        ("batch-size", count, "windows per step"),
        ("lora-rank", count, "rank of the LoRA adapters"),
        ("seed", int, "seed of the choice and order of the windows and of the initial adapters"),
    ):
        default = getattr(RecoveryConfig, flag.replace("-", "_"))
        parser.add_argument(f"--{flag}", type=kind, default=default, metavar="N", help=f"{text}; default %(default)s")
    add_device(parser)
