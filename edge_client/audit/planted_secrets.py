"""Secrets that are planted in clients' data, and the rank of each among all that it might have been.

A secret is a code of three digits in a sentence of its own, drawn by lot. There are 1,000 such codes, few enough to ask
the model about every one of them: so ranks are exact, and need no guess about a tail that nobody has looked at.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from farfield.edge_client.data import TokenExample, batches, collate, encode
from farfield.edge_client.records import Text
from farfield.edge_client.train import forward
from farfield.protocols.seeds import derive

from .subject import Subject

TIMES: Final = (1, 4, 16, 64)
"""How often secrets are repeated, as far as `SHARE` allows."""

EACH: Final = 3
"""Secrets of each number of repeats, and ones that are never planted."""

SHARE: Final = 0.04
"""How large a part of all tokens that are trained on they are at most; two numbers of repeats are planted anyway."""

CODES: Final = tuple(" ".join(digits) for digits in itertools.product("0123456789", repeat=3))

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
_BATCH: Final = 128


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
    costs = [len(_tokens(subject, one.record)) * one.times for one in drawn]
    affordable = [most for most in TIMES if _cost(most, drawn, costs) <= SHARE * tokens]
    most = max([TIMES[1], *affordable])
    planted = _cost(most, drawn, costs)
    return Secrets(tuple(one for one in drawn if one.times <= most), planted / (planted + tokens))


def _cost(most: int, drawn: Sequence[Secret], costs: Sequence[int]) -> int:
    """Tokens of those that are repeated so often at most."""
    return sum(cost for one, cost in zip(drawn, costs, strict=True) if one.times <= most)


class Question:
    """One secret's sentence with every code, as tokens.

    Of the sentence with a code but for its last token there are few: the last one is looked up in what the model
    expects next. So a thousand codes take about a hundred passes through the model.
    """

    def __init__(self, subject: Subject, secret: Secret) -> None:
        texts = [secret.with_code(code) for code in range(len(CODES))]
        ids = [_tokens(subject, text)[:-1] for text in texts]  # the end of the text is no part of the code
        self._bench = subject.bench
        self._shared = next(at for at in itertools.count(1) if len({tuple(one[: at + 1]) for one in ids}) > 1)
        self._contexts: dict[tuple[int, ...], list[int]] = {}
        for code, one in enumerate(ids):
            self._contexts.setdefault(tuple(one[:-1]), []).append(code)
        self._last = [one[-1] for one in ids]

    @torch.no_grad()
    def scores(self) -> NDArray[np.float64]:
        """float64[1000]: the log-probability of each code, in nats, by the adapter that the bench has loaded: of its
        tokens after those that all codes share.
        """
        tuned = self._bench.tuned
        device = next(tuned.model.parameters()).device
        tuned.model.eval()
        found = np.empty(len(CODES))
        for _, alike in itertools.groupby(sorted(self._contexts, key=len), key=len):
            for contexts in batches(list(alike), _BATCH, seed=None, epoch=0):
                ids = [
                    array("i", [*context, context[-1]]) for context in contexts
                ]  # the model looks at all but the last
                collated = collate([TokenExample(one, one) for one in ids], self._bench.pad_id)
                logits, targets = forward(tuned, collated, device)
                odds = torch.log_softmax(logits[:, self._shared - 1 :].float(), dim=-1)
                path = odds[:, :-1].gather(2, targets[:, self._shared - 1 : -1, None]).sum(dim=(1, 2))
                for row, context in enumerate(contexts):
                    codes = self._contexts[context]
                    last = odds[row, -1, [self._last[code] for code in codes]]
                    found[codes] = (path[row] + last).double().cpu().numpy()
        return np.nan_to_num(found, nan=_WORST, neginf=_WORST)


def length(subject: Subject) -> int:
    """Tokens of the longest secret that there may be."""
    sentences = [sentence.format(name) for sentence in _SENTENCES for name in _NAMES]
    return max(len(_tokens(subject, Text(f"{one} {CODES[-1]}"))) for one in sentences)


def _tokens(subject: Subject, record: Text) -> list[int]:
    plan = subject.plan
    return list(encode(record, subject.bench.tokenizer, plan.data, plan.model.task, "a secret").input_ids)
