"""The worker: a client that performs tasks on its own data, at a bench that it may share with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from farfield.emulator.bench import Bench
from farfield.protocols.errors import FarfieldError, PlanError
from farfield.protocols.messages import Evaluate, Evaluated, Failed, Reply, Task, Train, Trained
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import Tensor, pack_state, unpack_state

from .data import ClientData
from .train import evaluate, local_steps, train


@dataclass(frozen=True, slots=True)
class Worker:
    """One client: performs tasks on its own data at a bench that it may share with others.

    Attributes:
        data: gives the client's examples; called for each task, so that what is not in use need not be in memory.
    """

    node: str
    bench: Bench
    data: Callable[[], ClientData]
    on_step: Callable[[float], None] | None = None

    def perform(self, task: Task) -> Reply:
        """Do what the task says. Whatever the data, the Plan or the task make impossible becomes a `Failed` reply."""
        try:
            return Reply.to(task, self.outcome(task))
        except FarfieldError as error:
            return Reply.to(task, Failed(str(error)))

    def outcome(self, task: Task) -> Trained | Evaluated:
        """Do what the task says. Raises FarfieldError where the data, the Plan or the task make it impossible."""
        if task.plan_digest != self.bench.plan.digest:
            raise PlanError("the task belongs to another Plan", where=f"run {task.run}, round {task.round}")
        match task.work:
            case Train(adapter):
                return self._train(task, adapter)
            case Evaluate(adapter):
                return self._evaluate(adapter)

    def _train(self, task: Task, adapter: Mapping[str, Tensor]) -> Trained:
        plan, bench = self.bench.plan, self.bench
        examples = self.data().train
        steps = local_steps(plan.training, len(examples))
        bench.load(start := unpack_state(adapter))
        done = train(
            bench.tuned,
            start,
            examples,
            plan.training,
            pad_id=bench.pad_id,
            seed=derive(plan.training.seed, "train", task.round, task.node),
            steps=steps,
            first_step=(task.round - 1) * steps,
            horizon=plan.training.rounds * steps,
            on_step=self.on_step,
        )
        update = pack_state(done.update, plan.delivery.dtype)
        return Trained(update, len(examples), done.targets, done.steps, done.loss)

    def _evaluate(self, adapter: Mapping[str, Tensor]) -> Evaluated:
        bench, settings = self.bench, self.bench.plan.evaluation
        examples = self.data().held_out[: settings.examples]
        if not examples:
            return Evaluated(0, 0, 0.0, 0)
        bench.load(unpack_state(adapter))
        measured = evaluate(bench.tuned, examples, settings.batch_size, pad_id=bench.pad_id)
        return Evaluated(len(examples), measured.targets, measured.loss, measured.correct)
