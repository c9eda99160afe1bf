"""Attacks on one's own federation: what an attacker learns from what a Plan lets out, measured.

One attack, one file, under `@register`. Attacks are made where data is, on this machine, and know nothing of who asked:
`coordinator audit` gives them a whole simulated federation, `edge-client audit` one client's own update.
"""

from __future__ import annotations

import importlib
import pkgutil

from .attack import Attack, register, registered
from .subject import Act, Course, Federation, Member, Owner, Planted, Planting, Subject

__all__ = [
    "Act",
    "Attack",
    "Course",
    "Federation",
    "Member",
    "Owner",
    "Planted",
    "Planting",
    "Subject",
    "register",
    "registered",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
