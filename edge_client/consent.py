"""Consent: the limits that the owner of the data sets, and that no coordinator can override.

They stand in the `[consent]` section of the owner's own `edge-client.toml`. `check` is a pure function of those limits,
of what a run asks for, and of the time on the owner's clock; it is called before any data is opened, and its refusal
goes to the coordinator as a reply of its own kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, time
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from farfield.protocols.errors import ConsentError
from farfield.protocols.plan import Plan

PROGRAM_BYTES: Final = 550_000_000
"""Resident memory of an edge client before it has loaded a backbone: Python, torch, transformers and Flower. Measured
on Linux with torch 2.13 for the CPU; with CUDA it is more.
"""

_HOURS: Final = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]-(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)")

Limit = Annotated[int, Field(ge=1)] | None


class Section(BaseModel):
    """A section of `edge-client.toml`: immutable, strict about types, closed to unknown keys.

    The description of each key is the comment above it in the file that `join` writes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Consent(Section):
    """What this machine may be asked to do. A limit that is absent, or an empty list, limits nothing."""

    methods: Annotated[
        tuple[str, ...],
        Field(strict=False, description='Tuning methods that are allowed, such as "lora"; [] allows any.'),
    ] = ()
    backbones: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...],
        Field(
            strict=False,
            description="Backbones and emulators that are allowed, by the digest of their bundle; [] allows any.",
        ),
    ] = ()
    deliveries: Annotated[
        tuple[Literal["adapter", "emulator"], ...],
        Field(
            strict=False,
            min_length=1,
            description='What may be fetched to train on: with "adapter" the whole backbone, with "emulator" a '
            "compressed stand-in for most of it.",
        ),
    ] = ("adapter", "emulator")
    protections: Annotated[
        tuple[Literal["sealed", "secagg"], ...],
        Field(
            strict=False,
            min_length=1,
            description='How an update must be protected on its way. With "sealed" the coordinator alone can read it, '
            'with "secagg" nobody can, only the sum. Unprotected it never leaves.',
        ),
    ] = ("sealed", "secagg")
    min_cohort: Annotated[
        int,
        Field(
            ge=1,
            description="The fewest clients, this one included, that must be asked in a round. With 1 the result may "
            "be made from this machine's data alone.",
        ),
    ] = 1
    min_sum: Annotated[
        int,
        Field(
            ge=3,
            description="The fewest clients, this one included, whose sum may be opened when others have dropped out.",
        ),
    ] = 3
    roster_key: Annotated[
        str,
        Field(
            pattern=r"^([0-9a-f]{64})?$",
            description="Public key of a consortium; with it this machine adds its update only to those of nodes on a "
            'roster that this key signed. "" asks for no roster.',
        ),
    ] = ""
    max_epsilon: Annotated[
        Annotated[float, Field(gt=0, allow_inf_nan=False)] | None,
        Field(
            description="The most ε that runs may spend on this data in total; then runs without differential privacy "
            "are refused.",
            examples=[8.0],
        ),
    ] = None
    delta: Annotated[
        float, Field(gt=0, lt=1, description="The δ at which that ε is counted; well below one in the records here.")
    ] = 1e-5
    max_rounds: Annotated[Limit, Field(description="The most rounds that a run may have.", examples=[100])] = None
    max_steps: Annotated[
        Limit,
        Field(
            description="The most optimiser steps in one round, for a Plan that counts its work in steps.",
            examples=[1000],
        ),
    ] = None
    max_epochs: Annotated[
        Limit,
        Field(
            description="The most passes over the data in one round, for a Plan that counts its work in epochs.",
            examples=[5],
        ),
    ] = None
    max_message_bytes: Annotated[
        Limit,
        Field(description="The largest task that is accepted; an update is about as large.", examples=[100_000_000]),
    ] = None
    max_backbone_bytes: Annotated[
        Limit, Field(description="The largest backbone that is downloaded.", examples=[20_000_000_000])
    ] = None
    max_memory_bytes: Annotated[
        Limit,
        Field(
            description="The most memory that this program may take, training included. Within it the client looks "
            "for a way to work by the Plan; where there is none it refuses, and it never takes more.",
            examples=[16_000_000_000],
        ),
    ] = None
    hours: Annotated[
        str,
        Field(
            description='When tasks are taken, in local time, for instance "22:00-06:00"; "" is always. A task that '
            "was begun is finished."
        ),
    ] = ""

    @field_validator("hours")
    @classmethod
    def _two_times(cls, value: str) -> str:
        if value and not _HOURS.fullmatch(value):
            raise ValueError(f'{value!r} is not a span of hours such as "22:00-06:00"')
        if value and value[:5] == value[6:]:
            raise ValueError(f'{value!r} begins and ends at once; "" is always')
        return value


