"""Whom an attacker asks about: examples that were trained on, and as many alike that were not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from farfield.edge_client.data import ClientData, Example, TokenExample, arrange, encode
from farfield.edge_client.records import Record
from farfield.edge_client.train import local_steps, micro_batches
from farfield.protocols.errors import AuditError
from farfield.protocols.plan import Plan
from farfield.protocols.privacy.mechanism import ExampleMechanism, mechanism
from farfield.protocols.seeds import derive

from .subject import Subject

MOST: Final = 400
"""How many members there are at most, and how many non-members: each costs a pass through every model."""

Key: TypeAlias = tuple[bytes, int | None]


@dataclass(frozen=True, slots=True)
class Candidates:
    """n examples, some of each client, and what is to be found out about them.

    Attributes:
        members: bool[n], which ones were trained on.
        clients: whose each is.
        visits: how often a member was trained on in the whole run, on average.
    """

    examples: list[Example]
    members: NDArray[np.bool_]
    clients: tuple[str, ...]
    visits: float


@dataclass(frozen=True, slots=True)
class _Client:
    """What one client has to offer: what it trained on, how often each (float64[m]), and what it never trained on."""

    name: str
    trained: list[Example]
    visits: NDArray[np.float64]
    held_out: list[Example]


def candidates(subject: Subject) -> Candidates:
    """Of each client that trained in the audited run, some of what it trained on and some of what it held out.

    Both were dealt by lot from the client's records, so they differ in nothing else. For each non-member a client has
    the same number of members as every other client has: were the mix of clients another on the two sides, it would
    give membership away. Left out is what other attacks have planted, and what a client holds out that some client
    trains on word for word.

    Raises:
        AuditError: there are none.
    """
    offers = _offers(subject)
    if not offers:
        hint = "Hold more out (data.held_out), or name the other attacks with --attacks."
        raise AuditError("no client that trained has held anything out", where="membership", hint=hint)
    share = min(1.0, MOST / sum(len(one.held_out) for one in offers))
    outside = [max(1, int(share * min(len(one.held_out), len(one.trained)))) for one in offers]
    each = max(1, min(MOST // sum(outside), *(len(one.trained) // n for one, n in zip(offers, outside, strict=True))))
    examples: list[Example] = []
    members: list[bool] = []
    clients: list[str] = []
    visits: list[float] = []
    for one, count in zip(offers, outside, strict=True):
        generator = random.Random(derive(subject.seed, "membership", "candidates", one.name))
        chosen = generator.sample(range(len(one.trained)), each * count)
        visits += [float(one.visits[index]) for index in chosen]
        examples += [one.trained[index] for index in chosen] + generator.sample(one.held_out, count)
        members += [True] * len(chosen) + [False] * count
        clients += [one.name] * (len(chosen) + count)
    return Candidates(examples, np.array(members), tuple(clients), sum(visits) / len(visits))


def visits(plan: Plan, name: str, examples: int, rounds: Sequence[int]) -> NDArray[np.float64]:
    """float64[examples]: how often a client has trained on each in these rounds.

    With DP-SGD nobody knows, since its batches are truly random; there it is how often it is to be expected.
    """
    if plan.privacy.kind == "example":
        made = mechanism(plan)
        assert isinstance(made, ExampleMechanism)
        return np.full(examples, len(rounds) * made.steps * made.sampling_rate)
    seen = np.zeros(examples)
    for number in rounds:
        seed = derive(plan.training.seed, "train", number, name)
        steps = micro_batches(range(examples), plan.training, seed)
        for step in islice(steps, local_steps(plan.training, examples)):
            for batch in step:
                seen[batch] += 1
    return seen


def _offers(subject: Subject) -> list[_Client]:
    course = subject.course
    rounds: dict[str, list[int]] = {name: [] for name in subject.clients if subject.members[name].act is None}
    for number in range(1, course.rounds + 1):
        for name in course.members(number):
            if name in rounds:
                rounds[name].append(number)
    read = {name: subject.members[name].data() for name in sorted(rounds)}
    known = {_key(example) for data in read.values() for example in data.train}
    offers = [_offer(subject, name, data, rounds[name], known) for name, data in read.items()]
    return [one for one in offers if one.trained and one.held_out]


def _offer(subject: Subject, name: str, data: ClientData, rounds: Sequence[int], known: set[Key]) -> _Client:
    planted = [one.record for planting in subject.plantings.values() for one in planting.records if one.client == name]
    touched = _touched(subject, data.train, planted)
    seen = visits(subject.plan, name, len(data.train), rounds)
    kept = [index for index in range(len(data.train)) if seen[index] and index not in touched]
    held_out = [example for example in data.held_out if _key(example) not in known]
    return _Client(name, [data.train[index] for index in kept], seen[kept], held_out)


def _key(example: Example) -> Key:
    return example.input_ids.tobytes(), None if isinstance(example, TokenExample) else example.label


def _touched(subject: Subject, train: Sequence[Example], planted: Sequence[Record]) -> set[int]:
    """Which examples hold something of a planted record."""
    settings, task = subject.plan.data, subject.plan.model.task
    lengths = [len(example.input_ids) for example in train]
    owner = np.repeat(np.arange(len(train)), lengths)
    stream = np.concatenate([np.asarray(example.input_ids) for example in train])
    found: set[int] = set()
    for record in {repr(record): record for record in planted}.values():
        whole = encode(record, subject.bench.tokenizer, settings, task, "planted")
        for piece in [whole] if settings.packing else arrange([whole], settings):
            for begin in occurrences(stream, np.asarray(piece.input_ids)):
                found.update(owner[begin : begin + len(piece.input_ids)].tolist())
    return found


def occurrences(stream: NDArray[np.intc], wanted: NDArray[np.intc]) -> list[int]:
    """Where `wanted` begins in `stream`; its last tokens may be missing where the stream ends."""
    begins = np.flatnonzero(stream == wanted[0])
    return [int(at) for at in begins if np.array_equal(stream[at : at + len(wanted)], wanted[: len(stream) - at])]
