"""Numbers and clauses as they stand on a page."""

from __future__ import annotations

import math
from typing import Final

_SUPERSCRIPTS: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 4) -> str:
    """To so many digits, as a person writes it: "1,200", "0.05", "−3.2", "2×10⁻⁷"."""
    if not value:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 7:
        text = f"{value:,.0f}" if abs(value) >= 10**digits / 10 else f"{value:.{digits}g}"
        if "e" not in text:
            return text.replace("-", "−")
    mantissa, _, power = f"{value:.2e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".").replace("-", "−")
    power = str(int(power)).translate(_SUPERSCRIPTS)
    return f"10{power}" if mantissa == "1" else f"{mantissa}×10{power}"


def printable(words: str) -> str:
    """`words` with a space for each character that shows nothing, or, as marks of direction do, turns others round."""
    return "".join(one if one.isprintable() else " " for one in words)


def capital(words: str) -> str:
    """The same with a capital first. A symbol stays as it is: Ε is not ε."""
    return f"{words[:1].upper()}{words[1:]}" if words[:1].isascii() else words


def sentence(clause: str) -> str:
    """A clause as a sentence of its own."""
    return f"{capital(clause).rstrip('.')}."


def epsilon(value: float | None, delta: float) -> str:
    """ε at δ, as text."""
    return f"{'no finite ε' if value is None else f'ε = {number(value)}'} at δ = {number(delta)}"
