"""Measure time and memory of compression against size, width, depth and calibration tokens, on random models.

python tests/benchmarks/scaling.py --json scaling.json
python tests/benchmarks/scaling.py --studies llama --blocks 2 all --dtype bfloat16 --windows 128 --length 2048

The second command needs a GPU. It compresses 2 blocks and all blocks with the shapes of Llama-2 7B, 13B and 70B. Cases
that do not fit into memory according to `estimate` are not started; the table says why.

Every case is a new process that loads its model from a folder, like the command line. The table shows the measured peak
and the estimate. The exponents are slopes of log(seconds) and log(bytes) on the logarithm of the varied quantity. The
peak on the host is the increase of anonymous memory (resident minus shared pages). It excludes memory-mapped files, and
MALLOC_MMAP_THRESHOLD_ makes glibc return freed memory at once. The study "files" simulates 128 MiB of free host memory,
so that residual streams are kept in files. The study "families" has one family for each way to store projections, with
the same width, depth and MLP. All other studies use Llama models.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from machine import machine
from tqdm.auto import tqdm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from optimum_modegpt import ModeGPTConfig
from optimum_modegpt.budget.estimate import estimate, on_meta
from optimum_modegpt.budget.preflight import check_resources
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.compress import compress
from optimum_modegpt.errors import InsufficientResources
from optimum_modegpt.report import count_parameters
from optimum_modegpt.stages import compute_device
from optimum_modegpt.walk.checkpoint import Checkpoint

HEAD = 64
BASE: dict[str, Any] = {"width": 256, "blocks": 2, "vocabulary": 1024}
LLAMAS: dict[str, dict[str, Any]] = {
    "7B": {"width": 4096, "mlp": 11008, "heads": 32, "groups": 32, "blocks": 32},
    "13B": {"width": 5120, "mlp": 13824, "heads": 40, "groups": 40, "blocks": 40},
    "70B": {"width": 8192, "mlp": 28672, "heads": 64, "groups": 8, "blocks": 80},
}
EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 352, "moe_intermediate_size": 352}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": HEAD},
    "phi3": {},
    "gpt2": {"n_inner": 1408},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 8, "ffn_hidden_size": 1408},
    "qwen3_5_text": {"head_dim": HEAD, "layer_types": ["full_attention"] * 4},
    "mixtral": {"num_local_experts": 4, **EXPERTS},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 352, **EXPERTS},
}
"""Values of the configurations in the study of families."""
STUDIES: dict[str, list[dict[str, Any]]] = {
    "tokens": [{"windows": windows} for windows in (16, 32, 64)],
    "width": [{"width": width} for width in (256, 384, 512)],
    "depth": [{"blocks": blocks} for blocks in (2, 4, 8)],
    "size": [{"width": 256, "blocks": 4}, {"width": 512, "blocks": 8}, {"width": 768, "blocks": 14}],
    "files": [{"windows": windows, "vocabulary": 256, "free": 2**27} for windows in (64, 128)],
    "families": [{"family": family, "width": 512, "blocks": 4} for family in FAMILIES],
}
GROWS = {"tokens": "tokens", "width": "width", "depth": "blocks", "size": "parameters", "files": "tokens"}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def main() -> None:
    options = parse()
    if options.case is not None:
        print(json.dumps(measure(json.loads(options.case))))
        return
    results = {name: study(name, options) for name in options.studies}
    record = {"machine": machine(options.device), "base": BASE, "recipe": recipe(options), "studies": results}
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = [*STUDIES, "llama"]
    parser.add_argument("--studies", nargs="+", choices=named, default=list(STUDIES), help="quantities to vary")
    parser.add_argument("--llamas", nargs="+", choices=LLAMAS, default=list(LLAMAS), help="models of the study llama")
    parser.add_argument(
        "--blocks",
        nargs="+",
        default=["2"],
        metavar="N",
        help="blocks of each model of the study llama: a number, or all",
    )
    parser.add_argument("--windows", type=int, default=16, help="calibration windows, unless the study varies them")
    parser.add_argument("--length", type=int, default=256, help="tokens per window")
    parser.add_argument("--allocation", default="uniform", help="as in compress")
    parser.add_argument("--iterations", type=int, default=5, help="refit_iterations of compress")
    parser.add_argument("--sparsity", type=float, default=0.3, help="as in compress")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--device", default="auto", help="where to compute")
    parser.add_argument(
        "--folder", type=Path, help="parent of the temporary folders of the models; default: the system's"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def recipe(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "sparsity": options.sparsity,
        "allocation": options.allocation,
        "refit_iterations": options.iterations,
    }


def cases(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the settings in which each case of a study differs from the defaults."""
    if name != "llama":
        return STUDIES[name]
    found = []
    for llama in options.llamas:
        for count in options.blocks:
            case = {"llama": llama, "vocabulary": 32_000, **LLAMAS[llama]}
            if count != "all":
                case["blocks"] = int(count)
            found.append(case)
    return found


