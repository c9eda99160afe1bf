"""Clients of secure aggregations without a model: real sessions, and whatever work a test has them do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from farfield.coordinator.secure_rounds import SecureRound, SecureStep
from farfield.edge_client.secure import Ground, Sessions
from farfield.protocols.errors import FarfieldError
from farfield.protocols.messages import Evaluate, Failed, Outcome, Reply, Secure, Task, Train
from farfield.protocols.plan import Plan
from farfield.protocols.secagg import Step, Terms
from farfield.protocols.summing import Part, Shapes

Work = Callable[[Task, "Train | Evaluate"], Part]

TERMS = Terms(smallest_cohort=3, smallest_survivors=2)


@dataclass
class Clients:
    """Those who take part, each with a key and its sessions of its own.

    Attributes:
        work: what a client's work comes to.
        done: the nodes that did it, in order.
    """

    plan: Plan
    work: Work
    backbone: str = "ab" * 32
    frozen: str = "cd" * 32
    terms: Terms = TERMS
    done: list[str] = field(default_factory=list)
    sessions: dict[str, Sessions] = field(default_factory=dict)

    @property
    def ground(self) -> Ground:
        return Ground(self.plan, self.backbone, self.frozen, self.terms)

    def identities(self, nodes: Iterable[str]) -> Mapping[str, bytes]:
        return {node: self._of(node).identity.public_key().public_bytes_raw() for node in nodes}

    def outcome(self, task: Task) -> Outcome:
        """What the node answers. Raises FarfieldError where it answers nothing."""
        assert isinstance(task.work, Secure)
        return self._of(task.node).answer(task, task.work, self.ground, self._do)

    def answer(self, task: Task) -> Outcome:
        """What the node answers, as it would come over the wire."""
        try:
            return self.outcome(task)
        except FarfieldError as error:
            return Failed(str(error))

    def _of(self, node: str) -> Sessions:
        return self.sessions.setdefault(node, Sessions(node, Ed25519PrivateKey.generate()))

    def _do(self, task: Task, work: Train | Evaluate) -> tuple[Part, Shapes]:
        self.done.append(task.node)
        part = self.work(task, work)
        return part, {name: change.shape for name, change in part.update.items()}


Answer = Callable[[Step, Task], "Outcome | None"]
"""What comes back in a step from the task's node; None for nothing."""


def carry(round_: SecureRound, answer: Answer, now: float = 0.0) -> list[Step]:
    """Go through the round, each step to its end or its deadline; the steps that were gone through."""
    steps = []
    for _, one in round_.steps():
        steps.append(step_of(one))
        for task in one.tasks():
            if one.closed:
                break
            outcome = answer(steps[-1], task)
            if outcome is not None:
                one.receive(Reply.to(task, outcome), now)
        one.tick(now + 1e9)
    return steps


def step_of(one: SecureStep) -> Step:
    assert isinstance(one.work, Secure)
    return Step(one.work.step)
