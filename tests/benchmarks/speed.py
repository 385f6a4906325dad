"""Measure the speed of compressed models relative to the dense one, and to the number of their weights.

python tests/benchmarks/speed.py --json speed.json

A random model of Llama's shapes is compressed at several ratios. Each result takes turns with the dense model. All
weights are counted except the embedding table, because they multiply every token.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from machine import machine
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from optimum_modegpt import ModeGPTConfig
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.compress import compress
from optimum_modegpt.evaluation.speed import Row, benchmark
from optimum_modegpt.stages import compute_device

WIDTH, BLOCKS, HEAD_DIM, GROUP, VOCABULARY, CONTEXT = 512, 8, 64, 4, 4096, 2048
WINDOWS, WINDOW = 8, 128
"""Calibration windows and tokens per window. Few are enough, because only the widths matter."""


def main() -> None:
    options = parse()
    device = compute_device(None if options.device == "auto" else options.device, torch.device("cpu"))
    dense = random_model(options).to(device)
    results = []
    for sparsity in options.sparsities:
        model = compressed(dense, sparsity, device)
        found = benchmark(
            model,
            dense,
            batch_sizes=options.batch_sizes,
            prompt_lengths=options.prompt_lengths,
            new_tokens=options.new_tokens,
            repeats=options.repeats,
            compile=options.compile,
            progress=True,
        )
        fewer = multiplied(dense) / multiplied(model)
        results.append({"sparsity": sparsity, "weights_ratio": fewer, **found.to_dict()})
        print(f"\nsparsity {sparsity:.0%}: {fewer:.2f} times fewer weights")
        print(f"{'batch × prompt':<16}{'run':<10}{'prefill, times as fast':>24}{'decode, times as fast':>24}")
        print("\n".join(map(line, found.rows)), flush=True)
    if options.json is not None:
        record = {"machine": machine(options.device), "model": dense.config.to_diff_dict(), "results": results}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.2, 0.3, 0.4], help="as in compress")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="sequences at once")
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[128, 512], help="tokens")
    parser.add_argument("--new-tokens", type=int, default=16, help="decoding steps")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each setting")
    parser.add_argument("--compile", action="store_true", help="measure once more under torch.compile")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="number of blocks of the model")
    parser.add_argument("--scale", type=int, default=1, help="factor of the width; 8 gives the width of 7B")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--device", default="auto", help="where to compute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    return parser.parse_args()


def random_model(options: argparse.Namespace) -> PreTrainedModel:
    """Return a Llama with an MLP of 2.75 times the width and four query heads per key-value head."""
    width = WIDTH * options.scale
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_attention_heads=width // HEAD_DIM,
        num_key_value_heads=width // HEAD_DIM // GROUP,
        num_hidden_layers=options.blocks,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()


def compressed(dense: PreTrainedModel, sparsity: float, device: torch.device) -> PreTrainedModel:
    """Return a copy compressed with the same sparsity in all blocks."""
    model = copy.deepcopy(dense)
    tokens = torch.randint(VOCABULARY, (WINDOWS, WINDOW), generator=torch.Generator().manual_seed(0))
    config = ModeGPTConfig(
        sparsity=sparsity, allocation="uniform", refit_iterations=0, num_samples=WINDOWS, sequence_length=WINDOW
    )
    compress(model, config, TokenWindows(tokens, {}), device=device)
    return model


def multiplied(model: PreTrainedModel) -> int:
    """Return the number of weights that multiply each token."""
    return model.num_parameters() - model.get_input_embeddings().weight.numel()


def line(row: Row) -> str:
    """Format the speedups of one setting, or the failures that prevented their measurement."""
    cells = []
    for ratio in (row.prefill_ratio, row.decode_ratio):
        if ratio:
            cells.append(f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")
        else:
            cells.append(", ".join(row.failures))
    setting = f"{row.setting.batch_size} × {row.setting.prompt_length}"
    run = "compiled" if row.setting.compiled else "plain"
    return f"{setting:<16}{run:<10}" + "".join(f"{cell:>24}" for cell in cells)


if __name__ == "__main__":
    main()
