"""Which version of a kernel runs: the plain reference or a fast one, by the caller's word and nothing else.

A module of this folder that has both `reference_X` and `X` has the kernel `module.X`; nothing is listed by hand. Both
take the same arguments. A module `triton_M` holds further versions of kernels of module M, for CUDA devices, and is
there where Triton is. A version that a device does not have is an error: another one never steps in for it.
Code that always wants the fast version imports it; tests and benchmarks, which want both, and whoever leaves the choice
to a user come here.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Final

_REFERENCE: Final = "reference_"
_TRITON: Final = "triton_"

_NUMPY: Final = frozenset({"stacked"})
"""Modules whose kernels take arrays of numpy, which are on the CPU."""


class Implementation(Enum):
    """A version of a kernel."""

    REFERENCE = "reference"
    FAST = "fast"
    TRITON = "triton"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One computation in two versions or three, with the same arguments and, up to rounding, the same result.

    Attributes:
        devices: types of torch's devices on which the first two run.
        triton: for CUDA devices; None where there is none, or no Triton.
    """

    name: str
    reference: Callable[..., Any]
    fast: Callable[..., Any]
    devices: frozenset[str]
    triton: Callable[..., Any] | None = None


@cache
def kernels() -> Mapping[str, Kernel]:
    """All kernels that have two versions, by name, such as `cross_entropy.summed_linear`."""
    found: dict[str, Kernel] = {}
    modules = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    for module in modules:
        if module.startswith(_TRITON):
            continue
        loaded = importlib.import_module(f"farfield.kernels.{module}")
        further = f"{_TRITON}{module}" if importlib.util.find_spec("triton") else ""
        extra = importlib.import_module(f"farfield.kernels.{further}") if further in modules else None
        devices = frozenset({"cpu"}) if module in _NUMPY else frozenset({"cpu", "cuda"})
        for reference in vars(loaded):
            name = reference.removeprefix(_REFERENCE)
            if name != reference and callable(getattr(loaded, name, None)):
                versions = getattr(loaded, reference), getattr(loaded, name)
                found[f"{module}.{name}"] = Kernel(
                    f"{module}.{name}", *versions, devices, triton=getattr(extra, name, None)
                )
    return found


def choose(name: str, implementation: Implementation, device: str) -> Callable[..., Any]:
    """The version of kernel `name` that was asked for.

    Raises:
        LookupError: there is no such kernel, or this version does not run on this type of device.
    """
    known = kernels()
    if name not in known:
        raise LookupError(f"no kernel {name!r}; there are: {', '.join(sorted(known))}")
    kernel = known[name]
    if implementation is Implementation.TRITON:
        if kernel.triton is None or device != "cuda":
            raise LookupError(f"{name!r} has no version for {device!r} in Triton, or Triton is not installed")
        return kernel.triton
    if device not in kernel.devices:
        raise LookupError(f"{name!r} runs on {', '.join(sorted(kernel.devices))}, not on {device!r}")
    return kernel.fast if implementation is Implementation.FAST else kernel.reference
