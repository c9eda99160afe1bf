"""Aggregation rules: how the updates of a round become one.

A `SumRule` needs nothing but a weighted sum, so secure aggregation can carry it; a `ViewRule` has to see each update.
A `GroupRule` needs the sums of several groups of clients: secure aggregation can carry that, too.
One rule, one file, under `@register`; the Plan's `aggregation.rule` then knows it.
"""

from __future__ import annotations

import importlib
import pkgutil

from .rule import Combined, GroupRule, SumRule, ViewRule, register, registered, traits, weight_of

__all__ = ["Combined", "GroupRule", "SumRule", "ViewRule", "register", "registered", "traits", "weight_of"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
