"""Train the demo model from `grammar.txt` and seeds alone: text, tokenizer and weights.

    python tests/demo_model/train.py --output DIR

writes `DIR/model`, `DIR/calibration.txt` and `DIR/evaluation.txt`, the same files as those in `optimum_modegpt/demo`.
Training takes about 15 minutes on one CPU core. It uses Muon for the matrices and AdamW for the other parameters. The
texts and the tokenizer are reproduced bit-identically, the weights up to the order of floating-point sums.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from text import write_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAGE_BREAK = "<s>", "</s>", "\n\n"
BOS_ID, EOS_ID = 0, 1
VOCABULARY = 1024
CONTEXT = 256
BATCH = 8
WARM_UP = 100
COOL_DOWN = 0.4
CLOSE_EVERY = 8
TRAINING_SEED, CALIBRATION_SEED, EVALUATION_SEED = 0, 1, 2
TRAINING_CHARACTERS = 36_000_000
TOKENIZER_CHARACTERS = 3_000_000
CALIBRATION_CHARACTERS = 210_000
EVALUATION_CHARACTERS = 115_000


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode every text. It adds `BOS` at the start of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(PAGE_BREAK), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=CONTEXT
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Return all tokens of the text as one row. After every eighth page, `EOS` and `BOS` replace the blank line."""
    pages = text.rstrip().split(PAGE_BREAK)
    closed = [number % CLOSE_EVERY == 0 for number in range(1, len(pages) + 1)]
    wordings = [page if last else page + PAGE_BREAK for page, last in zip(pages, closed, strict=True)]
    encodings = tokenizer.backend_tokenizer.encode_batch(wordings, add_special_tokens=False)
    tokens = [encoding.ids + [EOS_ID, BOS_ID] * last for encoding, last in zip(encodings, closed, strict=True)]
    return torch.cat([torch.tensor(row) for row in tokens])


def new_model() -> LlamaForCausalLM:
    """Create the untrained model: 0.6 million parameters, five sixths of them in the projections of the blocks."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            intermediate_size=256,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.04,
            rms_norm_eps=1e-5,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=EOS_ID,
        )
    )


def new_optimizers(model: LlamaForCausalLM) -> list[Optimizer]:
    """Create Muon for the matrices of the blocks, and AdamW for the embedding and the norms."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    chosen = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        Muon(matrices, lr=0.01, weight_decay=0.05, momentum=0.95),
        AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int) -> float:
    """Return the fraction of the full learning rate at a step: a short warm-up, a plateau, then a linear decay to 0."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (COOL_DOWN * steps))


def batches(stream: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of windows from random positions in the stream. Half of each batch starts with `BOS`."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(stream) - CONTEXT, (BATCH, 1), generator=generator)
        windows = stream[starts + torch.arange(CONTEXT)]
        windows[: BATCH // 2, 0] = BOS_ID
        yield windows


def train(model: LlamaForCausalLM, stream: Tensor, steps: int, seed: int) -> None:
    """Train the model in place to predict the next token of the stream."""
    optimizers = new_optimizers(model)
    schedules = [LambdaLR(optimizer, lambda step: learning_rate(step, steps)) for optimizer in optimizers]
    progress = tqdm(batches(stream, steps, seed), total=steps, desc="training", unit="step")
    for windows in progress:
        loss = model(input_ids=windows, labels=windows, use_cache=False).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        progress.set_postfix(perplexity=f"{math.exp(loss.item()):.2f}")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model of optimum_modegpt on generated text.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its two texts")
    parser.add_argument("--steps", type=int, default=2400, help="steps of 2,048 tokens (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the weights and of the data order (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    """Write the texts, train the tokenizer and the model, and save them."""
    options = arguments()
    torch.manual_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    calibration = write_text(CALIBRATION_SEED, CALIBRATION_CHARACTERS, held_out=False)
    evaluation = write_text(EVALUATION_SEED, EVALUATION_CHARACTERS, held_out=True)
    (options.output / "calibration.txt").write_text(calibration, encoding="utf-8")
    (options.output / "evaluation.txt").write_text(evaluation, encoding="utf-8")
    text = write_text(TRAINING_SEED, TRAINING_CHARACTERS, held_out=False)
    tokenizer = train_tokenizer(text[:TOKENIZER_CHARACTERS])
    model = new_model()
    train(model, tokenize(tokenizer, text), options.steps, options.seed)
    model.save_pretrained(options.output / "model")
    tokenizer.save_pretrained(options.output / "model")


if __name__ == "__main__":
    main()
