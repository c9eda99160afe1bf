"""The texts of the attack `inversion`: those of victims, and public ones from which it learns what tells a token."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from farfield.edge_client.data import Example, TokenExample
from farfield.emulator import stdlib
from farfield.emulator.backbone import BUILTIN
from farfield.emulator.streams import run
from farfield.protocols.seeds import derive

from .inversion_scores import Values
from .subject import Subject

FILES = 150
"""Files of the standard library that an attacker reads."""

WRITTEN = (64, 48)
"""Texts that the model itself writes where there is no public text, and their tokens."""


@dataclass(frozen=True, slots=True)
class Text:
    """Examples that were trained on, and the distinct tokens in them."""

    examples: tuple[TokenExample, ...]
    tokens: frozenset[int]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Text:
        kept = tuple(one for one in examples if isinstance(one, TokenExample))
        return cls(kept, frozenset(token for one in kept for token in one.input_ids))

    def present(self, vocabulary: int) -> Values:
        """float64[vocabulary]: 1 for its tokens."""
        found = np.zeros(vocabulary)
        found[list(self.tokens)] = 1
        return found


@dataclass(frozen=True, slots=True)
class Public:
    """Text that the attacker has: windows of tokens, and how common each token is in it (natural logarithm)."""

    windows: tuple[TokenExample, ...]
    frequency: Values


def public(subject: Subject) -> Public:
    """Public text for the built-in backbone, and for every other one what the model itself writes."""
    length, vocabulary = subject.plan.data.max_length, _vocabulary(subject)
    if subject.plan.model.backbone.startswith(BUILTIN):
        files = islice(stdlib.sources(of_clients=False, tests=False), FILES)
        ids = [token for file in files for token in subject.bench.tokenizer(file.text, verbose=False)["input_ids"]]
    else:
        ids = subject.notes.values("inversion/written", lambda: _written(subject, vocabulary))
    cut = [array("i", ids[start : start + length]) for start in range(0, len(ids), length)]
    counts = np.bincount(np.array(ids), minlength=vocabulary)
    return Public(tuple(TokenExample(one, one) for one in cut if len(one) > 1), np.log(counts + 0.1))


def begun(examples: Sequence[Example], distinct: int, seed: int) -> Text | None:
    """Examples in a random order, cut where so many distinct tokens have come; None where there are not so many.

    There may be one more, since a single token predicts nothing.
    """
    order = [one for one in examples if isinstance(one, TokenExample)]
    random.Random(seed).shuffle(order)
    seen: set[int] = set()
    taken: list[TokenExample] = []
    for one in order:
        for end, token in enumerate(one.input_ids, 1):
            seen.add(token)
            if len(seen) == distinct and (end > 1 or taken):
                part = one.input_ids[: max(end, 2)]
                return Text.of([*taken, TokenExample(part, part)])
        taken.append(TokenExample(one.input_ids, one.input_ids))
    return None


def opening(examples: Sequence[Example], length: int, seed: int) -> TokenExample | None:
    """The first tokens of one example, drawn from those that are long enough; None where none is."""
    long = [one for one in examples if isinstance(one, TokenExample) and len(one.input_ids) >= length]
    if not long:
        return None
    ids = random.Random(seed).choice(long).input_ids[:length]
    return TokenExample(ids, ids)


def some(windows: Sequence[TokenExample], count: int, seed: int) -> Iterator[TokenExample]:
    """So many of them, drawn with replacement: public text is as long as it is wanted."""
    yield from random.Random(seed).choices(list(windows), k=count)


def _vocabulary(subject: Subject) -> int:
    model: Any = subject.bench.tuned.model
    return int(getattr(model, "get_base_model", lambda: model)().get_input_embeddings().weight.shape[0])


@torch.no_grad()
def _written(subject: Subject, vocabulary: int) -> list[int]:
    """What the model writes by itself from one random token on."""
    generator = torch.Generator().manual_seed(derive(subject.seed, "inversion", "written"))
    texts, length = WRITTEN
    ids = torch.randint(vocabulary, (texts, 1), generator=generator)
    subject.bench.load(subject.bench.part(subject.initial))
    for _ in range(length - 1):
        logits = run(subject.bench.tuned.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
        chances = torch.softmax(logits[:, -1].float().cpu(), -1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return [int(token) for token in ids.flatten()]
