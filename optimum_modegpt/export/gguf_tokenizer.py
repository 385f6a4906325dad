"""Convert a fast tokenizer to the vocabulary of a GGUF file, as far as llama.cpp can compute the same."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn

from optimum_modegpt.errors import UnsupportedModel

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""The character that SentencePiece writes for a space."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

PRE_TOKENIZERS: tuple[tuple[str, bool, tuple[dict[str, Any], ...]], ...] = (
    ("gpt-2", False, ({"type": "ByteLevel", "use_regex": True},)),
    ("smollm", False, ({"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True})),
    ("qwen2", False, ({"type": "Split", "pattern": {"Regex": _QWEN2}}, {"type": "ByteLevel", "use_regex": False})),
    ("llama-bpe", True, ({"type": "Split", "pattern": {"Regex": _LLAMA3}}, {"type": "ByteLevel", "use_regex": False})),
)
"""The name of a pre-tokenizer in llama.cpp, whether merges are ignored for words in the vocabulary, and its parts."""

SAMPLE = (
    "Hello world!  Two  spaces, 3 and 12345 numbers;\n\n a new line\tand a tab. It's the user's café, naïve Straße, "
    "über 100 %. Привет, мир. 你好，世界！ 🚀 (emoji) def f(x):\n    return x ** 2 ------======="
)


@dataclass
class Vocabulary:
    """The tokenizer of a GGUF file.

    Attributes:
        model: "gpt2" for byte-level BPE, "llama" for SentencePiece BPE, "t5" for unigram, "none" without a tokenizer.
        size: the number of tokens, which is that of the rows of the embedding.
        pre: the name of the pre-tokenizer.
        tokens, types: the text and the type (`gguf.TokenType`) of every token.
        scores: the score of every token, if the model has scores.
        merges: the merges, if the model has merges.
        special: the ids of "bos", "eos", "unk" and "pad".
        flags: values such as "add_bos_token", by the end of their key.
        charsmap: the normalisation that SentencePiece compiled, if any.
        chat_template: the chat template, if any.
        notes: the texts that llama.cpp tokenizes in another way.
    """

    model: str
    size: int
    pre: str = "default"
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] | None = None
    merges: list[str] | None = None
    special: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    charsmap: bytes | None = None
    chat_template: Any = None
    notes: list[str] = field(default_factory=list)


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The values of `gguf.TokenType`."""


