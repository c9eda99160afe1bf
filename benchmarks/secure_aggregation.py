"""Secure aggregation beside Flower's SecAgg+, in the same run: a client's time, the server's, bytes, and mask speed.

    python benchmarks/secure_aggregation.py [--values 10000000] [--repeats 3] [--json FILE]

A client's time is everything that it does in a session apart from training: keys, agreement, sharing, boxes, weighting,
fixed point, masks, packing, and, on our side, the signatures of the roster and of who survived. It masks with everybody
on a roster of one more than it has neighbours. Its peers run the same code and answer in full, but for the masks on
their vectors, which are left out. The server's time is everything that it does from the first question to the decoded
sum, with the degree and threshold that our defaults come to; some clients drop out after they have shared their
secrets.

Flower's side is the code of its package: the functions behind `secaggplus_mod`, without the handling of messages, and
`SecAggPlusWorkflow` as a whole, without the time in which it waits for the grid. Both sides have the same threshold
and the same vector. Of the masked vectors that Flower's server adds at full size, all are copies of one, because a real
one takes seconds to make and 80 MB; its work does not depend on what is in them. Before anything is timed, both sides
aggregate a small vector for real. Our sums, small and large, must equal the plain sum of the fixed-point values.

What counts is processor time, which other work on the machine lengthens less than the time by the clock. Neither side
computes in parallel: the threads in Flower's sharing are of Python and take turns.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Final

import numpy as np
import typer
from mask_speed import Speeds
from secagg_case import DEFAULTS, LIMIT, Client, draw, graph
from secagg_flower import flower_client, flower_server
from secagg_ours import our_client, our_server
from stopwatch import Took

from farfield.protocols.errors import PrivacyError
from farfield.protocols.privacy import distributed
from farfield.protocols.secagg import fixedpoint

NOISE_MULTIPLIER: Final = 1.0
FASTER, BYTES, BYTES_WITH_NOISE, OF_AES = 8.0, 3.0, 2.0, 0.5


def check(values: int, clients: int, dropped: int) -> None:
    """Both sides on real vectors: our sum exactly, Flower's to its own precision."""
    our_server(values, clients, dropped)
    mean = flower_server(lambda node: draw(values, node), clients, dropped, copies=False)[1]
    clipped = [np.clip(draw(values, node), -LIMIT, LIMIT) for node in range(dropped + 1, clients + 1)]
    assert np.abs(mean - np.mean(clipped, axis=0)).max() < 1e-6, "Flower's code is not driven as it should be"


@dataclass(frozen=True, slots=True)
class Noise:
    """A modulus for distributed noise, and the noise beside central noise; None where the modulus is too small."""

    modulus_bits: int
    inflation: float | None

    def __str__(self) -> str:
        noise = "does not fit" if self.inflation is None else f"noise × {self.inflation:.3f}"
        return f"{self.modulus_bits / 8:.2f}: {noise}"


