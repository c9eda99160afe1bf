"""A hard limit: what would take more memory than it may ends with an error of its own, never by the system's hand."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

from farfield.protocols.errors import DeviceError
from farfield.protocols.terminal import size

from .device import resident, writable

_FAILED = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")
"""How torch says that there was none left."""


@contextmanager
def held(most: int | None) -> Iterator[None]:
    """Within it this process is kept below `most` bytes of resident memory; None keeps it below nothing.

    It is looked at before each layer of a model runs, and the system is told to give out no more than is left, so that
    one large tensor does not get past either.

    Raises:
        DeviceError: more would have been taken, or the machine had no more.
    """
    if most is not None and resident() > most:
        raise _too_much(most)
    try:
        with _watched(most) if most is not None else _free():
            yield
    except MemoryError:
        raise _too_much(most) from None
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _FAILED):
            raise
        raise _too_much(most) from None


@contextmanager
def _watched(most: int) -> Iterator[None]:
    from torch.nn.modules.module import register_module_forward_pre_hook

    def watch(*_: object) -> None:
        if resident() > most:
            raise _too_much(most)

    before = resource.getrlimit(resource.RLIMIT_DATA)
    left = writable() + most - resident()
    soft = left if before[0] == resource.RLIM_INFINITY else min(left, before[0])
    handle = register_module_forward_pre_hook(watch)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        handle.remove()


@contextmanager
def _free() -> Iterator[None]:
    yield


def _too_much(most: int | None) -> DeviceError:
    than = "this machine has" if most is None else f"the {size(most)} that are allowed here"
    return DeviceError(
        f"this work takes more memory than {than}",
        hint="`edge-client doctor --plan PLAN.toml` says what fits.",
    )
