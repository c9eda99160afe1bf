"""A node's part in secure aggregations: what it keeps between the steps of each, and what it checks at every one.

The protocol itself is `farfield.protocols.secagg.client`. Here it is tied to the run: the masks are only made for the
Plan, backbone, adapter and round that this node was asked about, and the vector only for the sum that was opened.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from farfield.protocols import secagg, summing
from farfield.protocols.errors import SecAggError
from farfield.protocols.messages import Evaluate, Secure, Secured, Task, Train
from farfield.protocols.plan import Plan
from farfield.protocols.randomness import Randomness
from farfield.protocols.secagg import Open, Step, Terms
from farfield.protocols.summing import Part, Shapes, Subject
from farfield.protocols.tensors import digest, unpack_state

REMEMBERED: Final = 4096
"""How many parts that were summed are remembered, with whom, while the process lives."""

KEPT: Final = 8
"""How many aggregations a node takes part in at once; the oldest is given up for another."""

Work: TypeAlias = Callable[[Task, "Train | Evaluate"], "tuple[Part, Shapes]"]
"""Does the work of a task and says what it came to, and the shapes of what is trained."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What the node knows of the run, whatever the coordinator says at a step.

    Attributes:
        backbone, frozen: digests as in the run's charter, hexadecimal.
        terms: the owner's own limits.
    """

    plan: Plan
    backbone: str
    frozen: str
    terms: Terms


@dataclass(slots=True)
class _Session:
    """One session under way.

    Attributes:
        part: digest of what this node's part of the sum follows from, whatever else the coordinator chooses.
        survivors: whose parts the sum has, as the coordinator said.
    """

    state: secagg.State
    opened: Open
    part: bytes = b""
    survivors: bytes = b""


@dataclass(slots=True)
class Sessions:
    """The secure aggregations that one node takes part in. What they hold is never written to disk or log.

    Attributes:
        rounding: gives the random bits by which the values of a task's vector are rounded, and its noise drawn.
    """

    node: str
    identity: Ed25519PrivateKey = field(repr=False)
    rounding: Callable[[Task], Randomness] = field(default=lambda _: Randomness(), repr=False)
    _summed: OrderedDict[bytes, bytes] = field(default_factory=OrderedDict, repr=False)
    _open: OrderedDict[bytes, _Session] = field(default_factory=OrderedDict, repr=False)

    def answer(self, task: Task, secure: Secure, ground: Ground, work: Work) -> Secured:
        """Take the step that is asked for. Whatever is wrong ends the session: it will answer nothing more.

        Raises:
            SecAggError: the step does not belong to a session here, or something about it must not be answered.
        """
        session = self._session(task, secure, ground)
        try:
            if secure.step != session.state.step.value:
                raise SecAggError(f"the step {secure.step!r}, and this node waits for {session.state.step.value!r}")
            vector = None
            if session.state.step is Step.CONFIRM:
                session.survivors = bytes(secure.common)
            if session.state.step is Step.UNMASK:
                self._once(session)
            if session.state.step is Step.SUBMIT:
                vector = _vector(task, secure, session.opened, ground, work, self.rounding(task))
                session.part = _part(task, secure)
            elif secure.work is not None:
                raise SecAggError(f"work at the step {secure.step!r}")
            following, answer = session.state.answer(bytes(secure.common), secure.own, vector)
        except BaseException:
            del self._open[secure.session]
            raise
        if following is None:
            del self._open[secure.session]
        else:
            session.state = following
        return Secured(answer)

    def _once(self, session: _Session) -> None:
        """Raises SecAggError when this node's part was in a sum before, and in other company.

        Training follows the Plan's seed, so a round that is done again gives the same part, and from two sums whose
        clients differ in one, that one's part is their difference.
        """
        if self._summed.setdefault(session.part, session.survivors) != session.survivors:
            raise SecAggError(
                "this part was added to the parts of other clients before, and two such sums tell clients apart",
                hint="Go on with the next round, or give a new run another training.seed.",
            )
        while len(self._summed) > REMEMBERED:
            self._summed.popitem(last=False)

    def dump(self) -> dict[str, list[bytes]]:
        """What is going on, secrets in clear, for `restore` in another process of a simulation. It is used up."""
        dumped = {
            name.hex(): [secagg.encode_open(one.opened), secagg.dump(one.state), one.part, one.survivors]
            for name, one in self._open.items()
        }
        self._open.clear()
        return dumped

    def restore(self, dumped: Mapping[str, Sequence[bytes]], terms: Terms) -> None:
        for name, (opened, state, part, survivors) in dumped.items():
            restored = secagg.restore(state, self.node, self.identity, terms, lambda _: None)
            self._open[bytes.fromhex(name)] = _Session(restored, secagg.decode_open(opened), part, survivors)

    def _session(self, task: Task, secure: Secure, ground: Ground) -> _Session:
        if secure.step != Step.ADVERTISE.value:
            if secure.session not in self._open:
                raise SecAggError(
                    "a step of a secure aggregation that this node does not take part in, or has finished",
                    where=f"round {task.round} of run {task.run!r}",
                )
            return self._open[secure.session]
        if secure.session in self._open:
            raise SecAggError("a secure aggregation that was begun before", where=f"run {task.run!r}")
        opened = secagg.decode_open(bytes(secure.common))
        _check(opened, task, secure, ground)
        session = self._open[secure.session] = _Session(
            secagg.begin(self.node, self.identity, ground.terms, lambda _: None), opened
        )
        while len(self._open) > KEPT:
            self._open.popitem(last=False)
        return session


def _part(task: Task, secure: Secure) -> bytes:
    """What the part follows from: Plan and adapter, and for training the round. Ranges and norms only scale it."""
    subject = Subject.decode(secure.subject)
    trains = task.round.to_bytes(4, "big") if subject.purpose == "train" else b""
    return hashlib.sha256(subject.plan + subject.adapter + subject.purpose.encode() + trains).digest()


def _vector(task: Task, secure: Secure, opened: Open, ground: Ground, work: Work, random: Randomness) -> summing.Words:
    """The node's part of the sum, after everything about it was found to be what the session was opened for."""
    if hashlib.sha256(secure.subject).digest() != opened.context:
        raise SecAggError("another subject than the session was opened for")
    subject, asked = Subject.decode(secure.subject), secure.work
    if (subject.plan.hex(), subject.backbone.hex(), subject.frozen.hex()) != (
        ground.plan.digest,
        ground.backbone,
        ground.frozen,
    ):
        raise SecAggError("a sum over another Plan or backbone than the run's")
    if asked is None:
        raise SecAggError("a step that submits, without the work that is to be submitted")
    purpose, norm = ("train", asked.clipping_norm) if isinstance(asked, Train) else ("evaluate", None)
    if (subject.purpose, subject.clipping_norm) != (purpose, norm):
        raise SecAggError("other work than was agreed on")
    if digest(unpack_state(asked.adapter)) != subject.adapter.hex():
        raise SecAggError("another adapter than was agreed on")
    part, shapes = work(task, asked)
    layout = summing.layout(ground.plan, subject, shapes, opened.clients, opened.minimum)
    if (layout.modulus_bits, layout.length) != (opened.modulus_bits, opened.length):
        raise SecAggError("a sum of another form than this Plan's")
    return layout.pack(part, random)


def _check(opened: Open, task: Task, secure: Secure, ground: Ground) -> None:
    """Raises SecAggError unless `opened` is what this node was asked about."""
    if (opened.session, opened.run, opened.round) != (secure.session, task.run, task.round):
        raise SecAggError("the aggregation is of another session, run or round than its task")
    protection = ground.plan.protection
    asked = (opened.corrupt, opened.dropouts, opened.adversary)
    if asked != (protection.corrupt, protection.dropouts, protection.adversary):
        raise SecAggError("the aggregation is opened with other parameters than the Plan's")
    if opened.minimum != summing.smallest_sum(ground.plan, opened.clients):
        raise SecAggError(f"a sum of {opened.minimum} of {opened.clients} clients would be opened")
