"""What bounds the updates of a round: a range for the values of each tensor, and a norm for the whole of it.

Both follow what was learnt before, from sums that are known anyway; so they belong to a run's state, and a checkpoint
keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from farfield.protocols.plan import Plan
from farfield.protocols.privacy import clipping
from farfield.protocols.tensors import State

from .releasing import Aggregate

HEADROOM: Final = 8.0
"""By how much a client's values may be larger than those of the last aggregate before they are clipped: single updates
are larger than their mean, in which noise and differences cancel out.
"""

FINEST: Final = 2.0**-10
"""Of the Plan's range: below it a range does not shrink, so that one still round does not clip the next."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the next round keeps to.

    Attributes:
        ranges: largest magnitude of the values of each tensor, by name; empty where nothing is encoded.
        clipping_norm: L2 norm of a whole update; None where the Plan does not bound one.
    """

    ranges: Mapping[str, float] = field(default_factory=dict)
    clipping_norm: float | None = None


def first(plan: Plan, adapter: State) -> Bounds:
    """The bounds before anything is known."""
    norm = plan.privacy.clipping_norm if plan.privacy.kind == "client" else None
    if plan.protection.kind != "secagg":
        return Bounds(clipping_norm=norm)
    return Bounds({name: _widest(plan, norm) for name in adapter}, norm)


def following(plan: Plan, bounds: Bounds, aggregate: Aggregate) -> Bounds:
    """The bounds after a round that came to `aggregate`."""
    norm, ranges = bounds.clipping_norm, dict(bounds.ranges)
    if norm is not None and aggregate.within is not None:
        norm = clipping.next_norm(norm, aggregate.within, plan.privacy.target_quantile, plan.privacy.quantile_rate)
    # Steps of a method's own have a bound that is exact, and what they change differs from client to client: a value of
    # FedKSeed that one client moves is a small part of itself in the mean.
    if ranges and plan.protection.adapt_range and plan.tuning.by_gradient:
        widest = _widest(plan, norm)
        for name, change in aggregate.update.items():
            near = HEADROOM * float(np.abs(change).max(initial=0.0))
            ranges[name] = min(widest, max(near, widest * FINEST))
    return Bounds(ranges, norm)


def _widest(plan: Plan, norm: float | None) -> float:
    assert plan.value_range is not None
    return plan.value_range if norm is None else min(plan.value_range, norm)
