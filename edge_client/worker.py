"""The worker: a client that performs tasks on its own data, at a bench that it may share with others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from farfield.emulator.bench import Bench
from farfield.protocols.errors import FarfieldError, PlanError
from farfield.protocols.messages import Evaluate, Evaluated, Failed, Reply, Secure, Secured, Task, Train, Trained
from farfield.protocols.privacy import clipping
from farfield.protocols.privacy.mechanism import ExampleMechanism, mechanism
from farfield.protocols.randomness import Randomness
from farfield.protocols.seeds import derive
from farfield.protocols.summing import Part, Shapes
from farfield.protocols.tensors import Arrays, State, pack_state, unpacked
from farfield.protocols.turns import takes_part

from .data import ClientData, Example
from .local_state import LocalState
from .secure import Work
from .train import Outcome, evaluate, local_steps, train


@dataclass(frozen=True, slots=True)
class Worker:
    """One client: performs tasks on its own data at a bench that it may share with others.

    Attributes:
        data: gives the client's examples; called for each task, so that what is not in use need not be in memory.
        kept: where the client keeps its own part of the adapter, for methods that leave it one.
        spend: is told a round before the data are opened to train for it; raises where their owner's limit forbids it.
        secure: takes the client's step in a secure aggregation, and calls back where work is to be done for it.
        used_up: a task's adapter is nobody else's, so its memory may be given up as soon as nothing here needs it.
    """

    node: str
    bench: Bench
    data: Callable[[], ClientData]
    on_step: Callable[[float], None] | None = None
    kept: LocalState | None = None
    secure: Callable[[Task, Secure, Work], Secured] | None = None
    spend: Callable[[int], None] | None = None
    used_up: bool = False

    def perform(self, task: Task) -> Reply:
        """Do what the task says. Whatever the data, the Plan or the task make impossible becomes a `Failed` reply."""
        try:
            return Reply.to(task, self.outcome(task))
        except FarfieldError as error:
            return Reply.to(task, Failed(str(error)))

    def outcome(self, task: Task) -> Trained | Evaluated | Secured:
        """Do what the task says. Raises FarfieldError where the data, the Plan or the task make it impossible."""
        plan = self.bench.plan
        if task.plan_digest != plan.digest:
            raise PlanError("the task belongs to another Plan", where=f"run {task.run}, round {task.round}")
        if task.round > plan.training.rounds:
            raise PlanError(f"round {task.round} of a Plan of {plan.training.rounds}", where=f"run {task.run}")
        match task.work:
            case Secure():
                if self.secure is None:
                    raise PlanError("a step of a secure aggregation, which this Plan does not have")
                return self.secure(task, task.work, self.part)
            case _ if plan.protection.kind == "secagg":
                raise PlanError(
                    "the task wants this client's answer by itself, and the Plan promises secure aggregation"
                )
            case Train():
                part = self.trained(task, task.work)
                update = pack_state(part.update, plan.delivery.dtype)
                loss = part.loss / part.targets if part.targets else 0.0
                return Trained(update, part.examples, part.targets, part.steps, loss, part.clipped)
            case Evaluate() if not plan.measures:
                raise PlanError("the task wants a held-out loss, which this Plan's privacy does not allow")
            case Evaluate():
                part = self._measured(task, task.work)
                loss = part.loss / part.targets if part.targets else 0.0
                return Evaluated(part.examples, part.targets, loss, part.correct)

    def part(self, task: Task, work: Train | Evaluate) -> tuple[Part, Shapes]:
        """The client's part of a sum, and the shapes of what it trained. Raises as `outcome` does."""
        if isinstance(work, Evaluate) and not self.bench.plan.measures:
            raise PlanError("the task wants a held-out loss, which this Plan's privacy does not allow")
        if isinstance(work, Evaluate):
            return self._measured(task, work), {}
        part = self.trained(task, work)
        whole = replace(part, update=self.bench.whole(part.update))  # masked values all have one length
        return whole, {name: change.shape for name, change in whole.update.items()}

    def trained(self, task: Task, work: Train) -> Part:
        """What training for the task comes to, before anything hides it. Raises as `outcome` does."""
        plan, bench = self.bench.plan, self.bench
        if task.round < 1 or not takes_part(plan, self.node, task.round):
            raise PlanError(f"round {task.round} is not this client's turn, by the Plan's privacy.participations")
        if self.spend is not None:
            self.spend(task.round)
        examples = self.data().train
        own = self._own(task.round - 1)
        start = self._set(work, own)
        with bench.round(task.round):
            done = self._locally(task, start, examples)
        update = done.update
        if own:
            if self.kept is not None:
                self.kept.save(task.round, {name: value + done.update[name] for name, value in own.items()})
            update = {name: change for name, change in done.update.items() if name not in own}
        if plan.privacy.kind == "client":
            return self._clipped(update, work)
        return Part(update, len(examples), done.targets, done.loss * done.targets, done.steps)

    def _set(self, work: Train, own: Arrays) -> Arrays:
        """Set the bench to what the task brings and what the client has at home, and give the start of training."""
        bench = self.bench
        shared = bench.part(unpacked(work.adapter))
        bench.load(shared, own)
        if bench.tuned.descent is None:
            return {**shared, **own} if own else shared
        # It goes on from what the parameters are, so what they were set to need not stay.
        if self.used_up and isinstance(work.adapter, dict):
            work.adapter.clear()
        return bench.current()

    def _locally(self, task: Task, start: Arrays, examples: Sequence[Example]) -> Outcome:
        """Train at the bench, plainly or so that no single example shows."""
        plan, bench = self.bench.local, self.bench
        seed = derive(plan.training.seed, "train", task.round, task.node)
        made = mechanism(plan) if plan.privacy.kind == "example" else None
        steps = made.steps if isinstance(made, ExampleMechanism) else local_steps(plan.training, len(examples))
        first, horizon = (task.round - 1) * steps, plan.training.rounds * steps
        if not isinstance(made, ExampleMechanism):
            return train(
                bench.tuned,
                start,
                examples,
                plan.training,
                pad_id=bench.pad_id,
                seed=seed,
                steps=steps,
                first_step=first,
                horizon=horizon,
                on_step=self.on_step,
            )
        from . import private  # which imports Opacus

        return private.train(
            bench.tuned,
            start,
            examples,
            plan.training,
            made,
            Randomness(),
            pad_id=bench.pad_id,
            seed=seed,
            first_step=first,
            horizon=horizon,
            on_step=self.on_step,
        )

    @staticmethod
    def _clipped(update: Arrays, work: Train) -> Part:
        """The whole update within the task's norm, and nothing that would say more about this client."""
        if work.clipping_norm is None:
            raise PlanError("the task does not say to which norm the update is to be clipped")
        clipped, before = clipping.clip(update, work.clipping_norm)
        return Part(clipped, clipped=before > work.clipping_norm)

    def _measured(self, task: Task, work: Evaluate) -> Part:
        bench, settings = self.bench, self.bench.plan.evaluation
        examples = self.data().held_out[: settings.examples]
        if not examples:
            return Part()
        bench.load(bench.part(unpacked(work.adapter)), self._own(task.round))
        measured = evaluate(bench.tuned, examples, settings.batch_size, pad_id=bench.pad_id)
        loss = measured.loss * measured.targets
        return Part({}, len(examples), measured.targets, loss, correct=measured.correct)

    def _own(self, number: int) -> State:
        """The client's own part of the adapter after round `number`; empty where the method shares all of it."""
        untrained = self.bench.own()
        if not untrained:
            return {}
        if self.kept is None:
            raise PlanError("the tuning method leaves each client a part of its own, and here is no place to keep it")
        kept = self.kept.after(number)
        return untrained if kept is None else kept
