"""What is added up in a secure aggregation: the subject that all must agree on, and the layout of a client's vector.

A vector of a training round holds the update, each value in fixed point over its tensor's range, and then the counts
that belong to it: how many examples, targets and steps there were, the loss, and the weight. The update is multiplied
by the client's weight before it is encoded, so that the sums give the weighted mean:

    Σ wₖ Δₖ  and  Σ wₖ,   where  wₖ = min(examples, weight_limit)  or 1

Where the Plan protects whole clients (`privacy.kind = "client"`), counts would say more than ε allows: the vector is
the clipped update and nothing else, but for a mark by which an adaptive clipping norm follows how many were clipped. A
round that evaluates has counts alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import codec
from . import messages_pb2 as pb
from .errors import MalformedMessage, SecAggError
from .plan import Plan
from .privacy import central, distributed
from .privacy.distributed import Design
from .privacy.mechanism import ClientMechanism, mechanism
from .randomness import Randomness
from .secagg import fixedpoint
from .secagg.parameters import at_most
from .sections import SMALLEST_SUM
from .tensors import Arrays

Purpose: TypeAlias = Literal["train", "evaluate"]
Words: TypeAlias = "NDArray[np.uint32] | NDArray[np.uint16]"
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

LOSS_UNIT: Final = 2.0**-12
"""Losses travel as whole multiples of this many nats, summed over their targets."""

_MEASURED: Final = ("examples", "targets", "loss", "correct")
_TRAINED: Final = ("examples", "targets", "loss", "steps", "weight")


@dataclass(frozen=True, slots=True)
class Subject:
    """What the participants of one aggregation agree on. Only those who were told the same add to the same sum.

    Attributes:
        plan: SHA-256 of the Plan's canonical bytes.
        backbone, frozen: as in the run's charter, raw.
        adapter: SHA-256 of the adapter that is trained from or measured.
        clipping_norm: L2 norm that no client's update exceeds; None where nothing bounds it.
        ranges: the largest magnitude of the values of each tensor of the update, in the order of their names.
    """

    plan: bytes
    backbone: bytes
    frozen: bytes
    purpose: Purpose
    adapter: bytes
    clipping_norm: float | None
    ranges: tuple[float, ...]

    @property
    def digest(self) -> bytes:
        """SHA-256 of the encoded subject: what a session of secure aggregation is opened with."""
        return hashlib.sha256(self.encode()).digest()

    def encode(self) -> bytes:
        message = pb.Subject(
            plan_digest=self.plan,
            backbone=self.backbone,
            frozen=self.frozen,
            purpose=self.purpose,
            adapter=self.adapter,
            clipping_norm=self.clipping_norm,
            ranges=self.ranges,
        )
        return message.SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> Subject:
        """Raises WireError when `raw` is no subject."""
        message = codec.parse(pb.Subject(), raw)
        norm = message.clipping_norm if message.HasField("clipping_norm") else None
        for value in (*message.ranges, *(() if norm is None else (norm,))):
            if not 0 < value < math.inf:
                raise MalformedMessage(f"a range of ±{value}")
        purposes: dict[str, Purpose] = {"train": "train", "evaluate": "evaluate"}
        if message.purpose not in purposes:
            raise MalformedMessage("an aggregation for no known purpose")
        return cls(
            message.plan_digest,
            message.backbone,
            message.frozen,
            purposes[message.purpose],
            message.adapter,
            norm,
            tuple(message.ranges),
        )


@dataclass(frozen=True, slots=True)
class Part:
    """What one client adds.

    Attributes:
        update: float32 by name; empty where the client only measured.
        loss: in nats, summed over the targets.
        clipped: whether the update was longer than the clipping norm.
    """

    update: Arrays = field(default_factory=dict)
    examples: int = 0
    targets: int = 0
    loss: float = 0.0
    steps: int = 0
    correct: int = 0
    clipped: bool = False


@dataclass(frozen=True, slots=True)
class Sum:
    """What the parts come to.

    Attributes:
        update: Σ wₖ Δₖ by name; float64 where noise is still to come.
        weight: Σ wₖ.
        loss: in nats, summed over all targets.
        mark: the sum of what was appended, see `marks`.
        slack: by how much, in L2, rounding can have lengthened what one client added.
    """

    update: Mapping[str, NDArray[np.floating[Any]]]
    weight: float
    examples: int = 0
    targets: int = 0
    loss: float = 0.0
    steps: int = 0
    correct: int = 0
    mark: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    slack: float = 0.0


class Layout(Protocol):
    """Where everything stands in a vector of `length` words modulo 2^`modulus_bits`."""

    @property
    def modulus_bits(self) -> int: ...
    @property
    def length(self) -> int: ...

    def pack(self, part: Part, random: Randomness) -> Words:
        """The client's vector. Raises SecAggError when the part does not fit."""
        ...

    def read(self, total: Words, clients: int) -> Sum:
        """What the sum of the vectors of `clients` clients says."""
        ...


