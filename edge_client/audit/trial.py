"""Something that must be refused, tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from farfield.protocols.errors import FarfieldError


@dataclass(frozen=True, slots=True)
class Attempt:
    """What was prepared.

    Attributes:
        ask: asks for what must be refused.
        again: asks, honestly, for what the refusal has put an end to; None where it puts an end to nothing.
    """

    ask: Callable[[], object]
    again: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    Attributes:
        what: was tried, for a person.
        held: whether it was refused.
        said: with which words, or what happened instead.
    """

    what: str
    held: bool
    said: str


def tried(what: str, prepare: Callable[[], Attempt | None]) -> Outcome | None:
    """Prepare an attempt and make it; None where it cannot be made in this setting.

    Only an error of Farfield's own is a refusal: whatever else goes wrong was not foreseen, and does not count as one.
    """
    try:
        attempt = prepare()
    except FarfieldError as error:
        return Outcome(what, False, f"could not be tried, because something honest was refused: {error.what}")
    if attempt is None:
        return None
    said = _refusal(attempt.ask)
    if said is None:
        return Outcome(what, False, "it was answered")
    if attempt.again is not None and _refusal(attempt.again) is None:
        return Outcome(what, False, f"refused ({said}), but what came after it was answered")
    return Outcome(what, not said.startswith(_CRASHED), said)


_CRASHED = "it ended in an error that nobody foresaw: "


def _refusal(ask: Callable[[], object]) -> str | None:
    """The words of a refusal; None where there was none."""
    try:
        ask()
    except FarfieldError as error:
        return error.what if not error.where else f"{error.where}: {error.what}"
    except Exception as error:
        return f"{_CRASHED}{type(error).__name__}"
    return None
