"""What a piece of work takes: seconds of processor, and by the clock."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds: of processor, all threads together, and by the clock."""

    busy: float
    clock: float

    def __add__(self, other: Took) -> Took:
        return Took(self.busy + other.busy, self.clock + other.clock)

    def __sub__(self, other: Took) -> Took:
        return Took(self.busy - other.busy, self.clock - other.clock)


class Stopwatch:
    """What was taken within `with`, summed."""

    def __init__(self) -> None:
        self.took = Took(0.0, 0.0)

    def __enter__(self) -> None:
        self._began = Took(time.process_time(), time.perf_counter())

    def __exit__(self, *_: object) -> None:
        self.took += Took(time.process_time(), time.perf_counter()) - self._began
