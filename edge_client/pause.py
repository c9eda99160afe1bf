"""The pause before a broken connection is tried again: it grows from try to try, and is never quite the same, so that
the clients of a coordinator that comes back do not all come at once."""

from __future__ import annotations

import random
import threading
from typing import Final

SHORTEST: Final = 0.25
LONGEST: Final = 15.0


class Pause:
    """Doubles from `SHORTEST` to `LONGEST` seconds, with jitter; cut short when `stop` is set."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._next = SHORTEST

    def reset(self) -> None:
        self._next = SHORTEST

    def wait(self) -> None:
        self._stop.wait(self._next * random.uniform(0.5, 1.0))
        self._next = min(2 * self._next, LONGEST)
