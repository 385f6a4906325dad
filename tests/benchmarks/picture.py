"""Draw the picture of the README from `results/quality.json`: perplexity after each ratio, one panel per model.

python tests/benchmarks/picture.py [FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results" / "quality.json"
PICTURE = Path(__file__).parents[2] / ".github" / "docs" / "quality.png"
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
METHODS = {"default": "this package", "paper": "paper, best setting", "MLP only": "paper, MLP only"}
COLORS = {"default": "#4c72b0", "paper": "#dd8452", "MLP only": "#55a868"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=PICTURE, help="default: %(default)s")
    draw(json.loads(RESULTS.read_text(encoding="utf-8"))).savefig(parser.parse_args().file, dpi=120)


def draw(results: dict[str, Any]) -> Figure:
    """Return one panel per model with a curve per method, from the dense model to half of the weights."""
    figure = Figure(figsize=(11, 2.9), layout="constrained")
    panels = figure.subplots(1, len(results["dense"]))
    for panel, (model, dense) in zip(panels, results["dense"].items(), strict=True):
        for method, label in METHODS.items():
            values = [dense, *(perplexity(results, model, ratio, method) for ratio in RATIOS)]
            percents = [0, *(100 * ratio for ratio in RATIOS)]
            panel.plot(percents, values, color=COLORS[method], marker="o", markersize=3, label=label)
        low, high = panel.dataLim.intervaly
        panel.set(yscale="log")
        panel.minorticks_off()
        ticks = [low * (high / low) ** (step / 3) for step in range(4)]
        panel.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
        panel.set_title(model, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("perplexity (log scale)", fontsize=9)
    figure.supxlabel("weights of the block projections removed, %", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(METHODS), frameon=False, fontsize=9)
    return figure


def perplexity(results: dict[str, Any], model: str, ratio: float, method: str) -> float:
    """Return the perplexity of the recipe `method`, or the best one of all recipes of the paper for "paper"."""
    rows = [row for row in results["rows"] if (row["model"], row["sparsity"]) == (model, ratio)]
    if method == "paper":
        return min(row["perplexity"] for row in rows if row["recipe"].startswith("paper"))
    (value,) = (row["perplexity"] for row in rows if row["recipe"] == method)
    return value


if __name__ == "__main__":
    main()
