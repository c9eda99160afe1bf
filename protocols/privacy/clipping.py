"""Updates cut to an L2 norm, and a norm that follows the updates (Andrew et al. 2021, arXiv 1905.03871).

The adaptive norm C moves towards a quantile of the updates' norms, and needs the share of updates that are within it:
a sum of bits b, released with noise σ_b. Theorem 1 pays for both releases with one noise multiplier z: the updates get
z_Δ = (z⁻² − (2σ_b)⁻²)^(−1/2) instead. Here the bit travels in the same vector, as one more value (b − ½)·C·z_Δ/σ_b.
The longer vector has an L2 norm of at most C·z_Δ/z, and noise of z times that is z_Δ·C for each value of the update and
σ_b for the count: one release, with one noise, which secure aggregation carries like any other value.

Both norms hold for the float32 values that are sent, not only for those that were meant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farfield.protocols.errors import PrivacyError


def l2_norm(update: Mapping[str, NDArray[np.float32]]) -> float:
    """Over all values of all tensors together, in float64; inf or nan if one of them is."""
    squares = (np.square(tensor, dtype=np.float64).sum() for tensor in update.values())
    return math.sqrt(sum(float(square) for square in squares))


def clip(update: Mapping[str, NDArray[np.float32]], norm: float) -> tuple[dict[str, NDArray[np.float32]], float]:
    """The update scaled to an L2 norm of at most `norm` over all tensors together, and its norm before.

    An update that is within it comes back as it is. One that is not is multiplied by min(1, `norm` / its norm), less
    2⁻²², so that rounding to float32 cannot lift it over the bound again.

    Raises:
        PrivacyError: a value is not finite; no factor would bound such an update.
    """
    before = l2_norm(update)
    if not math.isfinite(before):
        raise PrivacyError("the update holds a value that is not finite", hint="Training diverged; nothing is sent.")
    if before <= norm:
        return {name: tensor.astype(np.float32) for name, tensor in update.items()}, before
    factor = np.float64(norm / before * (1 - 2.0**-22))  # of a huge update it is nothing that float32 holds exactly
    return {name: (tensor * factor).astype(np.float32) for name, tensor in update.items()}, before


@dataclass(frozen=True)
class CountedClipping:
    """How one noise multiplier z pays for the updates and for the count of those within the norm.

    Args:
        noise_multiplier: z, on which alone ε depends.
        count_noise: σ_b, the standard deviation of the noise on the count.

    Raises:
        PrivacyError: σ_b is not above z / 2, so that the count alone would spend more than z allows.
    """

    noise_multiplier: float
    count_noise: float

    def __post_init__(self) -> None:
        if 2 * self.count_noise <= self.noise_multiplier:
            raise PrivacyError(
                f"count_noise = {self.count_noise:g} leaves nothing for the updates at z = {self.noise_multiplier:g}",
                where="privacy.count_noise",
                hint=f"It has to be above {self.noise_multiplier / 2:g}; a twentieth of the cohort is usual.",
            )

    @property
    def update_noise(self) -> float:
        """z_Δ: the noise multiplier that the updates get (Andrew et al. 2021, thm 1)."""
        return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * self.count_noise) ** -2)

    def bound(self, norm: float) -> float:
        """C′ = C·z_Δ/z: the L2 norm of a clipped update together with its extra coordinate, at most."""
        return norm * self.update_noise / self.noise_multiplier

    def copies(self, dimension: int) -> int:
        """Over how many values the extra one is spread beside an update of `dimension`: one, or more in a large one.

        k values of 1/√k tell as much as one, and none of them stands out so far that clamping (`distributed.py`) or a
        range that fits the others would cut it: each is at most 16 times the root mean square that C′ allows.
        """
        return math.ceil(dimension * (self.noise_multiplier / (32 * self.count_noise)) ** 2)

    def coordinates(self, before: float, norm: float, copies: int = 1) -> NDArray[np.float32]:
        """float32[`copies`]: what a client appends to its update, of the L2 norm `before`, when `norm` is C."""
        value = math.copysign(0.5, norm - before) * self._unit(norm, copies)
        return np.full(copies, value * (1 - 2.0**-23), np.float32)  # rounded, it must not be longer than it was

    def share_within(self, totals: NDArray[np.float64], clients: int, norm: float) -> float:
        """The noisy share of `clients` whose updates were within `norm`, from the sum of what they appended."""
        return 0.5 + float(np.mean(totals)) / (self._unit(norm, totals.size) * clients)

    def _unit(self, norm: float, copies: int) -> float:
        return norm * self.update_noise / self.count_noise / math.sqrt(copies)


def next_norm(norm: float, share: float, quantile: float, rate: float) -> float:
    """C·exp(−η_C·(b̄ − γ)) (Andrew et al. 2021, alg. 1): up while fewer than the `quantile` are within it, else down."""
    return norm * math.exp(-rate * (share - quantile))
