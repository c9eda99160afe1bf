"""Noise in shares: every client adds some, and their sum hides each of them (Skellam; Agarwal et al. 2021).

A client's clipped vector is scaled to an integer grid and rounded at random; Skellam noise is added, and the whole is
reduced modulo 2^bits, ready to be masked. The sum of the noise of the smallest number of clients whose sum may be
opened is what the accountant counts; more clients make more noise. The coordinator never sees a sum without it.

Rounding can lengthen a vector. As Kairouz, Liu and Steinke 2021 ("The distributed discrete Gaussian mechanism",
arXiv 2102.06387, thm 1 and prop. 22), a client rounds again until its vector is within the bound B that the noise is
made for, so the guarantee does not rest on chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from farfield.protocols.errors import PrivacyError
from farfield.protocols.randomness import Randomness

from .accounting import SMALLEST_GRID_BOUND
from .noise import LARGEST_VARIANCE, skellam, skellam_tail

OVERFLOW_BITS: Final = 40
"""A sum wraps around, in any of its values, with a probability below 2⁻⁴⁰."""

MODULI: Final = (16, 24, 32)

_BETA: Final = math.exp(-2)
"""β of Kairouz et al.: a rounding is refused with at most this probability. Theirs is e^(−1/2); this one lengthens B by
less than one percent where B is smallest, and a client rounds 1.16 times on average at worst, not 2.5 times."""

_TRIES: Final = 64  # β⁶⁴ = 2⁻¹⁸⁴
_SPREAD: Final = 64  # a value may be this many times the root mean square of its vector before it is cut
_FINE: Final = 5  # a grid norm of 5·√d makes rounding lengthen a vector by one percent; finer gains nothing
_BLOCK: Final = 1 << 16


@dataclass(frozen=True)
class Design:
    """How vectors become integers, how much noise each client adds, and what fits: the same for all who compute it.

    Attributes:
        dimension: d, values in a vector.
        clients: n, how many may contribute.
        survivors: m, the fewest whose sum is opened: m shares make the noise that is accounted for. To count only on
            the noise of honest clients, give the number of honest ones among the fewest.
        modulus_bits: 16, 24 or 32.
        noise_multiplier: z.
        grid_norm: a vector of the L2 norm C has this one on the grid.
        grid_bound: B, the L2 norm of every rounded vector at most.
        share_variance: of the noise that each client adds; m of them make (z·B)² or a little more.
        limit: a value beyond ± this is cut to it.
    """

    dimension: int
    clients: int
    survivors: int
    modulus_bits: int
    noise_multiplier: float
    grid_norm: int
    grid_bound: int
    share_variance: int
    limit: int

    @property
    def inflation(self) -> float:
        """Noise on the sum of `survivors` clients, as a multiple of what central noise with the same z would be."""
        return math.sqrt(self.survivors * self.share_variance) / (self.noise_multiplier * self.grid_norm)

    def scale(self, bound: float) -> float:
        """Grid steps for one unit of a value, for vectors of the L2 norm `bound` (C, or C′ with counted clipping)."""
        return self.grid_norm / bound


@lru_cache(maxsize=64)
def design(dimension: int, clients: int, survivors: int, modulus_bits: int, noise_multiplier: float) -> Design:
    """The finest grid on which the sum of n clamped vectors and n shares of noise fits the modulus.

    n·`limit` + t ≤ 2^(bits − 1) − 1, where the noise of all n clients is beyond ±t in none of d values but with
    probability 2⁻⁴⁰ (`OVERFLOW_BITS`; Chernoff and a union bound).

    Raises:
        PrivacyError: nothing fits, or only a grid so coarse that B would be under `SMALLEST_GRID_BOUND`.
    """
    possible = 1 <= survivors <= clients and dimension >= 1 and 0 < noise_multiplier < math.inf
    if not possible or modulus_bits not in MODULI:
        raise PrivacyError(
            f"no sum of {survivors} to {clients} vectors of {dimension} values modulo 2^{modulus_bits} "
            f"with noise multiplier {noise_multiplier:g}"
        )

    def made(grid_norm: int) -> Design:
        bound = _rounded_bound(grid_norm, dimension)
        variance = math.ceil((noise_multiplier * bound) ** 2 / survivors)
        limit = min(grid_norm, _SPREAD * grid_norm / math.sqrt(dimension))
        return Design(
            dimension, clients, survivors, modulus_bits, noise_multiplier, grid_norm, bound, variance, math.ceil(limit)
        )

    finest = max(4 * SMALLEST_GRID_BOUND, math.ceil(_FINE * math.sqrt(dimension)))
    grid_norm = _last(lambda grid_norm: _fits(made(grid_norm)), finest)
    if not grid_norm or made(grid_norm).grid_bound < SMALLEST_GRID_BOUND:
        raise PrivacyError(
            f"the noise of {clients} clients on {dimension:,} values does not fit {modulus_bits} bits "
            f"at a noise multiplier of {noise_multiplier:g}",
            where="privacy.noise",
            hint='Use a larger modulus, or noise = "central".' if modulus_bits < MODULI[-1] else "",
        )
    return made(grid_norm)


def smallest(dimension: int, clients: int, survivors: int, noise_multiplier: float, inflation: float = 1.25) -> Design:
    """The design with the smallest modulus that makes the noise at most `inflation` times what central noise would be.

    Raises:
        PrivacyError: not even the largest modulus does.
    """
    for modulus_bits in MODULI:
        try:
            found = design(dimension, clients, survivors, modulus_bits, noise_multiplier)
        except PrivacyError:
            continue
        if found.inflation <= inflation:
            return found
    raise PrivacyError(
        f"no modulus holds the noise of {clients} clients on {dimension:,} values "
        f"at a noise multiplier of {noise_multiplier:g}",
        where="privacy.noise",
        hint='Use noise = "central", fewer clients in a round or a larger smallest number of them.',
    )


def encode(
    values: NDArray[np.float32], bound: float, design: Design, random: Randomness
) -> NDArray[np.uint16] | NDArray[np.uint32]:
    """A clipped vector as noisy integers modulo 2^bits: uint16 for 16 bits, else uint32.

    Args:
        values: float32[d], with an L2 norm of at most `bound`.

    Raises:
        PrivacyError: the vector has another length, is longer than `bound`, or has a value that is not finite.
    """
    if values.shape != (design.dimension,):
        raise PrivacyError(f"{values.shape} values where the design is for {design.dimension:,}")
    rounded = _rounded(values, design.scale(bound), design, random)
    encoded: NDArray[np.uint16] | NDArray[np.uint32]
    encoded = np.empty(len(values), np.uint16) if design.modulus_bits == 16 else np.empty(len(values), np.uint32)
    mask = (1 << design.modulus_bits) - 1
    for start in range(0, design.dimension, _BLOCK):
        block = slice(start, min(start + _BLOCK, design.dimension))
        noise = skellam(block.stop - start, float(design.share_variance), random)
        noise += rounded[block]
        noise &= mask
        encoded[block] = noise
    return encoded


def decode(total: NDArray[np.uint16] | NDArray[np.uint32], bound: float, design: Design) -> NDArray[np.float64]:
    """The noisy sum of the vectors, from the sum of what `encode` made of them modulo 2^bits."""
    half, modulus = 1 << (design.modulus_bits - 1), 1 << design.modulus_bits
    centred = ((total.astype(np.int64) + half) & (modulus - 1)) - half
    return centred / design.scale(bound)


def _rounded(values: NDArray[np.float32], scale: float, design: Design, random: Randomness) -> NDArray[np.int32]:
    """The values on the grid, cut to ±limit, rounded up or down at random without bias, again until within B."""
    scaled = np.multiply(values, scale, dtype=np.float32)
    norm = math.sqrt(_squares(scaled))
    if not norm <= design.grid_norm * (1 + 1e-4):
        raise PrivacyError(
            f"an update of {norm / design.grid_norm:.4g} times the clipping norm, which was to be clipped before"
        )
    np.clip(scaled, -design.limit, design.limit, out=scaled)
    rounded = np.empty(len(values), np.int32)
    for _ in range(_TRIES):
        squares = 0
        for start in range(0, len(values), _BLOCK):
            block = scaled[start : start + _BLOCK]
            thresholds = random.words32(len(block)) * 2.0**-32
            thresholds += block
            whole = np.floor(thresholds, out=thresholds)
            squares += int(np.dot(whole, whole))
            rounded[start : start + _BLOCK] = whole
        if squares <= design.grid_bound**2:
            return rounded
    raise PrivacyError("no rounding of the update is within its bound, which is next to impossible for a clipped one")


def _squares(values: NDArray[np.float32]) -> float:
    total = 0.0
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK].astype(np.float64)
        total += float(np.dot(block, block))
    return total


def _rounded_bound(grid_norm: int, dimension: int) -> int:
    """B for vectors of L2 norm ‖x‖ = `grid_norm` (Kairouz et al. 2021, arXiv 2102.06387, thm 1), rounded up.

    B² = min((‖x‖ + √d)², ‖x‖² + d/4 + √(2·ln 1/β)·(‖x‖ + √d/2)).
    """
    root = math.sqrt(dimension)
    likely = grid_norm**2 + dimension / 4 + math.sqrt(2 * math.log(1 / _BETA)) * (grid_norm + root / 2)
    return math.ceil(min(grid_norm + root, math.sqrt(likely)))


def _fits(design: Design) -> bool:
    room = (1 << (design.modulus_bits - 1)) - 1 - design.clients * design.limit
    if room <= 0 or design.share_variance > LARGEST_VARIANCE:
        return False
    tail = skellam_tail(float(design.clients * design.share_variance), OVERFLOW_BITS + math.log2(design.dimension))
    return tail <= room


def _last(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` for which `holds`, or 0; it holds for all below one for which it does."""
    if holds(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
