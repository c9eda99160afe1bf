"""The sum that both sides of the benchmark of secure aggregation compute: how large, how precise, on which graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from stopwatch import Took

from farfield.protocols.secagg.parameters import Parameters, choose

BITS: Final = 16  # precision of one value, as a Plan has it by default
LIMIT: Final = 0.05
WEIGHT: Final = 1000  # of every client; Flower's `max_weight`, and so as much as there may be
DEFAULTS: Final = (0.1, 0.1)  # corrupt and dropping out, as a Plan has them by default
EVERYBODY: Final = (0.33, 0.3)  # more than a sparse graph withstands: everybody masks with everybody

Values = NDArray[np.float32]


def graph(clients: int, stated: tuple[float, float]) -> Parameters:
    """That withstands these shares of corrupt clients and of drop-outs."""
    return choose(clients, *stated, "semi-malicious")


def draw(values: int, number: int) -> Values:
    """The update of a client."""
    drawn = np.random.default_rng(number).standard_normal(values, np.float32)
    return np.multiply(drawn, LIMIT / 4, out=drawn)


@dataclass(frozen=True, slots=True)
class Client:
    """What one client took, and sent: in its masked vector, and in everything else."""

    took: Took
    vector_bytes: int
    other_bytes: int
