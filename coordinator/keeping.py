"""What a training round keeps of its updates: their weighted sum, or each of them.

A sum has the size of one update however many come. Views have the size of all of them together, and the rule works on
them in float32 once the round is closed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from farfield.protocols.errors import WireError
from farfield.protocols.messages import Trained
from farfield.protocols.plan import Plan
from farfield.protocols.privacy import central
from farfield.protocols.privacy.mechanism import ClientMechanism, mechanism
from farfield.protocols.summing import Sum, marks
from farfield.protocols.tensors import ITEM_BYTES, State, Tensor, unpack, unpack_state

from .aggregation import SumRule, ViewRule, weight_of
from .releasing import Aggregate, release

LARGEST_VIEWED: Final = 1e12
"""The largest magnitude in an update that is looked at: of products of two such values float32 holds large sums."""


class Keeping(ABC):
    """What is kept of updates whose names and shapes were found right."""

    @abstractmethod
    def check(self, trained: Trained) -> None:
        """Raises WireError unless the update's values are finite, and what is made of them will be."""

    @abstractmethod
    def add(self, node: str, trained: Trained) -> None:
        """Keep of the update what is to be kept."""

    @abstractmethod
    def aggregate(self) -> Aggregate:
        """What the updates came to, once; at least one was added."""


class KeptSum(Keeping):
    """The weighted sum, added up as updates come."""

    def __init__(
        self, plan: Plan, rule: SumRule, shapes: Mapping[str, tuple[int, ...]], nodes: int, clipping_norm: float | None
    ) -> None:
        """
        Args:
            shapes: of the sum. An update of a smaller rank is added where it belongs.
            nodes: how many updates there may be.
            clipping_norm: any longer update is clipped to it; None leaves them as they are.
        """
        self._plan, self._rule, self._shapes, self._nodes = plan, rule, shapes, nodes
        self._clipping_norm = clipping_norm
        made = mechanism(plan)
        self._made = made if isinstance(made, ClientMechanism) else None
        self._mark = marks(self._made, clipping_norm) if self._made and clipping_norm else np.zeros(0)
        self._marks = np.zeros(self._mark.size)
        # In single precision the order of the sum would change it by more than noise can well be made for.
        self._dtype = np.float32 if clipping_norm is None else np.float64
        self._sum: dict[str, NDArray[Any]] = {}
        self._weight = 0.0
        self._counted: list[str] = []
        self._examples = self._targets = self._steps = 0
        self._loss = 0.0

    def check(self, trained: Trained) -> None:
        # Half of what a sum of so many can hold: what is added is rounded.
        _check_values(trained, float(np.finfo(np.float32).max) / 2 / self._nodes / self._rule.weight(trained))

    def add(self, node: str, trained: Trained) -> None:
        weight = self._rule.weight(trained)
        scale = np.float32(weight)
        if self._clipping_norm is not None:
            scale *= np.float32(self._shortened(trained, self._clipping_norm))
        for name, tensor in trained.update.items():
            total = self._sum.setdefault(name, np.zeros(self._shapes[name], self._dtype))
            if tensor.shape == total.shape:
                for part, block in zip(_blocks(total), _unpacked(tensor), strict=True):
                    part += scale * block
            else:
                total[tuple(slice(size) for size in tensor.shape)] += scale * unpack(tensor)
        self._weight += weight
        self._counted.append(node)
        self._examples += trained.examples
        self._targets += trained.targets
        self._steps += trained.steps
        self._loss += trained.loss * trained.targets

    def aggregate(self) -> Aggregate:
        told = (self._weight, self._examples, self._targets, self._loss, self._steps)
        total, self._sum = Sum(self._sum, *told, mark=self._marks, slack=self._slack), {}
        return release(self._plan, self._rule, total, tuple(self._counted), self._clipping_norm)

    @property
    def _slack(self) -> float:
        """What the order of the sum can change it by, where it matters."""
        if self._made is None or self._clipping_norm is None:
            return 0.0
        return central.summing_slack(len(self._counted), self._made.bound(self._clipping_norm))

    def _shortened(self, trained: Trained, norm: float) -> float:
        """The factor that brings the update within `norm`: its client has clipped it, but need not have."""
        blocks = (block for tensor in trained.update.values() for block in _unpacked(tensor))
        before = math.sqrt(sum(float(np.square(block, dtype=np.float64).sum()) for block in blocks))
        self._marks += -self._mark if trained.clipped else self._mark
        return 1.0 if before <= norm else norm / before * (1 - 2.0**-22)


class KeptViews(Keeping):
    """All updates as they came, for a rule that must see each; taken in the order of their nodes, however they come."""

    def __init__(self, plan: Plan, rule: ViewRule, adapter: State) -> None:
        """`adapter`: what the round began with."""
        self._plan, self._rule, self._adapter = plan, rule, adapter
        self._trained: dict[str, Trained] = {}

    def check(self, trained: Trained) -> None:
        _check_values(trained, LARGEST_VIEWED)

    def add(self, node: str, trained: Trained) -> None:
        self._trained[node] = trained

    def aggregate(self) -> Aggregate:
        views, self._trained = dict(sorted(self._trained.items())), {}
        weights = {node: weight_of(self._plan.aggregation, trained) for node, trained in views.items()}
        updates = {node: unpack_state(trained.update) for node, trained in views.items()}
        combined = self._rule.combine(self._adapter, updates, weights)
        targets = sum(trained.targets for trained in views.values())
        loss = sum(trained.loss * trained.targets for trained in views.values())
        return Aggregate(
            update=combined.update,
            loss=loss / targets if targets else None,
            clients=tuple(views),
            examples=sum(trained.examples for trained in views.values()),
            targets=targets,
            steps=sum(trained.steps for trained in views.values()),
            lost=combined.lost,
        )


def _check_values(trained: Trained, largest: float) -> None:
    for name, tensor in trained.update.items():
        if not all((np.abs(block) <= largest).all() for block in _unpacked(tensor)):  # of NaN, too
            raise WireError(f"the update has values that are not finite, or too large to add, first in {name!r}")


_BLOCK: Final = 1 << 18


def _blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Views that together are `array`: what is computed from one is small, however large the array."""
    flat = array.reshape(-1)
    return (flat[at : at + _BLOCK] for at in range(0, flat.size, _BLOCK))


def _unpacked(tensor: Tensor) -> Iterator[NDArray[np.float32]]:
    """The values of `tensor` in blocks of the same sizes."""
    raw, size = memoryview(tensor.data), ITEM_BYTES[tensor.dtype]
    for at in range(0, len(raw), _BLOCK * size):
        block = raw[at : at + _BLOCK * size]
        yield unpack(Tensor(tensor.dtype, (len(block) // size,), block))
