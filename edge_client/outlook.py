"""`edge-client doctor --plan`: what of a Plan fits into this machine, and what the client would do."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from farfield.emulator import backbone, methods
from farfield.protocols import plan as plans
from farfield.protocols.errors import FarfieldError
from farfield.protocols.terminal import size

from . import device, fitting
from .consent import Consent
from .home import Home
from .readable import parse_size


def show(path: Path, memory: str | None, home: Path, console: Console) -> None:
    """Print the ways to work by the Plan at `path`, which of them fit, and which is taken.

    Args:
        memory: how much there is, as a person writes it; None is what the machine has free and, where a client has
            enrolled at `home`, its owner's consent leaves.

    Raises:
        PlanError, BackboneError, TuningError, EmulatorError: the Plan cannot be used.
        DeviceError: `memory` is no size, or nothing fits into it; the table is printed first.
    """
    most = None if memory is None else parse_size(memory)
    plan = plans.load(path, methods.registered(), None)
    folder = backbone.resolve(plan.model.backbone, path.parent)
    backbone.check(folder)
    consent = _consent(home)
    if most is None:
        left = device.available_memory()
        limits = [one for one in (consent.max_memory_bytes, left) if one is not None]
        most = min(limits, default=None)
    table = fitting.look_ahead(plan, folder, most, consent.methods, thorough=True)
    rows = Table("", "way to work", "memory", "seconds a step", "fits", box=None, pad_edge=False)
    chosen = next((one for one in table if one.fits), None)
    for one in table:
        rows.add_row(
            "→" if one is chosen else "",
            fitting.named(one, plan),
            size(one.memory),
            f"{one.seconds:.2g}",
            "yes" if one.fits else "no",
        )
    console.print(rows)
    if plan.privacy.kind == "example":
        console.print(
            "The gradients of single examples, which the Plan's privacy needs, come on top and are not counted."
        )
    if chosen is None:
        raise fitting.nothing_fits(plan, table, most)
    console.print(_why(table.index(chosen), fitting.named(chosen, plan), most))


def _why(place: int, name: str, most: int | None) -> str:
    if most is None:
        return "Nothing says how much memory there is, so the Plan is taken as it is."
    if place == 0:
        return f"The Plan fits into {size(most)} as it is."
    return f"Taken would be {name}: the first that leaves {fitting.share()} of {size(most)} free."


def _consent(home: Path) -> Consent:
    try:
        return Home.open(home).settings.consent
    except FarfieldError:  # no client has enrolled here
        return Consent()
