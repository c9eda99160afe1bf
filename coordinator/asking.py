"""Asking a cohort: tasks of one kind go out, and each answer is admitted once, late, or not at all.

The part that all rounds, and all steps of a secure one, have in common. No I/O, no clock of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from farfield.protocols.messages import Failed, Refused, Reply, Task, Work
from farfield.protocols.plan import Plan


class Verdict(Enum):
    """What became of a reply."""

    ACCEPTED = "accepted"
    LATE = "late"
    STRAY = "stray"
    FAILED = "failed"
    REFUSED = "refused"
    INVALID = "invalid"


@dataclass(slots=True)
class Answers:
    """Who was asked, who still owes an answer, and what went wrong.

    Attributes:
        began: when, in seconds, and `seconds` how long answers are waited for.
        wanted: with how many it is enough; None waits for all.
        cohort: of how many they are those that are left; None where they are all.
    """

    plan: Plan
    run: str
    number: int
    nodes: tuple[str, ...]
    began: float
    seconds: float
    wanted: int | None = None
    cohort: int | None = None
    waiting: set[str] = field(init=False)
    counted: int = 0
    expired: bool = False
    problems: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.waiting = set(self.nodes)

    @property
    def closed(self) -> bool:
        return self.expired or not self.waiting or self.counted == self.wanted

    def admit(self, reply: Reply, now: float) -> Verdict | None:
        """None for a reply that may count; the sender is then no longer waited for."""
        addressed = (reply.run, reply.round, reply.plan_digest) == (self.run, self.number, self.plan.digest)
        if not addressed or reply.node not in self.nodes:
            return Verdict.STRAY
        self.tick(now)
        if reply.node not in self.waiting:
            return Verdict.LATE if reply.node in self.problems else Verdict.STRAY
        if self.closed:
            return Verdict.LATE
        self.waiting.discard(reply.node)
        match reply.outcome:
            case Failed(reason):
                self.problems[reply.node] = reason
                return Verdict.FAILED
            case Refused(reason):
                self.problems[reply.node] = f"refused: {reason}"
                return Verdict.REFUSED
        return None

    def lose(self, node: str, reason: str) -> None:
        if node in self.waiting:
            self.waiting.discard(node)
            self.problems[node] = reason

    def tick(self, now: float) -> None:
        if not self.closed and now >= self.began + self.seconds:
            self.expired = True
            for node in sorted(self.waiting):
                self.lose(node, f"no answer within {self.seconds:g} s")

    def reject(self, node: str, reason: str) -> Verdict:
        self.problems[node] = reason
        return Verdict.INVALID


class Asking:
    """Tasks of one kind go out, and it is known who still owes an answer."""

    def __init__(self, answers: Answers, work: Work, own: Callable[[str], Work] | None = None) -> None:
        """`own` gives what a node is asked where that is more than `work`, which has the same body."""
        self._answers = answers
        self._work = work
        self._own = own

    @property
    def closed(self) -> bool:
        return self._answers.closed

    @property
    def number(self) -> int:
        return self._answers.number

    @property
    def work(self) -> Work:
        return self._work

    @property
    def waiting(self) -> frozenset[str]:
        """Who has not answered yet. They may still be there when the round has closed without them."""
        return frozenset(self._answers.waiting)

    @property
    def problems(self) -> Mapping[str, str]:
        return self._answers.problems

    def tasks(self) -> Iterable[Task]:
        answers = self._answers
        for node in answers.nodes:
            work = self._own(node) if self._own else self._work
            asked = answers.cohort or len(answers.nodes)
            yield Task(answers.run, answers.number, node, answers.plan.digest, work, asked)

    def lose(self, node: str, reason: str) -> None:
        self._answers.lose(node, reason)

    def tick(self, now: float) -> None:
        self._answers.tick(now)
