"""Tuning methods: what is trained, one method a file.

A method is its settings, an immutable section `[tuning]` of the Plan, that knows how to install itself in a model. To
add one, add a file to this folder with a class that derives from `TuningMethod` (or from `PeftMethod`, where `peft`
does the work) under `@register`. Nothing else changes: the Plan accepts its `kind`, and the contract tests find it.

Importing this package imports every method but not torch, so that a process that only reads Plans stays small.
"""

from __future__ import annotations

import importlib
import pkgutil

from .method import Setting, Tuned, TuningMethod, register, registered
from .sharing import Sharing, advice

__all__ = ["Setting", "Sharing", "Tuned", "TuningMethod", "advice", "register", "registered"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
