"""A round whose answers nobody can read: the steps of a secure aggregation, each asked like a round of its own.

    round = SecureRound(plan, run, number, subject, work, identities, session, clock, wanted)
    for activity, step in round.steps():    each is asked until it is closed, by whatever carries the messages
        carry(step, activity)
    round.sum                               or None, and `round.failure` says why

The steps are those of `farfield.protocols.secagg.server`; this file gives them deadlines and takes note of who falls
out. A client that is lost costs the round at most its own part, unless so many are lost that the sum would say too
much about the rest: then nothing is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from farfield.protocols import secagg, summing
from farfield.protocols.errors import WireError
from farfield.protocols.messages import Evaluate, Reply, Secure, Secured, Train
from farfield.protocols.plan import Plan
from farfield.protocols.secagg import Step
from farfield.protocols.summing import Layout, Shapes, Subject, Sum

from .asking import Answers, Asking, Verdict
from .rounds import Score

ACTIVITY: Final = {
    Step.ADVERTISE: "agreeing on keys",
    Step.REVEAL: "drawing the graph",
    Step.SHARE: "sharing keys",
    Step.CONFIRM: "confirming who is there",
    Step.UNMASK: "unmasking the sum",
}
"""What each step does, for a person; the one that is missing does the round's own work."""


class SecureStep(Asking):
    """One step, asked of all who are still in. Driven like a round."""

    def __init__(self, answers: Answers, phase: secagg.Phase, common: Secure) -> None:
        super().__init__(answers, common, lambda node: replace(common, own=phase.own(node)))
        self._phase = phase

    def receive(self, reply: Reply, now: float) -> Verdict:
        """Add the answer, if it may count. One that is not counted changes nothing."""
        refused = self._answers.admit(reply, now)
        if refused is not None:
            return refused
        if not isinstance(reply.outcome, Secured):
            return self._answers.reject(reply.node, "answered a step of a secure aggregation with something else")
        try:
            self._phase.receive(reply.node, memoryview(reply.outcome.answer))
        except WireError as error:
            return self._answers.reject(reply.node, str(error))
        self._answers.counted += 1
        return Verdict.ACCEPTED


class SecureRound:
    """A cohort's parts, added up unseen.

    Attributes:
        sum: what they came to, once all steps are done; None when too few were left.
        clients: whose parts are in it.
        failure: why there is no sum.
        problems: by node, what went wrong first.
    """

    def __init__(
        self,
        plan: Plan,
        run: str,
        number: int,
        work: Train | Evaluate,
        subject: Subject,
        shapes: Shapes,
        identities: Mapping[str, bytes],
        session: bytes,
        clock: Callable[[], float],
        wanted: int | None = None,
        loading: bool = True,
    ) -> None:
        """
        Args:
            shapes: of what is trained in this round, by name; empty for an evaluation.
            identities: by node, the Ed25519 key that signs for it; they are asked.
            session: 32 bytes that were never used before.
            clock: gives seconds on a clock that does not go backwards.
            wanted: with how many parts it is enough, if others still work; None waits for all.
            loading: whether some may have to load their backbone first, and so take long for the first step.

        Raises:
            SecAggError: so many cannot be added up with the Plan's precision.
        """
        self._plan, self._run, self._number, self._work = plan, run, number, work
        self._subject, self._session, self._clock, self._loading = subject, session, clock, loading
        clients = self._asked = len(identities)
        minimum = summing.smallest_sum(plan, clients)
        self._wanted = None if wanted is None else max(wanted, minimum)
        self._layout: Layout = summing.layout(plan, subject, shapes, clients, minimum)
        self._phase: secagg.Phase = secagg.open_session(
            secagg.Open(
                session=session,
                run=run,
                round=number,
                context=subject.digest,
                clients=clients,
                modulus_bits=self._layout.modulus_bits,
                length=self._layout.length,
                minimum=minimum,
                corrupt=plan.protection.corrupt,
                dropouts=plan.protection.dropouts,
                adversary=plan.protection.adversary,
            ),
            identities,
        )
        self.sum: Sum | None = None
        self.clients: tuple[str, ...] = ()
        self.failure = ""
        self.problems: dict[str, str] = {}

    def steps(self) -> Iterator[tuple[str, SecureStep]]:
        """What is done, in words, and the step, which must be closed before the next one is asked for."""
        while True:
            step = self._step()
            yield ACTIVITY.get(self._phase.step, "training" if isinstance(self._work, Train) else "evaluating"), step
            if not step.closed:
                raise RuntimeError("the step is still open")
            self.problems = {**step.problems, **self.problems}
            try:
                following = self._phase.close()
            except WireError as error:
                self.failure = str(error)
                return
            if isinstance(following, secagg.Sum):
                self.clients = following.clients
                self.sum = self._layout.read(following.total, len(following.clients))
                for holder, dealer in following.disputed:
                    self.problems.setdefault(holder, f"revealed a share of {dealer} that is not the one dealt to it")
                return
            self._phase = following

    def _step(self) -> SecureStep:
        phase, plan = self._phase, self._plan
        submits = phase.step is Step.SUBMIT
        patient = submits or (self._loading and phase.step is Step.ADVERTISE)
        seconds = plan.cohort.round_seconds if patient else min(plan.protection.step_seconds, plan.cohort.round_seconds)
        wanted = self._wanted if submits else None
        now, asked = self._clock(), self._asked
        answers = Answers(plan, self._run, self._number, phase.clients, now, seconds, wanted, asked)
        common = Secure(phase.step.value, self._session, phase.common, b"")
        if submits:
            common = replace(common, subject=self._subject.encode(), work=self._work)
        return SecureStep(answers, phase, common)


def scored(total: Sum, clients: tuple[str, ...]) -> Score | None:
    """The adapter's score, from the sum of its measurements; None when nobody held anything out."""
    if not total.targets:
        return None
    return Score(total.loss / total.targets, total.correct / total.targets, total.targets, clients)
