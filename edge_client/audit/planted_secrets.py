"""Secrets that are planted in clients' data, and the rank of each among all that it might have been.

A secret is a code of three digits in a sentence of its own, drawn by lot. There are 1,000 such codes, few enough to ask
the model about every one of them: so ranks are exact, and need no guess about a tail that nobody has looked at.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from farfield.edge_client.data import TokenExample, collate, encode
from farfield.edge_client.records import Text
from farfield.edge_client.train import forward
from farfield.emulator.bench import Bench
from farfield.protocols.seeds import derive

from .subject import Subject

TIMES: Final = (1, 4, 16, 64)
"""How often secrets are repeated, as far as `SHARE` allows."""

EACH: Final = 3
"""Secrets of each number of repeats, and ones that are never planted."""

SHARE: Final = 0.04
"""How large a part of all tokens that are trained on they are at most; two numbers of repeats are planted anyway."""

CODES: Final = tuple(" ".join(digits) for digits in itertools.product("0123456789", repeat=3))

Ids: TypeAlias = tuple[int, ...]

_SENTENCES: Final = (
    "The access code of Dr. {} is",
    "The safe of ward {} opens with",
    "The patient number of Ms. {} is",
    "The door to room {} has the code",
)
_NAMES: Final = (
    "Abel", "Brandt", "Castro", "Dubois", "Eriksen", "Fontana", "Grieg", "Horvat", "Ivanov", "Jensen", "Keller",
    "Lindt", "Moreau", "Novak", "Ortega", "Popov", "Quist", "Rossi", "Silva", "Tanaka",
)  # fmt: skip
_WORST: Final = -1e6


@dataclass(frozen=True, slots=True)
class Secret:
    """`sentence` and `code`, `times` times in the data of `client`; 0 times is never."""

    client: str
    sentence: str
    code: int
    times: int

    @property
    def record(self) -> Text:
        return self.with_code(self.code)

    def with_code(self, code: int) -> Text:
        return Text(f"{self.sentence} {CODES[code]}")


@dataclass(frozen=True, slots=True)
class Secrets:
    """All of an audit, the same each time. `share` is which part of the tokens that are trained on they are."""

    secrets: tuple[Secret, ...]
    share: float


def draw(subject: Subject) -> Secrets:
    """The secrets of a subject, as many and as often as its clients' data can bear."""
    tokens = sum(len(example.input_ids) for read in subject.clients.values() for example in read().train)
    generator = random.Random(derive(subject.seed, "exposure", "secrets"))
    names = generator.sample(sorted(subject.clients), len(subject.clients))
    sentences = [
        sentence.format(name)
        for sentence, name in zip(itertools.cycle(_SENTENCES), generator.sample(_NAMES, len(_NAMES)), strict=False)
    ]
    drawn = [
        Secret(names[place % len(names)], sentences[place], generator.randrange(len(CODES)), times)
        for place, times in enumerate(times for times in (0, *TIMES) for _ in range(EACH))
    ]
    costs = [_length(subject, one) * one.times for one in drawn]
    most = next(
        (most for most in reversed(TIMES) if _upto(most, drawn, costs) <= SHARE * tokens),
        TIMES[1],
    )
    most = max(most, TIMES[1])
    planted = _upto(most, drawn, costs)
    return Secrets(tuple(one for one in drawn if one.times <= most), planted / (planted + tokens))


def _upto(most: int, drawn: Sequence[Secret], costs: Sequence[int]) -> int:
    return sum(cost for one, cost in zip(drawn, costs, strict=True) if one.times <= most)


def _length(subject: Subject, secret: Secret) -> int:
    whole = encode(secret.record, subject.bench.tokenizer, subject.plan.data, subject.plan.model.task, "a secret")
    return len(whole.input_ids)


class Asked:
    """One secret's sentence with every code, as tokens.

    Of the sentence up to a code's last token there are few: the last digit is looked up in what the model expects next.
    So a thousand codes take about a hundred passes through the model.
    """

    def __init__(self, subject: Subject, secret: Secret) -> None:
        bench, plan = subject.bench, subject.plan
        texts = [secret.with_code(code) for code in range(len(CODES))]
        ids = [tuple(encode(text, bench.tokenizer, plan.data, plan.model.task, "a secret").input_ids[:-1]) for text in texts]
        self._bench = bench
        self._begin = next(at for at in itertools.count() if len({one[at : at + 1] for one in ids}) > 1)
        self._contexts: dict[Ids, list[int]] = {}
        for code, one in enumerate(ids):
            self._contexts.setdefault(one[:-1], []).append(code)
        self._last = [one[-1] for one in ids]

    @torch.no_grad()
    def scores(self) -> NDArray[np.float64]:
        """float64[1000]: of each code, the log-probability of its tokens after those that all codes share, in nats; by
        the adapter that the bench has loaded.
        """
        tuned = self._bench.tuned
        device = next(tuned.model.parameters()).device
        tuned.model.eval()
        found = np.full(len(CODES), _WORST)
        by_length = itertools.groupby(sorted(self._contexts, key=len), key=len)
        for batch in (batch for _, same in by_length for batch in itertools.batched(same, _BATCH)):
            ...
        return found