def noise(values: int, clients: int, dropped: int) -> tuple[Noise, Noise]:
    """What `distributed.smallest` picks, and then what 16 bits would come to."""
    survivors = clients - dropped
    picked = distributed.smallest(values, clients, survivors, NOISE_MULTIPLIER)
    try:
        inflation: float | None = distributed.design(values, clients, survivors, 16, NOISE_MULTIPLIER).inflation
    except PrivacyError:
        inflation = None
    return Noise(picked.modulus_bits, picked.inflation), Noise(16, inflation)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A figure beside what is wanted of it."""

    what: str
    figure: float
    wanted: str
    met: bool

    def __str__(self) -> str:
        return f"{'met' if self.met else 'MISSED'}: {self.what}: {self.figure:.2f}; wanted {self.wanted}"


def at_least(what: str, figure: float, wanted: float) -> Verdict:
    return Verdict(what, figure, f"≥ {wanted:g}", figure >= wanted)


def at_most(what: str, figure: float, wanted: float) -> Verdict:
    return Verdict(what, figure, f"≤ {wanted:g}", round(figure, 2) <= wanted)


@dataclass(frozen=True, slots=True)
class Measured:
    """All figures.

    Attributes:
        clients: by the number of neighbours.
        server: of both sides.
        noise: what is picked, and what 16 bits come to.
    """

    machine: str
    values: int
    clients: dict[int, tuple[list[Client], list[Client]]]
    server: tuple[Took, Took]
    noise: tuple[Noise, Noise]
    speeds: Speeds


def report(measured: Measured, server: str) -> list[Verdict]:
    """Print the table, ours beside Flower's. `server`: what is said of the server's session."""
    print(f"{measured.machine}; {measured.values:,} values\n")
    print("| what | ours | Flower's SecAgg+ | ratio | by the clock |\n|---|---|---|---|---|")
    verdicts = [
        _compare(f"client, {degree} neighbours", [one.took for one in ours], [one.took for one in theirs])
        for degree, (ours, theirs) in measured.clients.items()
    ]
    verdicts.append(_compare(f"server, {server}", *([took] for took in measured.server)))
    sent = [ran[0] for ran in list(measured.clients.values())[-1]]
    ours, theirs = (f"{one.vector_bytes / measured.values:.2f} ({one.other_bytes / 1e3:.0f} kB)" for one in sent)
    ratio = sent[1].vector_bytes / sent[0].vector_bytes
    print(f"| bytes a parameter up (and besides) | {ours} | {theirs} | {ratio:.1f} | |")
    verdicts.append(at_most("bytes a parameter up", sent[0].vector_bytes / measured.values, BYTES))
    picked, small = measured.noise
    verdicts.append(at_most("bytes a parameter up, distributed noise", picked.modulus_bits / 8, BYTES_WITH_NOISE))
    print(f"| … with distributed noise | {picked} (or {small}) | | | |")
    speeds = measured.speeds
    share = median(mask / aes for mask, aes in zip(speeds.masks, speeds.aes128, strict=True))
    verdicts.append(at_least("masks, of AES-128-CTR's own speed", share, OF_AES))
    print(
        f"\nmasks {_spread(speeds.masks, ' GB/s')}; AES-128-CTR {_spread(speeds.aes128, ' GB/s')}; "
        f"AES-256-CTR {_spread(speeds.aes256, ' GB/s')}\n"
        "every sum of ours equals the plain sum of the fixed-point values\n"
    )
    print(*verdicts, sep="\n")
    return verdicts


def _compare(what: str, ours: list[Took], theirs: list[Took]) -> Verdict:
    """A row of the table; what counts is processor time."""
    busy, clock = ([[getattr(one, kind) for one in side] for side in (ours, theirs)] for kind in ("busy", "clock"))
    ratio, other = (median(seconds[1]) / median(seconds[0]) for seconds in (busy, clock))
    print(
        f"| {what} | {_spread(busy[0], ' s')} | {_spread(busy[1], ' s')} | {ratio:.1f} "
        f"| {median(clock[0]):.2f} s, {median(clock[1]):.2f} s: {other:.1f} |"
    )
    return at_least(f"{what}, times less time", ratio, FASTER)


def _spread(figures: list[float], unit: str) -> str:
    if len(figures) == 1:
        return f"{figures[0]:.2f}{unit}"
    return f"{median(figures):.2f}{unit} ({min(figures):.2f} to {max(figures):.2f})"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    values: Annotated[int, typer.Option(min=1000, help="Parameters in an update.")] = 10_000_000,
    neighbours: Annotated[list[int] | None, typer.Option(min=2, help="Of a client. [default: 12, 32, 99]")] = None,
    clients: Annotated[int, typer.Option(min=6, help="Of the server.")] = 100,
    dropped: Annotated[int, typer.Option(min=0, help="How many of them drop out.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Of a client's work, in turn.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")] = None,
) -> None:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    before, update, speeds = os.getloadavg()[0], draw(values, 0), Speeds([], [], [])
    check(1000, clients=7, dropped=1)
    found: dict[int, tuple[list[Client], list[Client]]] = {degree: ([], []) for degree in neighbours or [12, 32, 99]}
    for repeat in range(repeats):
        for degree, (ours, theirs) in found.items():
            with _told(f"client with {degree} neighbours, {repeat + 1} of {repeats}"):
                speeds.measure(fixedpoint.zeros(values, 32))
                ours.append(our_client(update, degree))
                theirs.append(flower_client(update, degree))
    with _told(f"our server with {clients} clients"):
        our_took = our_server(values, clients, dropped)
    speeds.measure(fixedpoint.zeros(values, 32))
    with _told(f"Flower's server with {clients} clients"):
        their_took, _ = flower_server(lambda _: update, clients, dropped, copies=True)
    speeds.measure(fixedpoint.zeros(values, 32))
    machine = (
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"flwr {version('flwr')}, cryptography {version('cryptography')}; "
        f"load {before:.1f} at the beginning, {os.getloadavg()[0]:.1f} at the end"
    )
    measured = Measured(machine, values, found, (our_took, their_took), noise(values, clients, dropped), speeds)
    degree = graph(clients, DEFAULTS).degree
    verdicts = report(measured, f"{clients} clients, {dropped} dropped, {degree} neighbours")
    if json_file is not None:
        document = asdict(measured) | {"verdicts": [asdict(one) for one in verdicts]}
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _told(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    app()
