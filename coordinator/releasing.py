"""From the sum of a round to what is known of it: noise where the Plan promises it, then the aggregation rule.

Here, and nowhere else, a sum that no noise covers becomes one that may be looked at; where the clients have added the
noise themselves (`privacy.noise = "distributed"`) it came in that way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from farfield.protocols.plan import Plan
from farfield.protocols.privacy import central
from farfield.protocols.privacy.mechanism import ClientMechanism, mechanism
from farfield.protocols.randomness import Randomness
from farfield.protocols.summing import Sum
from farfield.protocols.tensors import State

from .aggregation import SumRule

_MARK: Final = "(mark)"


@dataclass(frozen=True, slots=True)
class Aggregate:
    """What a training round came to.

    Attributes:
        update: Δ, the aggregated update, float32, by tensor name.
        loss: mean training loss of the counted clients in nats, weighted by their targets; None where it is not told.
        clients: nodes whose updates were counted.
        within: share of the updates that were not clipped, with its noise; None where the clipping norm is fixed.
        lost: share of what was to be combined that the update cannot hold (`aggregation.Combined`); None where the rule
            does not say.
    """

    update: State
    loss: float | None
    clients: tuple[str, ...]
    examples: int
    targets: int
    steps: int
    within: float | None = None
    lost: float | None = None


def release(plan: Plan, rule: SumRule, total: Sum, clients: tuple[str, ...], clipping_norm: float | None) -> Aggregate:
    """The aggregate of a round whose parts, of `clients`, sum up to `total`.

    Raises:
        PrivacyError: the noise cannot be added as the Plan wants it.
    """
    sums: Mapping[str, NDArray[Any]] = total.update
    within = None
    made = mechanism(plan)
    if isinstance(made, ClientMechanism):
        assert clipping_norm is not None
        mark = total.mark
        if made.noise == "central":
            together = {name: values.astype(np.float64, copy=False) for name, values in total.update.items()}
            together[_MARK] = total.mark
            bound = made.bound(clipping_norm)
            noised = central.noised(together, bound, made.noise_multiplier, Randomness(), slack=total.slack)
            mark = noised.pop(_MARK)
            sums = noised
        if made.counted is not None:
            within = made.counted.share_within(mark, len(clients), clipping_norm)
    update = {name: values.astype(np.float32, copy=False) for name, values in sums.items()}
    loss = total.loss / total.targets if total.targets else None
    finished = rule.finish(update, total.weight)
    return Aggregate(finished, loss, clients, total.examples, total.targets, total.steps, within)
