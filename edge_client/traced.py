"""A training step that computes nothing: what it would hold in memory, and what it would have to do.

The very code that trains is run on tensors that have shapes and no content (`torch`'s FakeTensorMode), and every
storage is counted from where it is made to where it is given up. So there is no formula for a tuning method that could
be forgotten when the method changes: what it keeps for the way back, its optimiser's states, what is recomputed under
checkpointing, the logits that are there at a time, all is counted because it is made.

It takes a second or two and no memory to speak of, whatever the size of the model.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from farfield.emulator import assemble, backbone, few_bits, layout, stored
from farfield.emulator.architecture import checkpoint_blocks, describe
from farfield.emulator.descent import GradientDescent
from farfield.emulator.factors import shapes_at
from farfield.emulator.head import plain_head
from farfield.emulator.methods import Setting, Tuned, TuningMethod
from farfield.emulator.split import split
from farfield.kernels import perturb
from farfield.protocols.plan import Plan
from farfield.protocols.tensors import ITEM_BYTES, State

from .train import mean_loss, scored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_aten: Any = torch.ops.aten

_CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Work:
    """What operations take.

    Attributes:
        flops: of matrix products.
        moved: bytes that all other operations read and write.
        made: bytes of new tensors.
    """

    flops: float
    moved: float
    made: float


@dataclass(frozen=True, slots=True)
class Traced:
    """What training and evaluating by a Plan come to.

    Attributes:
        weights: bytes of the model with the tuning method installed.
        trained: how many values are trained.
        training: the most bytes that tensors and the states of the adapter have at once, the weights among them.
        evaluating, evaluating_one: the same of an evaluation in batches as the Plan has them, and one by one.
        step: the work of one optimiser step.
    """

    weights: int
    trained: int
    training: int
    evaluating: int
    evaluating_one: int
    step: Work


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages while they live, and the work of operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.flops = self.moved = self.made = 0.0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _content_free(func, args, kwargs or {})
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        for one in made:
            self._count(one.untyped_storage())
        self._work(func, args, kwargs or {}, result, made)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.made += size
        self.peak = max(self.peak, self.live)

    def _work(self, func: Any, args: Any, kwargs: Any, result: Any, made: list[torch.Tensor]) -> None:
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        elif not func.is_view:
            read = sum(one.nbytes for one in tree_leaves(args) if isinstance(one, torch.Tensor))
            self.moved += read + sum(one.nbytes for one in made)


def trace(plan: Plan, folder: Path, rank: int | None = None) -> Traced:
    """What a client comes to that works by `plan` on the backbone or emulator in `folder`; batches are full.

    Args:
        rank: of the adapter that a task brings, where a part of it is trained; None is that of `plan`.

    Raises:
        BackboneError, TuningError, EmulatorError: as `Bench` does.
    """
    with _no_content() as tally:
        tuned = _installed(plan, folder)
        weights = tally.live
        shapes = {name: tuple(one.shape) for name, one in tuned.trainable().items()}
        values = _count(shapes)
        whole = values if rank is None else _count(shapes_at(shapes, rank))
        # Outside of torch: what the task brings, and in the end what goes back.
        brought = ITEM_BYTES[plan.delivery.dtype] * whole
        sent = ITEM_BYTES[plan.delivery.dtype] * values
        if plan.protection.kind == "secagg":
            # A word for each value, of ranks that are not trained too, and beside it the update or the packed words.
            sent = 2 * ITEM_BYTES["float32"] * whole
        one, every = (_evaluating(tuned, _batch(plan, size), tally) for size in (1, plan.evaluation.batch_size))
        work = _training(tuned, plan, tally)
        training = max(tally.peak, tally.live + sent)
        if tuned.descent is None:
            training += brought  # which others give up once they have begun
    return Traced(weights, values, training, every + brought, one + brought, work)


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _evaluating(tuned: Tuned, batch: dict[str, torch.Tensor], tally: Tally) -> int:
    tally.peak = tally.live
    with torch.no_grad():
        scored(tuned, batch, _CPU)
    return tally.peak


def _training(tuned: Tuned, plan: Plan, tally: Tally) -> Work:
    """Make steps as `train` does, and return the work of one."""
    # From the second micro-batch on there is nothing new.
    group = [_batch(plan, plan.training.batch_size)] * min(plan.training.gradient_accumulation, 2)
    start: State = {name: np.broadcast_to(np.float32(0), tuple(one.shape)) for name, one in tuned.trainable().items()}
    tally.peak = tally.live
    make = tuned.descent or (lambda start, training, _: GradientDescent(tuned, start, training))
    descent = make(start, plan.training, plan.training.seed)
    tuned.model.train(tuned.descent is None)
    if tuned.before_training is not None:
        tuned.before_training()
    # An optimiser has its states from the first step on, and the second one meets all that is ever there.
    descent.step(0, plan.training.learning_rate, partial(_nothing, tuned))
    tally.flops = tally.moved = tally.made = 0.0
    descent.step(1, plan.training.learning_rate, partial(mean_loss, tuned, group, 1, _CPU))
    times = plan.training.gradient_accumulation / len(group)
    return Work(times * tally.flops, times * tally.moved, times * tally.made)


def _nothing(tuned: Tuned, backward: bool) -> float:
    for parameter in tuned.trainable().values() if backward else ():
        parameter.grad = torch.zeros_like(parameter)
    return 1.0


def _installed(plan: Plan, folder: Path) -> Tuned:
    assert isinstance(plan.tuning, TuningMethod)
    model, blocks = _model(plan, folder)
    steps = plan.training.rounds * plan.training.steps if plan.training.steps else None
    tuned = plan.tuning.install(model, Setting(plan.model.task, plan.training.seed, steps, blocks))
    if plan.training.checkpointing:
        checkpoint_blocks(model)
    return replace(tuned, head=plain_head(tuned.model))


def _model(plan: Plan, folder: Path) -> tuple[PreTrainedModel, tuple[int, ...] | None]:
    """The model that a `Bench` would load, without content, and the blocks of it that may be tuned."""
    config, kind = backbone.model_class(folder, task=plan.model.task, labels=plan.model.labels)
    attention = backbone.attention(_CPU, plan.data.max_length)
    number_format = getattr(torch, plan.model.dtype)
    outer: tuple[int, ...] | None = None
    with backbone.silent_transformers():
        if layout.is_emulator(folder):
            inside = layout.read(folder).layout
            config.dtype, outer = number_format, inside.outer
            model = assemble.skeleton(config, inside, kind, attention)
            own = assemble.fixed(model)
            content = {
                name: torch.empty(shape, dtype=number_format if dtype.is_floating_point and name not in own else dtype)
                for name, (shape, dtype) in stored.held(folder / stored.WEIGHTS).items()
            }
            model = assemble.fill(model, content)
        else:
            model = cast("Any", kind)._from_config(config, dtype=number_format, attn_implementation=attention)
            if plan.delivery.ends is not None:
                parts = split(len(describe(model).blocks), plan.delivery.ends, folder)
                outer = layout.Layout(parts, tuple(parts.middle)).outer
    if plan.model.quantization != "none":
        few_bits.round_layers(model, plan.model.quantization, outer if layout.is_emulator(folder) else None)
    return model.requires_grad_(False).eval(), outer


def _batch(plan: Plan, size: int) -> dict[str, torch.Tensor]:
    ids = torch.ones(size, plan.data.max_length, dtype=torch.long)
    labels = ids if plan.model.task == "causal-lm" else ids[:, 0].clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@contextmanager
def _no_content() -> Iterator[Tally]:
    """Within it whatever tensor is made has no content, and is counted."""
    from_numpy = mock.patch.object(torch, "from_numpy", _empty_like)
    # Modules that change their number format swap their parameters, which is impossible while somebody watches them.
    swap = mock.patch.object(torch.utils, "swap_tensors", _take_over)
    # It works in place, a small piece at a time; what it would draw for all weights takes long and changes no size.
    draw = mock.patch.object(perturb, "add_", lambda tensor, *_, **__: tensor)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with from_numpy, swap, draw, torch.random.fork_rng(devices=[]), fake, Tally() as tally:
        yield tally


def _empty_like(array: NDArray[Any]) -> torch.Tensor:
    return torch.empty(array.shape, dtype=getattr(torch, str(array.dtype)))


def _take_over(one: torch.Tensor, other: torch.Tensor) -> None:
    one.data = other.data


def _content_free(func: Any, args: Any, kwargs: Any) -> Any:
    """What `func` gives, with an answer of ours where it would look at content: every token is predicted."""
    if func is _aten._local_scalar_dense.default:
        return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
    if func is _aten.equal.default:
        return True
    if func is _aten.index.Tensor and _mask(args[1]) is not None:
        return _flat(args[0], args[1][0]).clone()
    if func in (_aten.index_put.default, _aten.index_put_.default) and _mask(args[1]) is not None:
        return args[0] if func is _aten.index_put_.default else args[0].clone()
    return func(*args, **kwargs)


def _mask(indices: list[torch.Tensor | None]) -> torch.Tensor | None:
    first = indices[0]
    return first if len(indices) == 1 and first is not None and first.dtype == torch.bool else None


def _flat(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values.reshape(mask.numel(), *values.shape[mask.ndim :])
