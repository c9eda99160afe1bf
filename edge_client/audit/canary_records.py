"""Canary records: texts that are nobody's, each of which a coin puts into the data of a client or leaves out.

There are two kinds. *New-token* canaries are tokens that the clients' data hardly ever use, in an order of no sense
(after Panda et al. 2025, arXiv 2503.06808): nothing else in the run teaches the model about them, so they show the most
that a single record can give away. *Natural* ones are a few words of the client's own data with a detail drawn by lot:
nearer to a record that somebody would mind about.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np

from farfield.edge_client.data import ClassExample, ClientData, Example, TokenExample, encode
from farfield.edge_client.records import Labelled, Record, Text
from farfield.protocols.seeds import derive

from .subject import Subject

Kind: TypeAlias = Literal["new tokens", "natural"]
KINDS: Final[tuple[Kind, ...]] = ("new tokens", "natural")

MOST: Final = 1000
"""How many canaries there are at most; the ceiling of ε is at 5.2 then, and would grow by half for another thousand."""

FEWEST: Final = 64
"""And at least, though they may be more than `SHARE` then: fewer could show next to nothing."""

SHARE: Final = 0.03
"""How large a part of all tokens that are trained on canaries are, as far as `FEWEST` allows."""

_TOKENS: Final = 8
_WORDS: Final = 8
_POOL: Final = 512
_FEWEST_TOKENS: Final = 48
_TRIES: Final = 50
_NAMES: Final = ("Ada", "Bela", "Chiara", "Dario", "Edith", "Farid", "Greta", "Hana", "Ivo", "Jonas", "Kemal", "Lena")


CONTROLS: Final = 1000
"""How many more are made in the same way and never put in: true positives at 0.1 % false ones take a thousand of them.
"""


@dataclass(frozen=True, slots=True)
class Canary:
    """One record of a client, in its data where `included`."""

    kind: Kind
    client: str
    record: Record
    example: Example
    included: bool


@dataclass(frozen=True, slots=True)
class Canaries:
    """All of an audit, in lots that are the same each time.

    Attributes:
        controls: ones that no coin was thrown for; they are in no client's data.
        share: of the tokens that the clients train on, which part those put in are.
    """

    canaries: tuple[Canary, ...]
    controls: tuple[Canary, ...]
    share: float


def draw(subject: Subject) -> Canaries:
    """As many as the clients' data can bear, dealt evenly to the clients and to the two kinds."""
    data = {name: subject.clients[name]() for name in sorted(subject.clients)}
    tokens = sum(len(example.input_ids) for one in data.values() for example in one.train)
    generator = random.Random(derive(subject.seed, "canaries", "records"))
    coins = random.Random(derive(subject.seed, "canaries", "coins"))
    rare = _rare_tokens(subject, list(data.values()), generator)
    texts = {name: _texts(subject, one) for name, one in data.items()}
    names = generator.sample(list(data), len(data))
    known: set[str] = set()

    def made(place: int, *, included: bool) -> Canary:
        kind, name = KINDS[place % 2], names[place // 2 % len(names)]
        while True:
            text = _new(subject, rare, generator) if kind == "new tokens" else _natural(texts[name], generator)
            if text not in known:
                known.add(text)
                return _canary(subject, kind, name, text, generator, included=included)

    drawn: list[Canary] = []
    cost = 0
    while len(drawn) < FEWEST or (cost / 2 < SHARE * tokens and len(drawn) < MOST):
        drawn.append(made(len(drawn), included=coins.random() < 0.5))
        cost += len(drawn[-1].example.input_ids)
    put_in = sum(len(one.example.input_ids) for one in drawn if one.included)
    controls = tuple(made(place, included=False) for place in range(CONTROLS))
    return Canaries(tuple(drawn), controls, put_in / (put_in + tokens))


def _canary(
    subject: Subject, kind: Kind, client: str, text: str, generator: random.Random, *, included: bool
) -> Canary:
    model = subject.plan.model
    record: Record = Text(text) if model.labels is None else Labelled(text, generator.randrange(model.labels))
    whole = encode(record, subject.bench.tokenizer, subject.plan.data, model.task, "a canary")
    return Canary(kind, client, record, _cut(whole, subject.plan.data.max_length), included)


def _cut(example: Example, size: int) -> Example:
    """What of it is in one example."""
    if len(example.input_ids) <= size or isinstance(example, ClassExample):
        return example
    ids = example.input_ids[:size]
    return TokenExample(ids, ids)


def _new(subject: Subject, rare: Sequence[int], generator: random.Random) -> str:
    """Rare tokens in a row, of which the tokenizer makes the same tokens again; letters, where there are none."""
    for _ in range(_TRIES if len(rare) >= _TOKENS else 0):
        chosen = generator.sample(rare, _TOKENS)
        text = str(subject.bench.tokenizer.decode(chosen))
        if _ids(subject, text) == chosen:
            return text
    return "".join(generator.choices(string.ascii_lowercase, k=2 * _TOKENS))


def _rare_tokens(subject: Subject, data: Sequence[ClientData], generator: random.Random) -> list[int]:
    """Tokens that no client trains on; the rarest ones, where there are too few of those."""
    counts = np.zeros(len(subject.bench.tokenizer), np.int64)
    for one in data:
        for example in one.train:
            counts += np.bincount(np.asarray(example.input_ids), minlength=len(counts))
    special = set(subject.bench.tokenizer.all_special_ids)
    order = sorted(range(len(counts)), key=lambda one: (counts[one], generator.random()))
    found: list[int] = []
    for token in order:
        if len(found) >= (_POOL if counts[token] == 0 else _FEWEST_TOKENS):
            break
        text = str(subject.bench.tokenizer.decode([token]))
        if token not in special and text.isprintable() and text.strip() and _ids(subject, text) == [token]:
            found.append(token)
    return found


def _natural(texts: Sequence[Sequence[str]], generator: random.Random) -> str:
    words = generator.choice(texts)
    begin = generator.randrange(max(1, len(words) - _WORDS + 1))
    detail = f"{generator.choice(_NAMES)}, {generator.randrange(10**4):04}"
    return f"{' '.join(words[begin : begin + _WORDS])} ({detail})"


def _texts(subject: Subject, data: ClientData) -> list[list[str]]:
    """The words of each example that the client trains on."""
    decoded = (str(subject.bench.tokenizer.decode(list(one.input_ids), skip_special_tokens=True)) for one in data.train)
    return [words for words in (text.split() for text in decoded) if words] or [["Note"]]


def _ids(subject: Subject, text: str) -> list[int]:
    ids: list[int] = subject.bench.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