def read_tokenizer(tokenizer: Any, size: int) -> Vocabulary:
    """Convert a tokenizer to the vocabulary of a model with `size` rows in its embedding.

    Without a tokenizer (None), the file has no vocabulary. llama.cpp then reads and returns token ids only.

    Raises:
        UnsupportedModel: llama.cpp does not tokenize as this tokenizer does. The message names the part.
    """
    if tokenizer is None:
        return Vocabulary("none", size)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        _refuse(f"{type(tokenizer).__name__} has no tokenizer.json")
    data = json.loads(backend.to_str())
    kind = data["model"]["type"]
    if kind == "BPE" and not data["model"]["byte_fallback"]:
        vocabulary = _byte_level(data, size)
    elif kind == "BPE":
        vocabulary = _sentencepiece(data, size)
    elif kind == "Unigram":
        vocabulary = _unigram(data, size)
    else:
        _refuse(f"its model is {kind!r}; expected BPE or Unigram")
    _add_tokens(vocabulary, tokenizer, data)
    _add_special(vocabulary, tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several, by name
        template = [{"name": name, "template": text} for name, text in template.items()]
    vocabulary.chat_template = template
    if vocabulary.model == "llama":
        _compare(vocabulary, tokenizer)
    return vocabulary


def _refuse(found: str) -> NoReturn:
    raise UnsupportedModel(
        f"GGUF: llama.cpp cannot tokenize as this model does: {found}. Export without a tokenizer "
        "(export_gguf(model, None, …)) and pass token ids to llama.cpp, or export to ONNX."
    )


def _parts(value: Any, key: str) -> list[dict[str, Any]]:
    """Return the parts of a normalizer or a pre-tokenizer, without nested sequences."""
    if value is None:
        return []
    return [part for one in value[key] for part in _parts(one, key)] if value["type"] == "Sequence" else [value]


def _check_bpe(model: dict[str, Any]) -> None:
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[name]:
            _refuse(f"the BPE model has {name} {model[name]!r}")


def _byte_level(data: dict[str, Any], size: int) -> Vocabulary:
    model = data["model"]
    _check_bpe(model)
    vocabulary = Vocabulary("gpt2", size, merges=[" ".join(pair) for pair in model["merges"]])
    for part in _parts(data["normalizer"], "normalizers"):
        if part["type"] != "NFC":
            _refuse(f"its normalizer is {part['type']}; expected none or NFC")
        vocabulary.notes.append("llama.cpp does not normalise text: pass it in Unicode's form NFC, as most text is.")
    parts = _parts(data["pre_tokenizer"], "pretokenizers")
    for name, ignores_merges, expected in PRE_TOKENIZERS:
        if len(parts) == len(expected) and all(map(_matches, parts, expected)):
            if model["ignore_merges"] != ignores_merges:
                _refuse(f"ignore_merges is {model['ignore_merges']}; expected {ignores_merges} with this pre-tokenizer")
            vocabulary.pre = name
            return vocabulary
    _refuse(f"no pre-tokenizer of it is {json.dumps(data['pre_tokenizer'], ensure_ascii=False)}")


def _matches(part: dict[str, Any], expected: dict[str, Any]) -> bool:
    if part.get("add_prefix_space") or part.get("invert") or part.get("behavior", "Isolated") != "Isolated":
        return False
    return all(part.get(key) == value for key, value in expected.items())


def _sentencepiece(data: dict[str, Any], size: int) -> Vocabulary:
    model = data["model"]
    _check_bpe(model)
    vocabulary = Vocabulary("llama", size)
    vocabulary.flags["add_space_prefix"] = _space_prefix(data, vocabulary)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(model["merges"]):
        ranks.setdefault(left + right, rank)
    scores = [0.0] * size
    for token, index in model["vocab"].items():
        if index < size:
            scores[index] = -float(ranks.get(token, len(model["merges"])))
    vocabulary.scores = scores
    if missing := [byte for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]:
        _refuse(f"it has no token for the byte {missing[0]}")
    return vocabulary


def _space_prefix(data: dict[str, Any], vocabulary: Vocabulary) -> bool:
    """Return whether a space is added before a text. Refuse other normalizers and pre-tokenizers."""
    normalizers = _parts(data["normalizer"], "normalizers")
    pre_tokenizers = _parts(data["pre_tokenizer"], "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if normalizers == [{"type": "Prepend", "prepend": SPACE}, replace] and not pre_tokenizers:
        return True
    splits_nothing = [part.get("pattern") for part in pre_tokenizers] == [{"String": " "}]  # which are replaced before
    if normalizers == [replace] and (not pre_tokenizers or splits_nothing):
        return False
    if not normalizers and len(pre_tokenizers) == 1 and pre_tokenizers[0]["type"] == "Metaspace":
        part = pre_tokenizers[0]
        if part["replacement"] == SPACE and not part.get("split", True):
            if part["prepend_scheme"] == "first":
                vocabulary.notes.append("llama.cpp also adds a space after each special token within a text.")
            return part["prepend_scheme"] != "never"
    _refuse(
        f"its normalizer is {json.dumps(data['normalizer'], ensure_ascii=False)} and its pre-tokenizer "
        f"{json.dumps(data['pre_tokenizer'], ensure_ascii=False)}"
    )


def _unigram(data: dict[str, Any], size: int) -> Vocabulary:
    model = data["model"]
    if model.get("byte_fallback"):
        _refuse("a unigram model falls back to bytes")
    if model["unk_id"] is None:
        _refuse("a unigram model has no unknown token")
    vocabulary = Vocabulary("t5", size, special={"unk": model["unk_id"]})
    vocabulary.flags["remove_extra_whitespaces"] = _removes_spaces(data, vocabulary)
    prefix = _parts(data["pre_tokenizer"], "pretokenizers")[-1]["prepend_scheme"] != "never"
    if prefix and not vocabulary.flags["remove_extra_whitespaces"]:
        _refuse("it adds a space before a text unless there is one, and keeps repeated spaces")
    vocabulary.flags["add_space_prefix"] = prefix
    vocabulary.scores = [float(score) for _, score in model["vocab"][:size]]
    vocabulary.scores += [0.0] * (size - len(vocabulary.scores))
    vocabulary.notes.append("If two ways to split a word have the same score, llama.cpp may choose the other one.")
    return vocabulary


def _removes_spaces(data: dict[str, Any], vocabulary: Vocabulary) -> bool:
    """Return whether repeated spaces count as one. Refuse other normalizers and pre-tokenizers of a unigram model."""
    pre_tokenizers = _parts(data["pre_tokenizer"], "pretokenizers")
    if [part["type"] for part in pre_tokenizers] not in (["Metaspace"], ["WhitespaceSplit", "Metaspace"]):
        _refuse(f"the pre-tokenizer of a unigram model is {json.dumps(data['pre_tokenizer'], ensure_ascii=False)}")
    splits, strips, replaces = len(pre_tokenizers) == 2, False, False
    if splits:
        vocabulary.notes.append("llama.cpp does not take line breaks and tabs for spaces: replace them in texts.")
    for part in _parts(data["normalizer"], "normalizers"):
        if part["type"] == "Precompiled":
            vocabulary.charsmap = base64.b64decode(part["precompiled_charsmap"])
        elif part["type"] == "Replace" and part["pattern"] == {"Regex": " {2,}"}:
            replaces = True
        elif part["type"] == "Strip" and part["strip_right"]:
            strips = True
        else:
            _refuse(f"the normalizer of a unigram model has the part {json.dumps(part, ensure_ascii=False)}")
    if not splits and strips != replaces:
        _refuse("it strips spaces at the end of a text or counts repeated ones as one, and not both")
    return splits or replaces


def _add_tokens(vocabulary: Vocabulary, tokenizer: Any, data: dict[str, Any]) -> None:
    """Add the text and the type of every token."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= vocabulary.size:
        _refuse(f"it has the token id {max(by_id)} and the model has {vocabulary.size} embeddings")
    added = {token["id"]: token for token in data["added_tokens"]}
    for index in range(vocabulary.size):
        token = by_id.get(index)
        vocabulary.tokens.append(f"[PAD{index}]" if token is None else token)
        vocabulary.types.append(_type(token, added.get(index), vocabulary.model))
        if vocabulary.types[-1] == USER_DEFINED:
            vocabulary.tokens[-1] = vocabulary.tokens[-1].replace(SPACE, " ")
    unknown = data["model"].get("unk_token")
    if unknown is not None:
        vocabulary.special["unk"] = data["model"]["vocab"][unknown]
    if "unk" in vocabulary.special and vocabulary.model != "gpt2":
        vocabulary.types[vocabulary.special["unk"]] = UNKNOWN


def _type(token: str | None, added: dict[str, Any] | None, model: str) -> int:
    if token is None:
        return UNUSED
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    is_byte = model == "llama" and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return BYTE if is_byte else NORMAL


def _add_special(vocabulary: Vocabulary, tokenizer: Any) -> None:
    """Add the ids of the special tokens, and whether they surround a text."""
    eos = tokenizer.eos_token_id
    if eos is None:
        _refuse("it has no eos_token, and llama.cpp would take another token as the end of a text")
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            vocabulary.special.setdefault(name, index)
    vocabulary.special.setdefault("bos", eos)  # it is not used then
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    before = next((index for index in range(len(whole)) if whole[index : index + len(plain)] == plain), 0)
    outside = (whole[:before], whole[before + len(plain) :])
    for name, found in zip(("bos", "eos"), outside, strict=True):
        if found not in ([], [vocabulary.special[name]]):
            _refuse(f"it adds the tokens {found} at the {'start' if name == 'bos' else 'end'} of a text")
        vocabulary.flags[f"add_{name}_token"] = bool(found)


def _compare(vocabulary: Vocabulary, tokenizer: Any) -> None:
    """Refuse a SentencePiece BPE whose scores do not give the tokens of its merges.

    llama.cpp merges every two symbols whose text is a token, and this tokenizer those that it lists.
    """
    scores, generator = vocabulary.scores or [], random.Random(0)
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    prefix = " " if vocabulary.flags["add_space_prefix"] else ""
    normal = [index for index, kind in enumerate(vocabulary.types) if kind == NORMAL]
    samples = [SAMPLE, *(tokenizer.decode(generator.choices(normal, k=20)) for _ in range(50))]
    for text in samples:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = _merge(ids, scores, list((prefix + text).replace(" ", SPACE)))
        if expected != found:
            _refuse(f"{text!r} has the tokens {expected[:20]}…, and by scores {found[:20]}…")


def _merge(ids: dict[str, int], scores: list[float], symbols: list[str]) -> list[int]:
    """Merge the characters of a text without special tokens, as llama.cpp does with the model "llama"."""
    while candidates := [
        (-scores[ids[left + right]], index)
        for index, (left, right) in enumerate(pairwise(symbols))
        if left + right in ids
    ]:
        _, index = min(candidates)
        symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]
    known = [
        [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()] for symbol in symbols
    ]
    return [index for one in known for index in one]
