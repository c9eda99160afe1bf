"""A secure aggregation of a Plan on this machine, whose server can be made to lie: the clients are the real ones.

What `Aggregation` says by itself is what an honest server says. Whoever attacks brings it to a step, and has one client
asked for something else.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from farfield.edge_client.secure import Ground, Sessions
from farfield.protocols import summing
from farfield.protocols.messages import Evaluate, Secure, Task, Train
from farfield.protocols.plan import Plan
from farfield.protocols.privacy.clipping import l2_norm
from farfield.protocols.randomness import Randomness
from farfield.protocols.secagg import Open, Phase, Step, Sum, Terms, encode_open, open_session
from farfield.protocols.secagg.session import Session, read_session
from farfield.protocols.seeds import derive
from farfield.protocols.summing import Layout, Part, Shapes, Subject, Words
from farfield.protocols.tensors import State, digest, pack_state, unpack_state

LARGEST: Final = 200_000
"""So many values of an adapter are enough: what is beyond them is masked in the same way."""

ALONE: Final = 8
"""Clients that are made up where the audit knows of one only, and the Plan does not say how many there are."""

RUN: Final = "audit"


@dataclass(frozen=True)
class Setting:
    """What every staged aggregation of an audit has in common.

    Attributes:
        names: of the clients, in ascending order.
        frozen: see `Charter`.
        adapter: before the round; the first tensors of it where it is large.
        parts: what each client adds, made up.
    """

    plan: Plan
    names: tuple[str, ...]
    frozen: str
    adapter: State
    parts: Mapping[str, Part]

    @classmethod
    def made(cls, plan: Plan, clients: int, frozen: str, adapter: State, seed: int) -> Setting:
        """So many clients, with updates as large as the Plan allows and drawn from `seed`."""
        names = tuple(f"client-{number:03}" for number in range(clients))
        some = _some(adapter)
        parts = {name: _part(plan, some, derive(seed, "protocol", name)) for name in names}
        return cls(plan, names, frozen, some, parts)

    @property
    def shapes(self) -> Shapes:
        return {name: values.shape for name, values in self.adapter.items()}

    @property
    def norm(self) -> float | None:
        return self.plan.privacy.clipping_norm if self.plan.privacy.kind == "client" else None

    @property
    def terms(self) -> Terms:
        """What the owner of data asks for whose limits are the Plan's own, but for who may be there."""
        return Terms(self.plan.smallest_cohort, summing.smallest_sum(self.plan, len(self.names)))

    def vector(self, layout: Layout, name: str) -> Words:
        """What the client adds before it is masked."""
        return layout.pack(self.parts[name], rounding(name))


class Company:
    """Clients with keys of their own, which remember what they took part in."""

    def __init__(self, setting: Setting, *, consortium: bool = False) -> None:
        """`consortium`: whether the clients have a list of who may be there, as a consortium's roster gives them."""
        self.setting = setting
        self.identities = {name: Ed25519PrivateKey.generate() for name in setting.names}
        self._sessions = {
            name: Sessions(name, key, lambda task: rounding(task.node)) for name, key in self.identities.items()
        }
        self.terms = replace(setting.terms, peers=self.keys if consortium else None)

    @property
    def keys(self) -> dict[str, bytes]:
        return {name: key.public_key().public_bytes_raw() for name, key in self.identities.items()}

    def ask(self, name: str, secure: Secure, number: int) -> bytes:
        """What the client answers. Raises whatever it refuses with."""
        plan = self.setting.plan
        task = Task(RUN, number, name, plan.digest, secure, len(self.setting.names))
        ground = Ground(plan, "", self.setting.frozen, self.terms)
        return bytes(self._sessions[name].answer(task, secure, ground, self._work).answer)

    def _work(self, task: Task, asked: Train | Evaluate) -> tuple[Part, Shapes]:
        return self.setting.parts[task.node], self.setting.shapes


