"""Axes of a plot: which values they span, and where their ticks are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .finding import Axis
from .wording import number

_MOST_TICKS: Final = 6
_HUGE: Final = 1e100  # nothing beyond this, or this close to 0, is measured; it must not break a page
_FLAT: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values from `low` to `high` to places from `start` to `end`.

    Attributes:
        ticks: values within the limits, rising, each with its label.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        """The place of `value`; that of the nearest limit for one that is beyond it, as 0 is on a logarithmic axis."""
        value = min(max(value, self.low), self.high)
        share = (self._bent(value) - self._bent(self.low)) / (self._bent(self.high) - self._bent(self.low))
        return self.start + (self.end - self.start) * share

    def value(self, place: float) -> float:
        """The value at `place`."""
        low, high = self._bent(self.low), self._bent(self.high)
        bent = low + (high - low) * (place - self.start) / (self.end - self.start)
        return min(max(10**bent if self.log else bent, self.low), self.high)

    def _bent(self, value: float) -> float:
        return math.log10(value) if self.log else value


def scale(axis: Axis, values: Sequence[float], start: float, end: float) -> Scale:
    """The scale on which `axis` shows `values`, as far as its own limits allow."""
    make = _log if axis.log else _linear
    least, most = (None if limit is None else _bounded(limit) for limit in (axis.low, axis.high))
    low, high, ticks = make(least, most, [_bounded(value) for value in values])
    return Scale(low, high, start, end, axis.log, ticks)


def _bounded(value: float) -> float:
    return 0.0 if abs(value) < 1 / _HUGE else min(max(value, -_HUGE), _HUGE)


def _linear(
    low: float | None, high: float | None, values: Sequence[float]
) -> tuple[float, float, tuple[tuple[float, str], ...]]:
    first = min(values, default=0.0) if low is None else low
    last = max(values, default=1.0) if high is None else high
    if last - first <= _FLAT * max(abs(first), abs(last)):
        room = abs(first) / 2 or 1.0
        first, last = first if high is None and low is not None else first - room, first + room
    step = _nice((last - first) / (_MOST_TICKS - 1))
    if last - first >= 2 and all(value == int(value) for value in values):
        step = max(step, 1.0)  # half a round is none
    if low is None:
        first = math.floor(first / step + 1e-9) * step
    if high is None:
        last = math.ceil(last / step - 1e-9) * step
    count = math.floor((last - first) / step + 1e-9)
    begin = math.ceil(first / step - 1e-9)
    ticks = [(begin + k) * step for k in range(count + 1) if (begin + k) * step <= last + step * 1e-9]
    digits = max(0, -math.floor(math.log10(step)))
    plain = step >= 1e-4 and max(abs(first), abs(last)) < 1e7
    return first, last, tuple((t, f"{t:,.{digits}f}".replace("-", "−") if plain else number(t)) for t in ticks)


def _nice(rough: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(k * power for k in (1, 2, 5, 10) if k * power >= rough * (1 - 1e-9))


def _log(
    low: float | None, high: float | None, values: Sequence[float]
) -> tuple[float, float, tuple[tuple[float, str], ...]]:
    positive = [value for value in values if value > 0]
    first = low if low is not None and low > 0 else 10.0 ** math.floor(math.log10(min(positive, default=0.001)) + 1e-9)
    last = high if high is not None and high > 0 else 10.0 ** math.ceil(math.log10(max(positive, default=1.0)) - 1e-9)
    if first >= last * (1 - _FLAT):
        first, last = first if low is not None else first / 10, 10 * first
    decades = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    every = max(1, math.ceil(len(decades) / (_MOST_TICKS + 1)))
    kinds = (1, 2, 5) if math.log10(last / first) <= 2 else (1,)
    candidates = [kind * 10.0**power for power in decades if power % every == 0 for kind in kinds]
    ticks = [tick for tick in candidates if first * (1 - 1e-9) <= tick <= last * (1 + 1e-9)]
    return first, last, tuple((tick, number(tick)) for tick in ticks or [first, last])
