"""Compare the greedy tokens of a server with those of transformers.

python tests/benchmarks/served_tokens.py --model DIR [--url URL] [--tokens N] [--prompts TEXT …]

Start an engine with an OpenAI-compatible server on the same folder first, for example with vLLM:

python -m vllm.entrypoints.openai.api_server --model DIR --dtype float32
"""

from __future__ import annotations

import argparse
import json
from typing import Any
from urllib.request import Request, urlopen

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import optimum_modegpt  # noqa: F401 - registers the compressed classes

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little",
    "Photosynthesis is the process by which",
)
SECONDS = 600
"""Longest time to wait for an answer."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="the folder that is served")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server (%(default)s)")
    parser.add_argument("--tokens", type=int, default=24, metavar="N", help="new tokens per prompt (%(default)s)")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="TEXT", help="default: three sentences")
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    served = answer(f"{options.url}/v1/models")["data"][0]["id"]
    equal = 0
    for prompt in options.prompts:
        ids = tokenizer(prompt).input_ids
        expected = model.generate(torch.tensor([ids]), max_new_tokens=options.tokens, do_sample=False)[0, len(ids) :]
        # As tokens, because a server may encode text with other special tokens.
        request = {"model": served, "prompt": ids, "max_tokens": options.tokens, "temperature": 0}
        found = answer(f"{options.url}/v1/completions", request | {"return_token_ids": True})["choices"][0]["token_ids"]
        same = found == expected.tolist()
        equal += same
        print(f"{'equal' if same else 'DIFFERENT'}: {prompt}{tokenizer.decode(found)!r}")
        if not same:
            print(f"expected: {tokenizer.decode(expected)!r}")
    print(f"{equal} of {len(options.prompts)} × {options.tokens} tokens are equal")
    if equal < len(options.prompts):
        raise SystemExit(1)


def answer(url: str, request: dict[str, Any] | None = None) -> Any:
    """Return the JSON that the server answers to a GET, or to a POST of `request`."""
    data = None if request is None else json.dumps(request).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=SECONDS) as response:
        return json.load(response)


if __name__ == "__main__":
    main()