@dataclass(frozen=True, slots=True)
class Request:
    """All that consent depends on, of what a task asks for.

    Attributes:
        run: the run's name.
        plan: its Plan.
        backbone: digest of the backbone's bundle, hexadecimal.
        backbone_bytes: its size; None while that is not known, and then what depends on it is not checked: ask again.
        cohort: how many clients are asked in this round, this one included.
        message_bytes: size of the task as it came.
    """

    run: str
    plan: Plan
    backbone: str
    backbone_bytes: int | None
    cohort: int
    message_bytes: int


def check(consent: Consent, request: Request, now: datetime) -> None:
    """Return if the owner allows `request` at the time `now` of the owner's wall clock.

    Raises:
        ConsentError: names the first limit that forbids it, with its value, and what was asked.
    """
    for limit, value, asked in _refusals(consent, request, now):
        raise ConsentError(
            f"run {request.run!r} {asked}, and the owner of this data does not allow that",
            where=f"consent.{limit} = {value}",
        )


def _refusals(consent: Consent, request: Request, now: datetime) -> Iterator[tuple[str, str, str]]:
    """The limits that forbid `request`: name, value, and what was asked, as "asks for …"."""
    plan, training = request.plan, request.plan.training
    if plan.protection.kind not in consent.protections:
        yield "protections", _listed(consent.protections), f"sends updates with protection {plan.protection.kind!r}"
    if plan.delivery.kind not in consent.deliveries:
        fetched = "an emulator" if plan.delivery.kind == "emulator" else "the backbone itself"
        yield "deliveries", _listed(consent.deliveries), f"has clients fetch {fetched}"
    if consent.methods and plan.tuning.kind not in consent.methods:
        yield "methods", _listed(consent.methods), f"uses the tuning method {plan.tuning.kind!r}"
    if consent.backbones and request.backbone not in consent.backbones:
        yield (
            "backbones",
            f"{len(consent.backbones)} digests",
            f"uses the backbone {request.backbone or '(none named)'}",
        )
    if request.cohort < consent.min_cohort:
        yield "min_cohort", str(consent.min_cohort), f"asks {_clients(request.cohort)} in this round"
    if plan.protection.kind == "secagg":
        from farfield.protocols.summing import smallest_sum  # brings numpy, which most commands do without

        if (fewest := smallest_sum(plan, request.cohort)) < consent.min_sum:
            yield "min_sum", str(consent.min_sum), f"may open the sum of {_clients(fewest)} in this round"
    elif consent.roster_key:
        yield (
            "roster_key",
            repr(consent.roster_key),
            f"sends updates with protection {plan.protection.kind!r}, where the coordinator reads each, roster or not",
        )
    if consent.max_epsilon is not None and plan.privacy.kind == "none":
        yield "max_epsilon", f"{consent.max_epsilon:g}", "has no differential privacy"
    counted = [
        ("max_rounds", consent.max_rounds, training.rounds, "has {} rounds"),
        ("max_steps", consent.max_steps, training.steps, "asks for {} steps a round"),
        ("max_epochs", consent.max_epochs, training.epochs, "asks for {} epochs a round"),
        ("max_message_bytes", consent.max_message_bytes, request.message_bytes, "sends a task of {} bytes"),
        ("max_backbone_bytes", consent.max_backbone_bytes, request.backbone_bytes, "uses a backbone of {} bytes"),
    ]
    for name, limit, asked, sentence in counted:
        if limit is not None and asked is not None and asked > limit:
            yield name, f"{limit:,}", sentence.format(f"{asked:,}")
    if consent.hours and not _within(consent.hours, now.time()):
        yield "hours", repr(consent.hours), f"asks for work at {now:%H:%M}"


def _within(hours: str, now: time) -> bool:
    """Whether `now` lies in the span, its begin included, its end not; a span may pass midnight."""
    begin, end = time.fromisoformat(hours[:5]), hours[6:]
    if end == "24:00":
        return begin <= now
    until = time.fromisoformat(end)
    return begin <= now < until if begin < until else now >= begin or now < until


def _listed(names: tuple[str, ...]) -> str:
    return f"[{', '.join(repr(name) for name in names)}]"


def _clients(count: int) -> str:
    return "one client" if count == 1 else f"{count} clients"
