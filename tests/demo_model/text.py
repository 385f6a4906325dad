"""Write the text of the demo: little stories, letters, recipes, reports, sums and more, from `grammar.txt`.

A page is an expansion of the rule `document`. The values that a rule remembers (a hero, a lost thing, the weather, two
numbers and their sum) recur later on the same page, so good predictions need a long memory. One pair of hero and friend
in sixteen is held out: pages about these pairs are used for evaluation and never for training.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random

GRAMMAR = Path(__file__).parent / "grammar.txt"
HELD_OUT_ONE_IN = 16
REDRAWS = 8

DRAW = re.compile(r"<(?P<mode>[?!]?)(?:(?P<key>\w+)=)?(?P<rule>[\w ]+)(?:@(?P<subject>\w+))?>|{(?P<recall>[\w.]+)}")
SENTENCE_START = re.compile(r"((?:^|[.!?] )\"?\^?|\^)([a-z])", re.MULTILINE)
ARTICLE = re.compile(r"\b([Aa]) (?=(?:[aeiou]|hour|honest)(?!ne\b|se))")


@dataclass(frozen=True)
class Slot:
    """A place in a sentence that is drawn from a rule or recalled from memory."""

    mode: str | None
    key: str | None
    rule: str | None
    subject: str | None
    recall: str | None


Part = str | Slot
Alternative = tuple[tuple[Part, ...], ...]


@dataclass(frozen=True)
class Rule:
    """Alternatives to choose from. Each one is its wording followed by one wording per field."""

    fields: tuple[str, ...]
    alternatives: tuple[Alternative, ...]


def parse_wording(wording: str) -> tuple[Part, ...]:
    """Split a wording into its literal pieces and slots, in order."""
    parts: list[Part] = []
    end = 0
    for match in DRAW.finditer(wording):
        parts += [wording[end : match.start()], Slot(**match.groupdict())]
        end = match.end()
    return tuple(part for part in (*parts, wording[end:]) if part != "")


def parse_rule(fields: tuple[str, ...], lines: list[str]) -> Rule:
    """Parse a rule with these fields from its indented lines."""
    wordings = [w for line in filter(str.strip, lines) for w in line.strip().replace("\\n", "\n").split(" | ")]
    pieces = [wording.split("; ", len(fields)) if fields else [wording] for wording in wordings]
    return Rule(fields, tuple(tuple(map(parse_wording, alternative)) for alternative in pieces))


def parse_grammar(source: str) -> dict[str, Rule]:
    """Parse the rules of a grammar into a mapping name -> rule. The file explains its own notation."""
    rules: dict[str, Rule] = {}
    for block in re.split(r"\n+(?=\S)", source):
        heading, *lines = block.splitlines()
        if not heading.startswith("#"):
            name, _, fields = heading.partition(":")
            rules[name] = parse_rule(tuple(fields.replace(" ", "").split(",")) if fields else (), lines)
    return rules


@cache
def grammar() -> dict[str, Rule]:
    """Return the rules of `grammar.txt`."""
    return parse_grammar(GRAMMAR.read_text(encoding="utf-8"))


@dataclass
class Writer:
    """Expands rules, and remembers the values that they bind for the length of one page."""

    random: Random
    rules: dict[str, Rule]
    memory: dict[str, str] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    subject: str = ""

    def fill(self, parts: tuple[Part, ...]) -> str:
        """Return the wording with every slot filled, from left to right."""
        return "".join(part if isinstance(part, str) else self.fill_slot(part) for part in parts)

    def fill_slot(self, slot: Slot) -> str:
        """Return the text for one slot."""
        if slot.recall:
            return self.recall(slot.recall)
        assert slot.rule is not None
        if slot.mode == "?" and self.random.random() < 0.5:
            return ""
        outer, self.subject = self.subject, slot.subject or self.subject
        text = self.draw(slot.rule, slot.key)
        self.subject = outer
        return "" if slot.mode == "!" else text

    def recall(self, name: str) -> str:
        """Return the text remembered as `name`. The owner `self` means the current subject."""
        owner, dot, attribute = name.partition(".")
        return self.memory[(self.subject if owner == "self" else owner) + dot + attribute]

    def draw(self, name: str, key: str | None) -> str:
        """Draw one alternative of a rule, and remember it as `key` with its fields."""
        rule = self.rules[name]
        if key is None:
            return self.fill(self.choose(rule)[0])
        others = {value for owner, value in self.memory.items() if owner != key}
        wordings: list[str] = []
        for _ in range(REDRAWS):
            wordings = [self.fill(wording) for wording in self.random.choice(rule.alternatives)]
            if wordings[0] not in others:
                break
        self.memory[key] = wordings[0]
        self.memory.update({f"{key}.{name}": text for name, text in zip(rule.fields, wordings[1:], strict=True)})
        return wordings[0]

    def choose(self, rule: Rule) -> Alternative:
        """Choose an alternative that this page has not used yet, or any one if the first few draws find none."""
        alternative = self.random.choice(rule.alternatives)
        for _ in range(REDRAWS):
            if id(alternative) not in self.used:
                break
            alternative = self.random.choice(rule.alternatives)
        self.used.add(id(alternative))
        return alternative


def tidy(text: str) -> str:
    """Return the text with capitals at the start of sentences, `an` before vowels and single spaces."""
    text = re.sub(r" {2,}", " ", re.sub(r" *\n+ *", "\n", text)).strip()
    text = SENTENCE_START.sub(lambda match: match[1].replace("^", "") + match[2].upper(), text).replace("^", "")
    return ARTICLE.sub(r"\1n ", text)


def is_held_out(hero: str, friend: str) -> bool:
    """Return whether pages about this pair are reserved for evaluation."""
    return zlib.crc32(f"{hero} and {friend}".encode()) % HELD_OUT_ONE_IN == 0


def pages(seed: int, *, held_out: bool) -> Iterator[str]:
    """Yield pages without end, either about the pairs reserved for evaluation or about all others."""
    random = Random(seed)
    while True:
        writer = Writer(random, grammar())
        text = writer.draw("document", None)
        if is_held_out(writer.memory["hero"], writer.memory["friend"]) == held_out:
            yield tidy(text)


def write_text(seed: int, characters: int, *, held_out: bool) -> str:
    """Return whole pages, separated by blank lines, with at least `characters` characters in total."""
    chosen: list[str] = []
    length = 0
    for page in pages(seed, held_out=held_out):
        chosen.append(page)
        length += len(page) + 2
        if length >= characters:
            return "\n\n".join(chosen) + "\n"
    raise AssertionError("pages() never ends")
