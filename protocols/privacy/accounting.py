"""What has been spent: ε at a δ, by two accountants.

Neighbouring datasets differ in one unit (an example, or a client) whose contribution is replaced by zero; how many
units there are is public ("zero-out", Kairouz et al. 2021, "Practical and private (deep) learning without sampling or
shuffling", def. 1.1). For what is released here it comes to the same as adding or removing the unit, so the accountants
are asked about that.

PLD (privacy loss distributions; Doroshenko et al. 2022, "Connect the dots") is tight to about four digits. RDP
(Mironov 2017) is looser, but knows the Skellam mechanism and is cheap. Both are upper bounds, so the smaller of the two
is claimed.

`dp_accounting` is imported where it is used: it brings scipy's statistics and takes a second.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from farfield.protocols.errors import PrivacyError

if TYPE_CHECKING:
    from dp_accounting import DpEvent

SMALLEST_GRID_BOUND: Final = 256
"""No client's vector of integers that is hidden by Skellam noise may be bound to a smaller L2 norm than this."""

_WHOLE: Final = (*np.arange(2.0, 64), *np.arange(64.0, 256, 8), *np.arange(256.0, 4097, 64))
_ORDERS: Final = (*np.arange(1.1, 10.95, 0.1), *np.arange(11.0, 64), 128.0, 256.0, 512.0, 1024.0)
_FINEST: Final = 1e-4
_DIGITS: Final = 10_000  # a noise multiplier is a whole number of ten thousandths
_LARGEST: Final = 10_000 * _DIGITS


class Release(ABC):
    """One thing that was let out, as the accountants see it. Values, so that equal ones can be counted."""

    noise_multiplier: float

    @abstractmethod
    def event(self) -> DpEvent | None:
        """What `dp_accounting` calls it; None where it knows no such mechanism."""

    @abstractmethod
    def rdp(self, orders: NDArray[np.float64]) -> NDArray[np.float64]:
        """ε of Rényi differential privacy at each of `orders`."""

    @abstractmethod
    def with_noise(self, noise_multiplier: float) -> Release:
        """The same with another noise multiplier."""


@dataclass(frozen=True)
class Gaussian(Release):
    """A sum with Gaussian noise, of `noise_multiplier` times what one unit can change it by (L2)."""

    noise_multiplier: float

    def event(self) -> DpEvent:
        from dp_accounting import GaussianDpEvent

        return GaussianDpEvent(self.noise_multiplier)

    def rdp(self, orders: NDArray[np.float64]) -> NDArray[np.float64]:
        return orders / (2 * self.noise_multiplier**2)

    def with_noise(self, noise_multiplier: float) -> Gaussian:
        return replace(self, noise_multiplier=noise_multiplier)


@dataclass(frozen=True)
class SampledGaussian(Release):
    """The same over a batch that has each unit with probability `sampling_rate`, drawn by itself and kept secret."""

    noise_multiplier: float
    sampling_rate: float

    def event(self) -> DpEvent:
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

        return PoissonSampledDpEvent(self.sampling_rate, GaussianDpEvent(self.noise_multiplier))

    def rdp(self, orders: NDArray[np.float64]) -> NDArray[np.float64]:
        from dp_accounting.rdp import RdpAccountant

        with _leaving_orders_out():
            return np.asarray(RdpAccountant(orders).compose(self.event()).rdp)

    def with_noise(self, noise_multiplier: float) -> SampledGaussian:
        return replace(self, noise_multiplier=noise_multiplier)


@dataclass(frozen=True)
class Skellam(Release):
    """A sum of integer vectors with Skellam noise: standard deviation `noise_multiplier` times their L2 bound Δ₂.

    The bound of Agarwal, Kairouz and Liu 2021 (arXiv 2110.04995) for many dimensions and whole orders α > 1, μ the
    variance:
    ε(α) ≤ α·Δ₂² / 2μ + min(((2α − 1)·Δ₂² + 6·Δ₁) / 4μ², 3·Δ₁ / 2μ). Integers have Δ₁ ≤ Δ₂², and μ = (z·Δ₂)², so
    ε(α) ≤ α / 2z² + min((2α + 5) / 4z⁴Δ₂², 3 / 2z²): it falls with Δ₂ and knows no dimension. `grid_bound` is the
    smallest Δ₂ there may be; with Δ₂ ≥ 256 nearly nothing separates this from the Gaussian.
    """

    noise_multiplier: float
    grid_bound: int = SMALLEST_GRID_BOUND

    def event(self) -> None:
        return None

    def rdp(self, orders: NDArray[np.float64]) -> NDArray[np.float64]:
        square = self.noise_multiplier**2
        discrete = np.minimum((2 * orders + 5) / (4 * square**2 * self.grid_bound**2), 3 / (2 * square))
        return orders / (2 * square) + discrete

    def with_noise(self, noise_multiplier: float) -> Skellam:
        return replace(self, noise_multiplier=noise_multiplier)


