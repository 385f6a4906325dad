"""Train a small mixture of experts, and compare the ways to make it smaller: fewer channels, or fewer experts.

python tests/benchmarks/experts.py --tokenizer DIR --train FILE --evaluation FILE [--shared] [--steps N] [--json FILE]

The model has eight experts, of which two read a token: a Mixtral, or with `--shared` a Qwen2-MoE whose tokens all pass
a shared expert too. It is trained and calibrated on the same text, and measured on the other one. With one thread,
training takes about ten minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from optimum_modegpt import ModeGPTConfig, perplexity
from optimum_modegpt.calibration.data import calibration_windows, evaluation_windows
from optimum_modegpt.calibration.parsing import encode
from optimum_modegpt.compress import compress

LENGTH, BATCH, WINDOWS = 256, 4, 128
"""Tokens per window, windows per training step, and calibration windows."""
RATE, WARM_UP, AUXILIARY = 4e-3, 100, 0.02
"""Learning rate, its steps of warm-up, and the coefficient of the loss that balances the experts."""
RATIOS = (0.25, 0.5)
RECIPES: dict[str, dict[str, Any]] = {
    "channels, paper": {"method": "paper"},
    "channels, without the refit of gate and up": {"refit_iterations": 0},
    "channels, default": {},
}
WHOLE = "whole experts"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    text = encode(tokenizer, options.train.read_text(encoding="utf-8"))
    dense = trained(untrained(tokenizer, shared=options.shared), text, options.steps)
    windows = evaluation_windows(
        str(options.evaluation), tokenizer, sequence_length=LENGTH, max_windows=options.max_windows
    )
    rows = {"dense": {"0%": perplexity(dense, windows.tokens).perplexity}}
    for name in (*RECIPES, WHOLE):
        rows[name] = {}
        for ratio in RATIOS:
            config = config_of(name, ratio, options.train)
            calibration = calibration_windows(config, tokenizer, sequence_length=LENGTH)
            model = copy.deepcopy(dense)
            compress(model, config, calibration, progress=False)
            rows[name][f"{ratio:.0%}"] = perplexity(model, windows.tokens).perplexity
        print(name, rows[name], flush=True)
    print(table(rows))
    if options.json is not None:
        record = {"machine": machine(), "steps": options.steps, "rows": rows}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def config_of(name: str, ratio: float, text: Path) -> ModeGPTConfig:
    """Return the settings that remove this ratio of the channels, or of the experts."""
    removed = {"sparsity": 0.0, "expert_sparsity": ratio} if name == WHOLE else {"sparsity": ratio}
    return ModeGPTConfig(dataset=str(text), num_samples=WINDOWS, **removed, **RECIPES.get(name, {}))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="a model or folder with a tokenizer")
    parser.add_argument("--train", type=Path, required=True, metavar="FILE", help="text for training and calibration")
    parser.add_argument("--evaluation", type=Path, required=True, metavar="FILE", help="text for perplexity")
    parser.add_argument("--shared", action="store_true", help="train a model with a shared expert")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of 1,024 tokens")
    parser.add_argument("--max-windows", type=int, default=64, help="evaluation windows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    return parser.parse_args(arguments)


def untrained(tokenizer: Any, *, shared: bool) -> PreTrainedModel:
    """Return a random model, with a fixed seed."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2 * LENGTH,
        "tie_word_embeddings": True,
        "router_aux_loss_coef": AUXILIARY,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if not shared:
        return MixtralForCausalLM(MixtralConfig(**sizes, intermediate_size=96, num_local_experts=8))
    own: dict[str, Any] = {"moe_intermediate_size": 72, "shared_expert_intermediate_size": 192, "num_experts": 8}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **own))


def trained(model: Any, tokens: Tensor, steps: int) -> PreTrainedModel:
    """Train a model on random windows of `tokens`."""
    model.set_experts_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = LambdaLR(optimizer, lambda step: min(1, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps)))
    for step in range(steps):
        starts = torch.randint(0, len(tokens) - LENGTH, (BATCH,))
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        loss = model(batch, labels=batch, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}, loss {loss.item():.3f}", flush=True)
    return model.eval()


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the perplexities as a Markdown table."""
    (dense,) = rows["dense"].values()
    lines = [f"| perplexity, dense {dense:.3f} | " + " | ".join(f"{ratio:.0%}" for ratio in RATIOS) + " |"]
    lines.append("|---" * (1 + len(RATIOS)) + "|")
    for name, found in rows.items():
        if name != "dense":
            lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in found.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
