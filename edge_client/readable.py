"""Sizes and times as a person reads them."""

from __future__ import annotations

from datetime import datetime


def size(count: float) -> str:
    """A number of bytes as a person reads it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def days_left(until: datetime, now: datetime) -> str:
    """How many whole days are left before `until`."""
    days = (until - now).days
    return f"{days} days left" if days >= 0 else "EXPIRED"
