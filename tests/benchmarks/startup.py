"""Measure the time of imports and of --help, relative to the import of torch and an Auto class of transformers.

python tests/benchmarks/startup.py --json startup.json

Every measurement is the run time of a new process. The cases take turns, so that other load on the machine affects all
of them equally. Ratios are ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import code, machine
from tqdm import tqdm

BASELINE = "transformers"
IMPORTS = "import torch; from transformers import AutoModelForCausalLM"
CASES = {
    BASELINE: ["-c", IMPORTS],
    "package": ["-c", "import optimum_modegpt"],
    "transformers and package": ["-c", f"{IMPORTS}; import optimum_modegpt"],
    "package and its configuration": ["-c", f"{IMPORTS}; from optimum_modegpt import ModeGPTConfig"],
    "compress --help": ["-m", "optimum_modegpt", "compress", "--help"],
}


def main() -> None:
    options = parse()
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in tqdm(range(options.repeats + 1), desc="rounds", disable=not sys.stderr.isatty()):
        for name, words in CASES.items():
            seconds[name].append(timed(words))
    cold = {name: times.pop(0) for name, times in seconds.items()}  # the first run reads files from the disk
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        {
            "case": name,
            "command": ["python", *CASES[name]],
            "median": medians[name],
            "ratio": medians[name] / medians[BASELINE],
            "seconds": seconds[name],
            "cold": cold[name],
        }
        for name in CASES
    ]
    print(f"{'':<32}{'seconds':>10}{'times':>8}")
    for row in rows:
        print(f"{row['case']:<32}{row['median']:>10.2f}{row['ratio']:>8.2f}")
    if options.json is not None:
        record = {"machine": machine(), "code": code(), "repeats": options.repeats, "results": rows}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each case, after one that is not used")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    return parser.parse_args()


def timed(words: list[str]) -> float:
    """Return the seconds that a Python process with these arguments takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
