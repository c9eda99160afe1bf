"""Numbers and clauses as they stand on a page."""

from __future__ import annotations

import math
from typing import Final

_SUPERSCRIPTS: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """To four digits at most, as a person writes it: "1,200", "0.05", "−3.2", "2×10⁻⁷"."""
    if not value:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 7:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        if "e" not in text:
            return text.replace("-", "−")
    mantissa, _, power = f"{value:.2e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".").replace("-", "−")
    power = str(int(power)).translate(_SUPERSCRIPTS)
    return f"10{power}" if mantissa == "1" else f"{mantissa}×10{power}"


def printable(words: str) -> str:
    """`words` with a space for each character that shows nothing, or, as marks of direction do, turns others round."""
    return "".join(one if one.isprintable() else " " for one in words)


def sentence(clause: str) -> str:
    """A clause as a sentence of its own. A symbol stays as it is: Ε is not ε."""
    first = clause[:1].upper() if clause[:1].isascii() else clause[:1]
    return f"{first}{clause[1:].rstrip('.')}."


def epsilon(value: float | None, delta: float) -> str:
    """ε at δ, as text."""
    return f"{'no finite ε' if value is None else f'ε = {number(value)}'} at δ = {number(delta)}"