@dataclass(frozen=True)
class Spent:
    """(ε, δ) of everything together. `epsilon` is the one to claim; `epsilon_pld` is None where PLD knows no answer."""

    epsilon: float
    delta: float
    epsilon_rdp: float
    epsilon_pld: float | None
    accountant: str
    why_no_pld: str = ""


def spent(releases: Mapping[Release, int], delta: float) -> Spent:
    """What the `releases`, each as many times as it says, have spent together at `delta`."""
    if not 0 < delta < 1:
        raise PrivacyError(f"δ = {delta} is not between 0 and 1", hint="It is the chance that the promise fails.")
    return _spent(frozenset((release, count) for release, count in releases.items() if count), delta)


@lru_cache(maxsize=64)
def noise_multiplier(release: Release, count: int, epsilon: float, delta: float) -> float:
    """The smallest noise multiplier with which `count` releases spend at most `epsilon` at `delta`.

    A whole number of ten thousandths, so that all who compute it come to the same one. By RDP first, which is cheap
    and errs on the safe side, then by what is claimed.

    Args:
        release: any of them; only its noise multiplier is changed.

    Raises:
        PrivacyError: not even a noise multiplier of 10,000 is enough.
    """

    def releases(ticks: int) -> dict[Release, int]:
        return {release.with_noise(ticks / _DIGITS): count}

    def enough(ticks: int) -> bool:
        return _rdp(releases(ticks), delta) <= epsilon

    if not enough(_LARGEST):
        raise PrivacyError(
            f"no noise is enough for ε = {epsilon:g} at δ = {delta:g} in {count:,} releases",
            where="privacy.target_epsilon",
            hint="Allow a larger ε, fewer rounds or fewer steps.",
        )
    high = _nearly_first(enough, 0, _LARGEST)
    return _refined(lambda ticks: spent(releases(ticks), delta).epsilon, high, epsilon) / _DIGITS


def _nearly_first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """A number, little above the smallest above `low`, for which `holds`, which it does for `high` and all between."""
    while high - low > max(1, high // 64):
        middle = (low + high) // 2 if high < 4 * low + 16 else math.isqrt(max(low, 1) * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _refined(claimed: Callable[[int], float], high: int, target: float) -> int:
    """The smallest number for which `claimed`, a falling function, is at most `target`, as it is for `high`.

    It lies little below `high`, and asking takes time: so a bracket first, and then by interpolation (regula falsi).
    """
    above, low, step = claimed(high), high, max(1, high // 16)
    below = above
    while low > 1 and below <= target:
        high, above = low, below
        low = max(1, low - step)
        below = claimed(low)
    if below <= target:
        return low
    tries = 0
    while high - low > 1:
        share = math.log(below / target) / math.log(below / above) if math.isfinite(below) and tries < 8 else 0.5
        guess = min(max(low + round(share * (high - low)), low + 1), high - 1)
        found, tries = claimed(guess), tries + 1
        if found <= target:
            high, above = guess, found
        else:
            low, below = guess, found
    return high


@lru_cache(maxsize=256)
def _spent(releases: frozenset[tuple[Release, int]], delta: float) -> Spent:
    name = f"dp-accounting {version('dp-accounting')}"
    if not releases:
        return Spent(0.0, delta, 0.0, 0.0, f"PLD ({name})")
    by_rdp = _rdp(dict(releases), delta)
    if any(release.event() is None for release, _ in releases):
        why = "there are no privacy loss distributions for the Skellam mechanism in many dimensions"
        return Spent(by_rdp, delta, by_rdp, None, f"RDP ({name}; Skellam: arXiv 2110.04995)", why)
    by_pld = _pld(releases, delta, by_rdp)
    return Spent(min(by_pld, by_rdp), delta, by_rdp, by_pld, f"{'PLD' if by_pld <= by_rdp else 'RDP'} ({name})")


def _rdp(releases: Mapping[Release, int], delta: float) -> float:
    from dp_accounting.rdp import compute_epsilon

    orders = np.asarray(_WHOLE if any(isinstance(release, Skellam) for release in releases) else _ORDERS)
    total = sum((count * release.rdp(orders) for release, count in releases.items()), np.zeros(len(orders)))
    return float(compute_epsilon(orders, total, delta)[0])


@contextmanager
def _leaving_orders_out() -> Iterator[None]:
    """Keep absl from warning of each order whose series does not converge: it counts as ∞, and others decide."""

    def other(record: logging.LogRecord) -> bool:
        return "failed to converge" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _pld(releases: frozenset[tuple[Release, int]], delta: float, near: float) -> float:
    """By privacy loss distributions, on a grid as coarse as a spending `near` to this allows."""
    from dp_accounting.pld import PLDAccountant

    interval = _FINEST * 2 ** max(0, math.ceil(math.log2(near / 4))) if math.isfinite(near) else 1.0
    accountant = PLDAccountant(value_discretization_interval=interval)
    for release, count in sorted(releases, key=repr):  # sums of floats must not depend on an order of hashes
        accountant.compose(release.event(), count)
    return float(accountant.get_epsilon(delta))