def study(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run all cases of one study, print a table, and fit exponents if only one quantity varies."""
    rows = []
    common = {"windows": options.windows, "length": options.length, "dtype": options.dtype, "device": options.device}
    for changes in tqdm(cases(name, options), desc=name, disable=not sys.stderr.isatty()):
        rows.append(in_own_process({**BASE, **common, **recipe(options), **changes}, options.folder))
    grows = GROWS.get(name, "parameters")
    print(
        f"\n{name}\n{grows:>16}{'blocks':>8}{'seconds':>10}{'× floor':>9}{'peak MiB':>10}{'estimate':>10}{'ratio':>8}"
        f"{'streams':>10}"
    )
    for row in rows:
        label = row["family"] if "family" in row else f"{row[grows]:,}"
        print(f"{label:>16}{row['blocks']:>8}", end="")
        if "seconds" not in row:
            print(f"  not started: {row['refused']}")
            continue
        paced, mib = row["seconds"] / row["floor"], [row[name] / 2**20 for name in ("peak", "estimate")]
        print(
            f"{row['seconds']:>10.1f}{paced:>9.1f}{mib[0]:>10.1f}{mib[1]:>10.1f}{mib[1] / mib[0]:>8.2f}"
            f"{row['streams']:>10}"
        )
    fitted = {}
    if name in GROWS:
        sizes = [row[grows] for row in rows]
        for measured in ("seconds", "peak"):
            fitted[measured] = exponent(sizes, [row[measured] for row in rows])
        print(f"seconds ~ {grows}^{fitted['seconds']:.2f}, peak ~ {grows}^{fitted['peak']:.2f}", flush=True)
    return {"grows": grows, "exponents": fitted, "rows": rows}


def exponent(sizes: list[float], values: list[float]) -> float:
    """Return the slope of log(values) on log(sizes)."""
    return statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, values))).slope


def in_own_process(case: dict[str, Any], place: Path | None) -> dict[str, Any]:
    """Measure a case in a new process. Return its settings with the results, or with the reason for its refusal."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        model = on_meta(AutoModelForCausalLM, shape_of(case), getattr(torch, case["dtype"]))
        sizes, device = {"parameters": count_parameters(model)}, device_of(case)
        try:
            if "free" not in case:
                check_resources(estimate(model, config_of(case), case["length"], device=device), device, Path(folder))
        except InsufficientResources as error:
            return {**case, **sizes, "refused": str(error)}
        save_random(case, Path(folder))
        command = [sys.executable, __file__, "--case", json.dumps({**case, "folder": folder})]
        done = subprocess.run(command, env=os.environ | MALLOC, stdout=subprocess.PIPE, text=True, check=True)
    return {**case, **sizes, **json.loads(done.stdout.splitlines()[-1])}


def save_random(case: dict[str, Any], folder: Path) -> None:
    """Save a model with random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape_of(case), dtype=getattr(torch, case["dtype"]))
    model.save_pretrained(folder, max_shard_size="1GB")


def shape_of(case: dict[str, Any]) -> Any:
    """Return the configuration of a case. Defaults are heads of 64 and an MLP of 2.75 times the width."""
    width, family = case["width"], case.get("family", "llama")
    heads = case.get("heads", width // HEAD)
    sizes = {
        "hidden_size": width,
        "intermediate_size": case.get("mlp", width * 11 // 4),
        "num_attention_heads": heads,
        "num_key_value_heads": case.get("groups", heads),
        "num_hidden_layers": case["blocks"],
        "vocab_size": case["vocabulary"],
        "max_position_embeddings": case["length"],
        "pad_token_id": 0,
    }
    return CONFIG_MAPPING[family](**sizes | FAMILIES.get(family, {}))


def config_of(case: dict[str, Any]) -> ModeGPTConfig:
    return ModeGPTConfig(
        num_samples=case["windows"],
        sequence_length=case["length"],
        **{name: case[name] for name in ("sparsity", "allocation", "refit_iterations")},
    )


def device_of(case: dict[str, Any]) -> torch.device:
    return compute_device(None if case["device"] == "auto" else case["device"], torch.device("cpu"))


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Compress one model in this process and return the seconds and the peak memory."""
    config, device = config_of(case), device_of(case)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, case["vocabulary"], (case["windows"], case["length"]), generator=generator)
    on_host = device.type == "cpu"
    if "free" in case:
        psutil.virtual_memory = lambda: types.SimpleNamespace(available=case["free"], total=case["free"])
    with anonymous_peak() as peaks:
        model = AutoModelForCausalLM.from_pretrained(case["folder"], dtype="auto")
        found = estimate(model, config, case["length"], device=device)
        expected = found.without if on_host else found.with_accelerator
        checkpoint = Checkpoint(Path(case["folder"]) / "checkpoint")
        windows = TokenWindows(tokens, {})
        report = compress(model, config, windows, device=device, checkpoint=checkpoint, progress=False)
    return {
        "tokens": tokens.numel(),
        "seconds": sum(stage.seconds for stage in report.stages),
        "floor": sum(sum(stage.floor.values()) for stage in report.stages),
        "peak": max(peaks) if on_host else max(stage.peak_memory for stage in report.stages),
        "host_peak": max(peaks),
        "estimate": sum((expected.needs.host if on_host else expected.needs.device).values()),
        "host_estimate": sum(expected.needs.host.values()),
        "streams": expected.streams,
        "batch_size": expected.batch_size,
        "stages": {stage.name: {"seconds": stage.seconds, "peak": stage.peak_memory} for stage in report.stages},
        "memory_kind": report.memory_kind,
    }


@contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """Sample the increase of anonymous memory while the context is active."""
    process, done = psutil.Process(), threading.Event()

    def anonymous() -> int:
        info = process.memory_info()
        return info.rss - info.shared

    start, samples = anonymous(), []

    def sample() -> None:
        while not done.wait(0.005):
            samples.append(anonymous() - start)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
