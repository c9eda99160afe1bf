"""Gaussian noise on a sum, once, by whoever computed it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from farfield.protocols.errors import PrivacyError
from farfield.protocols.randomness import Randomness

from .noise import WIDE_SIGMA, wide_gaussian

_BLOCK: Final = 1 << 16


def noised(
    sums: Mapping[str, NDArray[np.float64]],
    bound: float,
    noise_multiplier: float,
    random: Randomness,
    *,
    slack: float = 0.0,
) -> dict[str, NDArray[np.float64]]:
    """The sums with Gaussian noise of `deviation(…)`, about `noise_multiplier` · `bound`, on every value.

    Each sum is put on a grid whose step is that deviation divided by `WIDE_SIGMA`, and the noise is an integer of it:
    what comes out is a multiple of a step that no data decide, so its last bits give nothing away (Mironov 2012).

    Args:
        sums: float64 of any shape. What one unit can change them by, over all of them together, is at most `bound` in
            L2, and `slack` more for rounding before and while they were summed (`rounding_slack`, `summing_slack`).

    Raises:
        PrivacyError: a value is not finite or is too large for the grid, or there is no room for the rounding.
    """
    size = sum(values.size for values in sums.values())
    step = deviation(size, bound, noise_multiplier, slack=slack) / WIDE_SIGMA
    return {name: _noised(values, step, random) for name, values in sums.items()}


def deviation(size: int, bound: float, noise_multiplier: float, *, slack: float = 0.0) -> float:
    """Standard deviation of the noise for `size` values: z·(`bound` + `slack` + the grid's own rounding, step·√`size`).

    Raises:
        PrivacyError: `size` is so large, or the noise so strong, that rounding to the grid would outweigh the bound.
    """
    rounding = noise_multiplier * math.sqrt(size) / WIDE_SIGMA
    if rounding > 0.5:
        raise PrivacyError(
            f"{size:,} values with a noise multiplier of {noise_multiplier:g} are too many for one release",
            where="privacy.noise_multiplier",
        )
    return noise_multiplier * (bound + slack) / (1 - rounding)


def rounding_slack(sizes: Mapping[str, int], steps: Mapping[str, float]) -> float:
    """What rounding a client's values to multiples of `steps`, tensor by tensor, can add to its L2 norm."""
    return math.sqrt(sum(size * steps[name] ** 2 for name, size in sizes.items()))


def summing_slack(terms: int, bound: float, roundoff: float = 2.0**-53) -> float:
    """What rounding in a sum of `terms` vectors, each within `bound`, can add to what one of them changes it by in L2.

    `roundoff` is the unit roundoff u of the sum's numbers: 2⁻⁵³ for float64, 2⁻²⁴ for float32. Each of the additions
    is off by u times a partial sum, which is within `terms` · `bound`, and there are two sums to compare.
    """
    return 2 * terms**2 * bound * roundoff


def _noised(values: NDArray[np.float64], step: float, random: Randomness) -> NDArray[np.float64]:
    flat = np.array(values, np.float64).reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        block /= step
        np.rint(block, out=block)
        if not np.abs(block).max() < 2.0**62:  # nor is nan
            raise PrivacyError("a sum is not finite, or so large that no grid holds it", hint="Training diverged.")
        np.multiply(block.astype(np.int64) + wide_gaussian(block.size, random), step, out=block)
    return flat.reshape(np.shape(values))
