"""Scores of membership from losses alone: how much it looks as if an example was trained on.

Every score is higher the more it speaks for membership, and is made without knowing who is a member. Losses are means
over an example's targets, in nats, so that e^(−loss) is the geometric mean of the targets' probabilities.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Flags: TypeAlias = NDArray[np.bool_]

_SMALLEST = 1e-9
"""A loss below it counts as that much: a probability of one has no finite logit."""


def loss_difference(initial: Floats, released: Floats) -> Floats:
    """How far the loss fell in training, float64[n].

    The attack of Yeom et al. (2018, "Privacy risk in machine learning") takes the loss itself; measured from the loss
    before training, an example that is easy for everybody does not count as a member.
    """
    return initial - released


def lira(released: Floats, shadows: Floats, trained: Flags) -> Floats:
    """The likelihood ratio attack, online (Carlini et al. 2022, algorithm 1), float64[n].

    The logit of each example's probability is taken for Gaussian among the shadow models that were trained on it, and
    among those that were not; the score is the logarithm of the ratio of the two densities at the released model. Each
    example has its own two means. With as few models as here its own variances would be noise, so each of the two is
    one for all examples (section VI-C there).

    Args:
        released: float64[n], losses under the model that is attacked.
        shadows: float64[k, n], under each shadow model.
        trained: bool[k, n], which of them were trained on which example: each example by one at least, and not by one.
    """
    at, logits = _logit(released), _logit(shadows)
    inside, spread_inside = _gaussians(logits, trained)
    outside, spread_outside = _gaussians(logits, ~trained)
    return _log_density(at, inside, spread_inside) - _log_density(at, outside, spread_outside)


def lira_offline(released: Floats, shadows: Floats, trained: Flags) -> Floats:
    """The same from the models alone that were not trained on an example (eq. 4 there), float64[n].

    It is by how many standard deviations the logit is above their mean, of which the paper's probability is a growing
    function.
    """
    mean, spread = _gaussians(_logit(shadows), ~trained)
    return (_logit(released) - mean) / spread


def rmia(released: Floats, shadows: Floats) -> Floats:
    """The robust membership inference attack, online (Zarifzadeh et al. 2024, eq. 4 and 9), float64[n], from 0 to 1.

    With p(x) an example's probability under the released model and p̄(x) its mean under all shadow models, of which half
    were trained on it, the score is the share of the population z with

        (p(x) / p̄(x)) / (p(z) / p̄(z)) ≥ γ.

    The population are the other examples that are to be judged, which an attacker has too. γ is 1: means over many
    targets hardly differ between models, so that ratios are close to 1.

    Args:
        released: float64[n], n > 1.
        shadows: float64[k, n]; each example was trained on by half of them.
    """
    smallest = shadows.min(axis=0)
    ratio = -released + smallest - np.log(np.exp(smallest - shadows).mean(axis=0))
    beaten = np.searchsorted(np.sort(ratio), ratio, side="right") - 1
    share: Floats = beaten / (len(ratio) - 1)
    return share


def _logit(losses: Floats) -> Floats:
    """ln p − ln(1 − p) of p = e^(−loss)."""
    kept: Floats = np.maximum(losses, _SMALLEST)
    return -kept - np.log(-np.expm1(-kept))


def _gaussians(logits: Floats, chosen: Flags) -> tuple[Floats, float]:
    """The mean of each example's chosen logits, float64[n], and the standard deviation around them, one for all.

    With one logit for each example nothing is known of it, and it is taken for 1, which leaves their order as it is.
    """
    counts = chosen.sum(axis=0)
    mean = np.where(chosen, logits, 0.0).sum(axis=0) / counts
    squares = float((np.where(chosen, logits - mean, 0.0) ** 2).sum())
    freedom = int((counts - 1).sum())
    return mean, max((squares / freedom) ** 0.5, _SMALLEST) if freedom else 1.0


def _log_density(at: Floats, mean: Floats, spread: float) -> Floats:
    density: Floats = -(((at - mean) / spread) ** 2) / 2 - np.log(spread)
    return density
