"""Sizes and times as a person reads them."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Final

from farfield.protocols.errors import DeviceError

_UNITS: Final = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS_OF_TWO: Final = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str) -> int:
    """The number of bytes that a person means by "4GB", "800 MB", "1.5GiB" or "2000000000".

    Raises:
        DeviceError: it is no size, or not above zero.
    """
    units = {name.lower(): factor for name, factor in (_UNITS | _UNITS_OF_TWO).items()}
    found = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", text)
    factor = units.get((found[2] or "B").lower()) if found else None
    count = 0 if found is None or factor is None else int(float(found[1]) * factor)
    if count < 1:
        raise DeviceError(f"{text!r} is not an amount of memory", hint="Write it as 4GB, 800MB or 1.5GiB.")
    return count


def days_left(until: datetime, now: datetime) -> str:
    """How many whole days are left before `until`."""
    days = (until - now).days
    return f"{days} days left" if days >= 0 else "EXPIRED"