class Aggregation:
    """One sum of a company's parts, step by step.

    Attributes:
        opened: what it is about.
        phase: where its server is.
        heard: what each client answered to the step that submits.
    """

    def __init__(self, company: Company, number: int = 1, **opened: Any) -> None:
        """`opened`: fields of its Open that are not as the Plan wants them."""
        self.company, setting = company, company.setting
        plan, clients = setting.plan, len(setting.names)
        self.work = Train(pack_state(setting.adapter, plan.delivery.dtype), setting.norm)
        self.subject = subject_of(setting, self.work)
        minimum = summing.smallest_sum(plan, clients)
        self.layout = summing.layout(plan, self.subject, setting.shapes, clients, minimum)
        whole = Open(
            session=secrets.token_bytes(32),
            run=RUN,
            round=number,
            context=self.subject.digest,
            clients=clients,
            modulus_bits=self.layout.modulus_bits,
            length=self.layout.length,
            minimum=minimum,
            corrupt=plan.protection.corrupt,
            dropouts=plan.protection.dropouts,
            adversary=plan.protection.adversary,
        )
        self.opened = replace(whole, **opened)
        self.phase: Phase = open_session(self.opened, company.keys)
        self.heard: dict[str, bytes] = {}
        self._told: dict[Step, bytes] = {}

    @property
    def raw(self) -> bytes:
        """The Open as it is sent."""
        return encode_open(self.opened)

    @cached_property
    def session(self) -> Session:
        """What everybody derives from what they were told; from SHARE on."""
        sharing = self._told.get(Step.SHARE, self.phase.common)
        if Step.REVEAL in self._told:
            return read_session(self.raw, self._told[Step.REVEAL], sharing)
        return read_session(self.raw, sharing, b"")

    def others(self, *without: str) -> list[str]:
        return [name for name in self.company.setting.names if name not in without]

    def secure(self, name: str, **changed: Any) -> Secure:
        """What an honest server asks of the client now, but for what is changed."""
        step = self.phase.step
        asked = Secure(step.value, self.opened.session, self.phase.common, self.phase.own(name))
        if step is Step.SUBMIT:
            asked = replace(asked, subject=self.subject.encode(), work=self.work)
        return replace(asked, **changed)

    def ask(self, name: str, secure: Secure | None = None) -> bytes:
        """What the client answers to the present step, or to what it is asked instead."""
        return self.company.ask(name, secure or self.secure(name), self.opened.round)

    def advance(self, silent: frozenset[str] = frozenset()) -> Phase | Sum:
        """Ask all but the silent, and go on."""
        step = self.phase.step
        for name in self.phase.clients:
            if name not in silent:
                answer = self.ask(name)
                self.phase.receive(name, answer)
                if step is Step.SUBMIT:
                    self.heard[name] = answer
        self._told[step] = self.phase.common
        after = self.phase.close()
        if isinstance(after, Phase):
            self.phase = after
        return after

    def until(self, step: Step) -> Aggregation:
        """Go on to where the server asks for `step`."""
        while self.phase.step is not step:
            self.advance()
        return self

    def finish(self, silent: frozenset[str] = frozenset()) -> Sum:
        """Go on to the sum. The silent drop out before they submit anything."""
        while True:
            after = self.advance(silent if self.phase.step is Step.SUBMIT else frozenset())
            if isinstance(after, Sum):
                return after

    def plain(self, clients: tuple[str, ...]) -> Words:
        """The sum of what these clients add, without any masks."""
        vectors = [self.company.setting.vector(self.layout, name) for name in clients]
        total = vectors[0]
        for vector in vectors[1:]:
            np.add(total, vector, out=total)
        np.bitwise_and(total, (1 << self.layout.modulus_bits) - 1, out=total)
        return total


def cohort(plan: Plan, known: int | None) -> int:
    """How many clients are summed: a cohort of the Plan, or one group of it where it has some.

    Args:
        known: how many clients there are; None where nobody knows, and then `ALONE` are made up.
    """
    share = 1.0 if plan.cohort.fraction is None else plan.cohort.fraction
    asked = plan.cohort.size or math.ceil(share * (ALONE if known is None else known))
    return max(asked // (plan.aggregation.groups or 1), plan.smallest_cohort)


def subject_of(setting: Setting, work: Train) -> Subject:
    """What a sum of this work is about, when its coordinator is honest."""
    plan, widest = setting.plan, setting.plan.value_range
    assert widest is not None
    limit = widest if setting.norm is None else min(widest, setting.norm)
    return Subject(
        plan=bytes.fromhex(plan.digest),
        backbone=b"",
        frozen=bytes.fromhex(setting.frozen),
        purpose="train",
        adapter=bytes.fromhex(digest(unpack_state(work.adapter))),
        clipping_norm=setting.norm,
        ranges=(limit,) * len(setting.adapter),
    )


def rounding(name: str) -> Randomness:
    """A made-up client's random bits. They can be repeated, so that its vector can be computed a second time."""
    return Randomness(hashlib.sha256(f"audit {name}".encode()).digest())


def _some(adapter: State) -> State:
    """The first tensors, by their names, within `LARGEST` values; at least a part of the first."""
    some: State = {}
    left = LARGEST
    for name, values in sorted(adapter.items()):
        if values.size <= left:
            some[name] = values
            left -= values.size
    if not some:
        name, values = min(adapter.items())
        some[name] = values.reshape(-1)[:LARGEST]
    return some


def _part(plan: Plan, adapter: State, seed: int) -> Part:
    random = np.random.default_rng(seed)
    widest = plan.value_range
    assert widest is not None
    drawn = {
        name: (0.2 * widest * random.standard_normal(values.shape)).astype(np.float32)
        for name, values in adapter.items()
    }
    if plan.privacy.kind == "client":
        factor = np.float32(0.9 * plan.privacy.clipping_norm / l2_norm(drawn))
        return Part({name: values * factor for name, values in drawn.items()})
    examples, targets = int(random.integers(5, 60)), int(random.integers(500, 5000))
    return Part(drawn, examples, targets, 2.5 * targets + math.pi, steps=int(random.integers(1, 20)))
