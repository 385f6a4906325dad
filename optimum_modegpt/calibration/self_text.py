"""Let a dense model write its own calibration text: documents, or conversations if its tokenizer has a chat template.

A conversation begins with the header of a user turn, and the model writes both turns, as in Magpie (arXiv:2406.08464).
Tokens are sampled at temperature 1 from the nucleus of probability `TOP_P` among the `TOP_K` most likely ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from optimum_modegpt.calibration.parsing import encode, opening_token
from optimum_modegpt.errors import CalibrationDataError

TOP_K, TOP_P = 1024, 0.95
USER_TOKENS = 256
"""Maximum tokens of a user turn. Some templates end a turn with tokens that a model may never write."""
MARK = "modegpt"
"""The content of a message with which the parts of a chat template are found."""


@dataclass(frozen=True)
class Turn:
    """A part of the text: the tokens that open it, those that end it, and the maximum number of tokens between."""

    opening: tuple[int, ...]
    ends: frozenset[int]
    most: int | None = None


@dataclass(frozen=True)
class Script:
    """The tokens that begin every window, and the turns that follow each other, again and again.

    The model writes the first turn after `beginning`. If `hidden`, the beginning is no part of the window.
    """

    beginning: tuple[int, ...]
    turns: tuple[Turn, ...]
    hidden: bool = False


def script_of(tokenizer: Any, length: int) -> Script:
    """Return the script of conversations for a tokenizer with a chat template, else that of documents.

    Raises:
        CalibrationDataError: the tokenizer has no token that begins a text, its chat template cannot be used, or a
            window of `length` tokens is too short for the beginning.
    """
    script = _conversations(tokenizer) if getattr(tokenizer, "chat_template", None) else _documents(tokenizer)
    if len(script.beginning) >= length:
        raise CalibrationDataError(
            f"a window of {length} tokens has no space for text after the {len(script.beginning)} tokens with which "
            "the chat template begins. Raise sequence_length."
        )
    return script


def write(
    model: PreTrainedModel, script: Script, noise: Tensor, *, wrote: Callable[[int], Any] = lambda _: None
) -> Tensor:
    """Sample one window for each row of `noise` on the device of the model, and return them on the CPU.

    Args:
        model: the dense model, in evaluation mode.
        script: the tokens to begin with, and those that the text must contain.
        noise: random numbers in [0, 1), (windows, length), one for each token. A window depends only on its own row.
        wrote: called with the number of new tokens after each step.
    """
    beginning = torch.tensor(script.beginning, device=model.device).expand(len(noise), -1)
    length = noise.shape[1] + (len(script.beginning) if script.hidden else 0)
    settings = GenerationConfig(max_new_tokens=length - beginning.shape[1], do_sample=False)
    with _plain_generation(model):
        written: Any = model.generate(  # pyright: ignore[reportCallIssue]
            beginning,
            attention_mask=torch.ones_like(beginning),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Writer(script, noise, length, wrote)]),
        )
    return written[:, -noise.shape[1] :].cpu()


def nucleus(scores: Tensor, noise: Tensor) -> Tensor:
    """Sample a token of each row of `scores`, (rows, vocabulary), by inverting the distribution function at `noise`."""
    best, tokens = scores.topk(min(TOP_K, scores.shape[-1]), dim=-1)
    cumulative = best.cpu().double().softmax(-1).cumsum(-1)
    last = torch.searchsorted(cumulative, torch.full((len(scores), 1), TOP_P, dtype=torch.float64))
    mass = cumulative.gather(1, last.clamp(max=cumulative.shape[1] - 1))
    place = torch.searchsorted(cumulative, noise[:, None].double() * mass, right=True)
    return tokens.cpu().gather(1, place.clamp(max=cumulative.shape[1] - 1))[:, 0]


class _Writer(LogitsProcessor):
    """Leaves one possible token in each row: that of the script, or a sample.

    The sample is drawn here with given random numbers, because `generate` would use the global random state.
    """

    def __init__(self, script: Script, noise: Tensor, length: int, wrote: Callable[[int], Any]) -> None:
        self.noise, self.length, self.wrote = noise, length, wrote
        self.rows = [_Row(script) for _ in noise]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - (self.length - self.noise.shape[1])
        chosen = nucleus(scores, self.noise[:, place])
        for index, (row, token) in enumerate(zip(self.rows, chosen.tolist(), strict=True)):
            chosen[index] = row.next(token)
        self.wrote(len(chosen))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None].to(scores.device), 0.0)


class _Row:
    """Follows the script in one window."""

    def __init__(self, script: Script) -> None:
        self.turns = itertools.cycle(script.turns)
        self.turn = next(self.turns)
        self.written = 0
        self.waiting: list[int] = []
        """The tokens of the script that come next."""

    def next(self, sampled: int) -> int:
        """Return the next token: that of the script, or `sampled`."""
        if self.waiting:
            return self.waiting.pop(0)
        self.written += 1
        if sampled in self.turn.ends:
            return self._open(sampled)
        if self.turn.most is not None and self.written > self.turn.most:
            return self._open(None)
        return sampled

    def _open(self, end: int | None) -> int:
        """Begin the next turn, and return its first token or the `end` of the present one."""
        self.turn, self.written = next(self.turns), 0
        self.waiting = list(self.turn.opening)
        if end is None or self.waiting[:1] == [end]:
            return self.waiting.pop(0)
        return end


def _documents(tokenizer: Any) -> Script:
    """Return the script of documents: each begins with BOS, or with the token that ends the one before."""
    opening, ends = opening_token(tokenizer), _end_tokens(tokenizer)
    begin = opening
    for candidate in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        begin = candidate if begin is None else begin
    if begin is None:
        raise CalibrationDataError(
            "the tokenizer has neither a BOS nor an EOS token, so no text of the model can begin. Calibrate on text: "
            "pass another dataset than 'self'."
        )
    # As in prompts, the window itself begins with a special token only if the tokenizer adds one.
    return Script((begin,), (Turn((begin,), ends),), hidden=opening is None)


def _conversations(tokenizer: Any) -> Script:
    """Return the script of conversations of one user turn and one assistant turn each."""
    user, assistant = {"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}
    header, _, answer = _rendered(tokenizer, [user], add_generation_prompt=True).partition(MARK)
    _, _, closing = _rendered(tokenizer, [user, assistant]).rpartition(MARK)
    if not header or not answer:
        raise CalibrationDataError(
            "the chat template does not show where a user turn begins and ends, so the model cannot write one. "
            "Calibrate on conversations or text: pass another dataset than 'self'."
        )
    begin, between = _ids(tokenizer, header), _ids(tokenizer, answer)
    ends = _end_tokens(tokenizer)
    question = Turn(_ids(tokenizer, closing) + begin, _with_first(ends, tokenizer, between), USER_TOKENS)
    reply = Turn(between, _with_first(ends, tokenizer, question.opening))
    return Script(begin, (question, reply))


def _rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (
        TemplateError,
        ValueError,
    ) as error:  # a ValueError if several templates have names, and none is the default
        raise CalibrationDataError(
            f"the chat template rejects a conversation of a user and an assistant: {error}"
        ) from error


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(encode(tokenizer, text).tolist()) if text else ()


def _end_tokens(tokenizer: Any) -> frozenset[int]:
    return frozenset() if tokenizer.eos_token_id is None else frozenset({tokenizer.eos_token_id})


def _with_first(ends: frozenset[int], tokenizer: Any, following: Sequence[int]) -> frozenset[int]:
    """Add the first token after a turn to the tokens that end it, if it is a special one."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ends | (special & set(following[:1]))


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Replace the model's generation settings, such as penalties, by none within the context."""
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