def smallest_sum(plan: Plan, clients: int) -> int:
    """The fewest of `clients` whose sum is opened; noise in shares is made for this number."""
    return max(plan.cohort.minimum, SMALLEST_SUM, -(-2 * clients // 3))


def layout(plan: Plan, subject: Subject, shapes: Shapes, clients: int, survivors: int) -> Layout:
    """The layout that follows from public values, at every participant alike.

    Args:
        shapes: of the update's tensors, by name; empty where nothing is trained.
        clients: how many are asked, and `survivors` the fewest whose sum may be opened.

    Raises:
        SecAggError: so many clients cannot be added up with this precision, or the subject does not fit the shapes.
        PrivacyError: so much noise does not fit the modulus.
    """
    if len(subject.ranges) != len(shapes):
        raise SecAggError(f"ranges for {len(subject.ranges)} tensors, and the update has {len(shapes)}")
    if plan.privacy.kind != "client" or subject.purpose == "evaluate":
        counts = _TRAINED if subject.purpose == "train" else _MEASURED
        return FixedPoint(plan, subject.ranges, shapes, clients, counts, np.zeros(0, np.float32))
    made = mechanism(plan)
    norm = subject.clipping_norm
    if not isinstance(made, ClientMechanism) or norm is None:
        raise SecAggError("a sum of whole clients, without the norm that bounds them")
    if made.noise == "central":
        return FixedPoint(plan, subject.ranges, shapes, clients, (), marks(made, norm))
    size = sum(map(math.prod, shapes.values()))
    mark = marks(made, norm, 1 if made.counted is None else made.counted.copies(size))
    # Those who work together know their own shares of the noise, so it has to be enough without them.
    honest = max(1, survivors - at_most(plan.protection.corrupt, clients))
    design = distributed.smallest(size + mark.size, clients, honest, made.noise_multiplier)
    return Noised(shapes, design, made.bound(norm), mark)


def marks(made: ClientMechanism, norm: float, copies: int = 1) -> NDArray[np.float32]:
    """What a client whose update is within `norm` appends to it, and one whose was not, negative; often nothing."""
    return np.zeros(0, np.float32) if made.counted is None else made.counted.coordinates(0.0, norm, copies)


_LARGEST: Final = 2**48 - 1


class FixedPoint:
    """An update in fixed point, then counts as whole numbers, or the one value that follows a clipping norm."""

    def __init__(
        self,
        plan: Plan,
        ranges: tuple[float, ...],
        shapes: Shapes,
        clients: int,
        counts: tuple[str, ...],
        mark: NDArray[np.float32],
    ) -> None:
        """`mark`: what is appended, see `marks`."""
        self._plan, self._shapes, self._clients = plan, shapes, clients
        self._ranges = dict(zip(sorted(shapes), ranges, strict=True))
        self._counts, self._mark = counts, mark
        self.modulus_bits, self._levels = fixedpoint.choose_modulus(clients, plan.protection.bits)
        self._values = sum(map(math.prod, shapes.values()))
        self._limbs = fixedpoint.count_limbs(_LARGEST, clients, self.modulus_bits)

    @property
    def length(self) -> int:
        return self._values + self._mark.size + len(self._counts) * self._limbs

    def pack(self, part: Part, random: Randomness) -> Words:
        _check_shapes(part, self._shapes)
        if not math.isfinite(part.loss):
            raise SecAggError(f"a loss of {part.loss}, which cannot be added up", hint="Training diverged.")
        words = fixedpoint.zeros(self.length, self.modulus_bits)
        weight = self._weight(part)
        scale = np.float32(weight / self._plan.protection.weight_limit if self._weighted else 1)
        at = 0
        for name in sorted(self._shapes):
            values = part.update[name].reshape(-1)
            out = words[at : at + values.size]
            if not np.isfinite(values).all():
                raise SecAggError("an update with values that are not finite: training diverged", where=name)
            within = np.clip(values, -self._ranges[name], self._ranges[name]) * scale
            fixedpoint.encode(within, self._ranges[name], self._levels, out, random)
            at += values.size
        if self._mark.size:
            mark = -self._mark if part.clipped else self._mark
            fixedpoint.encode(mark, self._largest_mark, self._levels, words[at : at + mark.size], random)
            at += mark.size
        told = {
            "examples": part.examples,
            "targets": part.targets,
            "loss": round(part.loss / LOSS_UNIT),
            "steps": part.steps,
            "correct": part.correct,
            "weight": weight,
        }
        for name in self._counts:
            if not 0 <= told[name] <= _LARGEST:
                raise SecAggError(f"a count of {told[name]} {name}, which no sum has room for")
            words[at : at + self._limbs] = fixedpoint.encode_count(
                told[name], self._clients, self.modulus_bits, self._limbs
            )
            at += self._limbs
        return words

    def read(self, total: Words, clients: int) -> Sum:
        update: dict[str, NDArray[np.float64]] = {}
        at = 0
        scale = self._plan.protection.weight_limit if self._weighted else 1
        for name, shape in sorted(self._shapes.items()):
            size = math.prod(shape)
            values = fixedpoint.decode(total[at : at + size], self.modulus_bits, self._ranges[name], self._levels)
            update[name] = np.multiply(values, scale, out=values).reshape(shape)
            at += size
        mark = np.zeros(0)
        if self._mark.size:
            taken = total[at : at + self._mark.size]
            mark = fixedpoint.decode(taken, self.modulus_bits, self._largest_mark, self._levels)
            at += self._mark.size
        told: dict[str, int] = {}
        for name in self._counts:
            told[name] = fixedpoint.decode_counts(total[at : at + self._limbs], self._clients, self.modulus_bits)
            at += self._limbs
        return Sum(
            update,
            weight=float(told.get("weight", clients)),
            examples=told.get("examples", 0),
            targets=told.get("targets", 0),
            loss=told.get("loss", 0) * LOSS_UNIT,
            steps=told.get("steps", 0),
            correct=told.get("correct", 0),
            mark=mark,
            slack=self._slack,
        )

    @property
    def _slack(self) -> float:
        sizes = {name: math.prod(shape) for name, shape in self._shapes.items()}
        steps = {name: self._ranges[name] / self._levels for name in sizes}
        if self._mark.size:
            sizes["(mark)"], steps["(mark)"] = self._mark.size, self._largest_mark / self._levels
        return central.rounding_slack(sizes, steps)

    @property
    def _largest_mark(self) -> float:
        return float(self._mark.max())

    @property
    def _weighted(self) -> bool:
        return self._plan.aggregation.weighting == "examples"

    def _weight(self, part: Part) -> int:
        return min(part.examples, self._plan.protection.weight_limit) if self._weighted else 1


class Noised:
    """A clipped update on an integer grid, with the client's share of the noise (`privacy.distributed`)."""

    def __init__(self, shapes: Shapes, design: Design, bound: float, mark: NDArray[np.float32]) -> None:
        """
        Args:
            bound: the L2 norm of a client's whole vector, at most.
            mark: as in `FixedPoint`.
        """
        self._shapes, self._design, self._bound, self._mark = shapes, design, bound, mark
        self.modulus_bits, self.length = design.modulus_bits, design.dimension

    def pack(self, part: Part, random: Randomness) -> Words:
        _check_shapes(part, self._shapes)
        pieces = [part.update[name].reshape(-1) for name in sorted(self._shapes)]
        pieces.append(-self._mark if part.clipped else self._mark)
        return distributed.encode(np.concatenate(pieces), self._bound, self._design, random)

    def read(self, total: Words, clients: int) -> Sum:
        values = distributed.decode(total, self._bound, self._design)
        update: dict[str, NDArray[np.float64]] = {}
        at = 0
        for name, shape in sorted(self._shapes.items()):
            update[name] = values[at : at + math.prod(shape)].reshape(shape)
            at += math.prod(shape)
        return Sum(update, float(clients), mark=values[at:])


def _check_shapes(part: Part, shapes: Shapes) -> None:
    if {name: change.shape for name, change in part.update.items()} != dict(shapes):
        raise SecAggError("an update of other tensors than the layout's")
