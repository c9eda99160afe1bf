import hashlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farfield.protocols import parcel, sealing
from farfield.protocols.errors import MessageTooLarge
from farfield.protocols.parcel import Body, Parcel, cut, join

SMALL = 8
"""A frame size at which a few bytes are many frames."""


@pytest.fixture(autouse=True, scope="module")
def small_frames() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parcel, "FRAME_BYTES", SMALL)
        yield


kinds = st.sampled_from((bytes, bytearray, memoryview))
pieces = st.lists(st.tuples(st.binary(max_size=3 * SMALL), kinds).map(lambda one: one[1](one[0])), max_size=8)


@given(pieces)
def test_what_was_cut_is_joined_again(pieces: list[parcel.Buffer]) -> None:
    whole = b"".join(pieces)
    frames = list(cut(pieces))
    assert b"".join(frames) == whole
    assert all(len(frame) == SMALL for frame in frames[:-1])
    assert all(0 < len(frame) <= SMALL for frame in frames[-1:])
    assert all(type(frame) is bytes for frame in frames)
    body, travelling = Body(tuple(frames)), Parcel(b"head", list(frames))
    assert (body.size, body.digest) == (len(whole), hashlib.sha256(whole).digest())
    assert travelling.size == 4 + len(whole)
    joined = join(travelling.frames)
    assert (joined.tobytes(), joined.readonly, joined.nbytes) == (whole, True, len(whole))
    assert travelling.frames == []


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_frames_of_any_size_are_joined_in_order_and_used_up(frames: list[bytes]) -> None:
    whole = b"".join(frames)
    assert join(frames) == whole
    assert frames == []


@pytest.mark.parametrize("size", [0, 1, SMALL - 1, SMALL, SMALL + 1, 2 * SMALL - 1, 2 * SMALL, 2 * SMALL + 1])
@pytest.mark.parametrize("step", [1, 3, SMALL, 100])
def test_the_number_of_frames_depends_on_the_bytes_alone(size: int, step: int) -> None:
    whole = bytes(range(size))
    frames = list(cut(whole[at : at + step] for at in range(0, size, step)))
    assert [len(frame) for frame in frames] == [SMALL] * (size // SMALL) + [size % SMALL] * bool(size % SMALL)
    assert b"".join(frames) == whole


def test_what_no_sender_would_make_is_too_large() -> None:
    """A frame may be longer than those of a body by what a seal adds, and the sum counts the head."""
    assert parcel.OVERHEAD_BYTES == sealing.TAG_BYTES
    longest = SMALL + parcel.OVERHEAD_BYTES
    sent = Parcel(b"head", [bytes(longest), b"", bytes(longest)])
    sent.check(sent.size)
    Parcel(b"").check(0)
    with pytest.raises(MessageTooLarge, match=rf"a message of {sent.size} bytes\. The limit is {sent.size - 1}\."):
        sent.check(sent.size - 1)
    for frames in ([bytes(longest + 1)], [b"", bytes(longest), bytes(longest + 1)]):
        sent = Parcel(b"head", list(frames))
        with pytest.raises(MessageTooLarge, match=rf"a frame of {longest + 1} bytes\. They have at most {SMALL}\."):
            sent.check(10_000)
        assert sent.frames == frames


def test_frames_are_made_one_by_one() -> None:
    """Whoever seals or sends them never holds two copies of a body."""
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(SMALL)

    frames = cut(endless())
    assert [next(frames), next(frames)] == [bytes(SMALL)] * 2
    assert taken == 2


def test_a_later_change_of_the_source_does_not_reach_a_frame() -> None:
    source = bytearray(SMALL)
    (frame,) = cut([source])
    source[0] = 1
    assert frame == bytes(SMALL)


FREED = """
import sys
from pathlib import Path
from farfield.protocols.parcel import FRAME_BYTES, release_freed_frames

def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "released":
    release_freed_frames()
before = resident()
for _ in range(2):  # the first time glibc learns the size, the second time it keeps what is freed
    frames = [b"x" * FRAME_BYTES for _ in range(8)]
    kept = b"x" * 500_000  # at the end of the heap, where it keeps all that is freed below it
    frames.clear()
print((resident() - before) // FRAME_BYTES)
"""


def test_freed_frames_go_back_to_the_system() -> None:
    kept = {
        how: int(subprocess.run([sys.executable, "-c", FREED, how], capture_output=True, check=True).stdout)
        for how in ("as it is", "released")
    }
    assert kept["released"] == 0
    assert kept["as it is"] >= 4, "this C library does so by itself: the call is no longer needed"
