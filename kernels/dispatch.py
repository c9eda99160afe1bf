"""Which version of a kernel runs: the plain reference or the fast one, by the caller's word and nothing else.

A module of this folder that has both `reference_X` and `X` has the kernel `module.X`; nothing is listed by hand. Both
take the same arguments. A fast version that a device does not have is an error: the other one never steps in for it.
Code that always wants the fast version imports it; tests and benchmarks, which want both, and whoever leaves the choice
to a user come here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Final

_REFERENCE: Final = "reference_"

_NUMPY: Final = frozenset({"stacked"})
"""Modules whose kernels take arrays of numpy, which are on the CPU."""


class Implementation(Enum):
    """A version of a kernel."""

    REFERENCE = "reference"
    FAST = "fast"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One computation in two versions, with the same arguments and, up to rounding, the same result.

    Attributes:
        devices: types of torch's devices on which it runs.
    """

    name: str
    reference: Callable[..., Any]
    fast: Callable[..., Any]
    devices: frozenset[str]


@cache
def kernels() -> Mapping[str, Kernel]:
    """All kernels that have two versions, by name, such as `cross_entropy.summed_linear`."""
    found: dict[str, Kernel] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        loaded = importlib.import_module(f"farfield.kernels.{module.name}")
        devices = frozenset({"cpu"}) if module.name in _NUMPY else frozenset({"cpu", "cuda"})
        for reference in vars(loaded):
            name = reference.removeprefix(_REFERENCE)
            if name != reference and callable(getattr(loaded, name, None)):
                whole = f"{module.name}.{name}"
                found[whole] = Kernel(whole, getattr(loaded, reference), getattr(loaded, name), devices)
    return found


def choose(name: str, implementation: Implementation, device: str) -> Callable[..., Any]:
    """The version of kernel `name` that was asked for.

    Raises:
        LookupError: there is no such kernel, or it does not run on this type of device.
    """
    known = kernels()
    if name not in known:
        raise LookupError(f"no kernel {name!r}; there are: {', '.join(sorted(known))}")
    kernel = known[name]
    if device not in kernel.devices:
        raise LookupError(f"{name!r} runs on {', '.join(sorted(kernel.devices))}, not on {device!r}")
    return kernel.fast if implementation is Implementation.FAST else kernel.reference
