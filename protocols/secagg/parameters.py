"""How many neighbours a client masks with, and how many of them can open what it shared.

The rule for sparse graphs is that of Bell et al. 2020 (IACR ePrint 2020/704, section 3) as Google's
federated-compute applies it (fcp/secagg/server/graph_parameter_finder.cc): the least even degree k for which a
threshold t exists, such that over the random graph

1. but for probability 2^-(σ+1), the honest survivors stay connected, so that no part of them is summed apart;
2. but for probability 2^-(σ+1) over all clients, nobody has more than c corrupt neighbours, and t > c; against a
   server that may tell some neighbours that a client dropped out and others that it lives, 2t > k + c;
3. but for probability 2^-η over all clients, at least t neighbours of each survive.

Neighbours are drawn without replacement, so the numbers of corrupt and surviving ones are hypergeometric. Nothing but
integers and the four basic operations on float64, in a fixed order, is computed with: every machine must come to the
same numbers, and no two libraries agree on the last bit of a logarithm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import dropwhile
from math import floor, perm
from typing import Final, Literal, TypeAlias

import numpy as np

from farfield.protocols.errors import SecAggError

Adversary: TypeAlias = Literal["curious", "semi-malicious"]

FEWEST: Final = 3
"""Of two clients each would learn the other's vector from the sum."""

SMALL: Final = 50
"""To this many clients everybody masks with everybody."""

MOST_STATED: Final = 0.9
"""γ + δ, or γ + 2δ if semi-malicious, of a sparse graph: towards 1 the degree grows without bound."""


@dataclass(frozen=True)
class Parameters:
    """`degree`: neighbours of each client; `threshold`: shares that give a secret back.

    On a full graph every client holds a share of each secret, its owner as well; on a sparse one the neighbours do.
    """

    degree: int
    threshold: int


@cache
def choose(
    clients: int, corrupt: float, dropouts: float, adversary: Adversary, security: int = 40, correctness: int = 20
) -> Parameters:
    """The cheapest graph that keeps what is promised while no more clients are corrupt or drop out than stated.

    Args:
        clients: on the roster.
        corrupt: share of them that may work together with the server.
        dropouts: share of them that may fall silent after they have shared their secrets.
        adversary: "curious": the server follows the protocol; "semi-malicious": it may also tell clients different
            things about who dropped out.
        security: σ; what is to stay hidden is found out with probability 2^-σ at most.
        correctness: η; the sum cannot be opened with probability 2^-η at most.

    Raises:
        SecAggError: fewer than three clients, or no graph withstands so many.
    """
    if clients < FEWEST:
        raise SecAggError(f"{clients} clients cannot hide from one another in a sum: {FEWEST} are the fewest")
    if not (0 <= corrupt < 1 and 0 <= dropouts < 1):
        raise SecAggError(f"corrupt {corrupt} and dropouts {dropouts} are shares of the clients, from 0 to below 1")
    bad, silent = at_most(corrupt, clients), at_most(dropouts, clients)
    if clients > SMALL and bad + silent * (1 if adversary == "curious" else 2) <= clients * MOST_STATED:
        for degree in _connected(clients, bad + silent, security + 1):
            most_bad = degree - _rarely_below(clients, clients - bad, degree, security + 1)
            least_alive = _rarely_below(clients, clients - silent, degree, correctness)
            threshold = max(2, most_bad + 1 if adversary == "curious" else (degree + most_bad) // 2 + 1)
            if threshold <= least_alive:
                return Parameters(degree, threshold)
    threshold = -(-2 * clients // 3)
    safe = threshold > bad if adversary == "curious" else 2 * threshold > clients + bad
    if not safe or clients - silent < threshold:
        raise SecAggError(
            f"of {clients} clients {bad} may be corrupt and {silent} may drop out: no threshold withstands both",
            hint="state fewer corrupt clients or fewer dropouts",
        )
    return Parameters(clients - 1, threshold)


def at_most(share: float, clients: int) -> int:
    # A share such as 0.29 of 100 clients is 28.999… in binary, and 29 are meant.
    return floor(share * clients + 1e-9)


def _connected(clients: int, missing: int, security: int) -> Iterable[int]:
    """The even degrees, ascending, with which the rest stays connected but for a probability of 2^-security."""
    return dropwhile(lambda degree: _may_split(clients, degree, missing, security), range(2, clients - 1, 2))


def _may_split(clients: int, degree: int, missing: int, security: int) -> bool:
    """Whether the union bound on a split of the ring, which falls as the degree grows, is 2^-security or more.

    A split takes two gaps of degree/2 neighbours in a row; there are clients·(clients - degree - 1)/2 places for the
    pair, and each pair is missing with probability missing!/(missing - degree)! · (clients - degree)!/clients!.
    """
    return clients * (clients - degree - 1) * perm(missing, degree) << security >= 2 * perm(clients, degree)


def _rarely_below(clients: int, marked: int, drawn: int, rarity: int) -> int:
    """The greatest m for which Pr[fewer than m of the drawn are marked] < 2^-rarity / clients."""
    least, most = max(0, drawn + marked - clients), min(drawn, marked)
    count = np.arange(least, most, dtype=np.float64)
    growth = (marked - count) * (drawn - count) / ((count + 1) * (clients - marked - drawn + count + 1))
    likeliest = int(np.count_nonzero(growth >= 1))
    falling, rising = np.cumprod(growth[likeliest:]), np.cumprod(1 / growth[:likeliest][::-1])[::-1]
    below = np.cumsum(np.concatenate([rising, [1.0], falling]))
    return least + int(np.count_nonzero(below * clients * 2.0**rarity < below[-1]))
