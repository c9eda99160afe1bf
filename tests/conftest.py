"""Settings of every test: a shared machine is no stopwatch, so hypothesis sets no deadline."""

import hashlib
import itertools
from types import SimpleNamespace

import pytest
from hypothesis import settings

from farfield.protocols import randomness

settings.register_profile("farfield", deadline=None)
settings.load_profile("farfield")


@pytest.fixture
def repeatable_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that is the same in every run of a test: what holds at 95 % would else fail once in twenty."""
    count = itertools.count()

    def token_bytes(size: int) -> bytes:
        return hashlib.shake_256(str(next(count)).encode()).digest(size)

    monkeypatch.setattr(randomness, "secrets", SimpleNamespace(token_bytes=token_bytes))
