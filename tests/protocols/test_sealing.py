from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from farfield.protocols.errors import TrustError
from farfield.protocols.sealing import KEY_BYTES, TAG_BYTES, lock, seal, unlock, unseal

KEY = X25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes_raw()
CONTEXT = b"run, round, node"
FRAMES = [b"head", b"first", b"", b"second", b"first"]

frames = st.lists(st.binary(max_size=40), min_size=1, max_size=6)
Sealed = tuple[bytes, list[bytes]]


def sealed(plain: list[bytes] = FRAMES, context: bytes = CONTEXT) -> Sealed:
    ephemeral, closed = seal(plain, PUBLIC, context)
    return ephemeral, list(closed)


def refused(closed: list[bytes], ephemeral: bytes, key: X25519PrivateKey = KEY, context: bytes = CONTEXT) -> None:
    with pytest.raises(TrustError):
        list(unseal(closed, ephemeral, key, context))


@given(frames, st.binary(max_size=40))
def test_what_was_sealed_is_unsealed(plain: list[bytes], context: bytes) -> None:
    ephemeral, closed = sealed(plain, context)
    assert [len(frame) for frame in closed] == [len(frame) + TAG_BYTES for frame in plain]
    assert list(unseal(closed, ephemeral, KEY, context)) == plain


def test_the_construction_is_the_one_that_the_docstring_states() -> None:
    """Written out a second time, so that a change of it does not go unseen: it would be another wire version."""
    ephemeral, closed = sealed()
    shared = KEY.exchange(X25519PublicKey.from_public_bytes(ephemeral))
    key = HKDF(hashes.SHA256(), 32, salt=ephemeral + PUBLIC, info=CONTEXT).derive(shared)
    for index, (frame, plain) in enumerate(zip(closed, FRAMES, strict=True)):
        nonce = index.to_bytes(11, "big") + (b"\1" if frame is closed[-1] else b"\0")
        assert AESGCM(key).decrypt(nonce, frame, CONTEXT) == plain


SECRET = bytes(range(KEY_BYTES))


@given(frames, st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), st.binary(max_size=40))
def test_what_was_locked_is_unlocked(plain: list[bytes], key: bytes, context: bytes) -> None:
    closed = list(lock(plain, key, context))
    assert [len(frame) for frame in closed] == [len(frame) + TAG_BYTES for frame in plain]
    assert list(unlock(closed, key, context)) == plain
    for other, around in ((bytes(one ^ 1 for one in key), context), (key, context + b"\0"), (key, context[:-1])):
        if (other, around) != (key, context):
            with pytest.raises(TrustError, match="the seal does not hold"):
                list(unlock(closed, other, around))


def test_a_seal_is_a_lock_whose_key_two_people_can_make() -> None:
    """So all that is shown of sealed frames below holds for locked ones."""
    ephemeral, closed = sealed()
    shared = KEY.exchange(X25519PublicKey.from_public_bytes(ephemeral))
    key = HKDF(hashes.SHA256(), KEY_BYTES, salt=ephemeral + PUBLIC, info=CONTEXT).derive(shared)
    assert closed == list(lock(FRAMES, key, CONTEXT))
    assert list(unlock(closed, key, CONTEXT)) == FRAMES


def test_frames_are_locked_and_unlocked_one_by_one() -> None:
    """A frame is gone as soon as it was used: a large body is never twice in memory."""
    taken = 0

    def counted(some: list[bytes]) -> Iterator[bytes]:
        nonlocal taken
        for frame in some:
            taken += 1
            yield frame

    closing = lock(counted([b"x"] * 9), SECRET, CONTEXT)
    closed = [next(closing)]
    assert taken == 2
    closed += closing
    taken = 0
    assert next(unlock(counted(closed), SECRET, CONTEXT)) == b"x"
    assert taken == 2


def test_nothing_locked_is_told_from_everything_lost() -> None:
    with pytest.raises(TrustError, match="all frames are missing"):
        list(unlock([], SECRET, CONTEXT))
    empty = list(lock([b""], SECRET, CONTEXT))
    assert [len(frame) for frame in empty] == [TAG_BYTES]
    assert list(unlock(empty, SECRET, CONTEXT)) == [b""]


@given(frames, st.data())
def test_any_other_sequence_of_locked_frames_is_refused(plain: list[bytes], data: st.DataObject) -> None:
    closed = list(lock(plain, SECRET, CONTEXT))
    other = data.draw(st.lists(st.sampled_from(closed), max_size=8).filter(lambda some: some != closed))
    with pytest.raises(TrustError):
        list(unlock(other, SECRET, CONTEXT))


def test_the_same_frames_are_never_sealed_alike() -> None:
    (one, first), (other, second) = sealed(), sealed()
    assert one != other
    assert not set(first) & set(second)
    assert first[1][:-TAG_BYTES] != first[4][:-TAG_BYTES]  # the same frame at another position


def test_frames_are_sealed_and_unsealed_one_by_one() -> None:
    taken = 0

    def counted(some: list[bytes]) -> Iterator[bytes]:
        nonlocal taken
        for frame in some:
            taken += 1
            yield frame

    ephemeral, closing = seal(counted([b"x"] * 9), PUBLIC, CONTEXT)
    closed = [next(closing)]
    assert taken == 2  # this frame, and the next to know that it is not the last
    closed += closing
    taken = 0
    assert next(unseal(counted(closed), ephemeral, KEY, CONTEXT)) == b"x"
    assert taken == 2


def test_every_altered_bit_is_refused() -> None:
    ephemeral, closed = sealed()
    for position, frame in enumerate(closed):
        for bit in range(8 * len(frame)):
            altered = bytearray(frame)
            altered[bit // 8] ^= 1 << bit % 8
            refused([*closed[:position], bytes(altered), *closed[position + 1 :]], ephemeral)
    for bit in range(8 * KEY_BYTES):
        public = bytearray(ephemeral)
        public[bit // 8] ^= 1 << bit % 8
        refused(closed, bytes(public))  # also the top bit, which X25519 itself ignores


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "nothing left": lambda closed: [],
    "the last one dropped": lambda closed: closed[:-1],
    "cut to the first": lambda closed: closed[:1],
    "cut to the last": lambda closed: closed[-1:],
    "two swapped": lambda closed: [closed[0], closed[2], closed[1], *closed[3:]],
    "first and last swapped": lambda closed: [closed[-1], *closed[1:-1], closed[0]],
    "reversed": lambda closed: closed[::-1],
    "one twice": lambda closed: [*closed[:2], *closed[1:]],
    "the last twice": lambda closed: [*closed, closed[-1]],
    "an empty frame more": lambda closed: [*closed, b""],
    "a frame of zeros more": lambda closed: [*closed, bytes(TAG_BYTES)],
    "the whole twice": lambda closed: closed * 2,
    "a frame cut": lambda closed: [closed[0], closed[1][:-1], *closed[2:]],
    "a frame cut below the tag": lambda closed: [closed[0], closed[1][: TAG_BYTES - 1], *closed[2:]],
    "a frame emptied": lambda closed: [closed[0], b"", *closed[2:]],
    "a frame longer": lambda closed: [closed[0], closed[1] + b"\0", *closed[2:]],
    "two made one": lambda closed: [closed[0] + closed[1], *closed[2:]],
    "one made two": lambda closed: [closed[0][:8], closed[0][8:], *closed[1:]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_frames_can_be_neither_moved_nor_lost_nor_added(change: str) -> None:
    ephemeral, closed = sealed()
    refused(CHANGES[change](closed), ephemeral)


@given(frames, st.data())
def test_any_other_sequence_of_the_same_frames_is_refused(plain: list[bytes], data: st.DataObject) -> None:
    ephemeral, closed = sealed(plain)
    other = data.draw(st.lists(st.sampled_from(closed), max_size=8).filter(lambda some: some != closed))
    refused(other, ephemeral)


@given(frames)
def test_frames_of_two_replies_cannot_be_mixed(plain: list[bytes]) -> None:
    (one, first), (_, second) = sealed(plain), sealed(plain)
    for position in range(len(plain)):
        refused([*first[:position], second[position], *first[position + 1 :]], one)
    refused(second, one)


@given(frames, st.binary(max_size=40))
def test_another_context_is_refused(plain: list[bytes], context: bytes) -> None:
    ephemeral, closed = sealed(plain)
    if context != CONTEXT:
        refused(closed, ephemeral, context=context)
    for near in (b"", CONTEXT[:-1], CONTEXT + b"\0"):
        refused(closed, ephemeral, context=near)


@given(frames)
def test_another_key_is_refused(plain: list[bytes]) -> None:
    ephemeral, closed = sealed(plain)
    refused(closed, ephemeral, key=X25519PrivateKey.generate())
    refused(closed, X25519PrivateKey.generate().public_key().public_bytes_raw())


NO_KEYS = [
    pytest.param(bytes(32), id="zero"),
    pytest.param(b"\1" + bytes(31), id="one"),
    pytest.param(bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"), id="order 8"),
    pytest.param(bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"), id="also order 8"),
    pytest.param(b"\xec" + b"\xff" * 30 + b"\x7f", id="p - 1"),
    pytest.param(b"\xed" + b"\xff" * 30 + b"\x7f", id="p"),
    pytest.param(b"\xee" + b"\xff" * 30 + b"\x7f", id="p + 1"),
    pytest.param(b"", id="empty"),
    pytest.param(PUBLIC[:-1], id="short"),
    pytest.param(PUBLIC + b"\0", id="long"),
]
"""Points of small order (with them everybody knows the shared secret), and what is no point."""


@pytest.mark.parametrize("key", NO_KEYS)
def test_what_is_no_key_is_neither_sealed_to_nor_unsealed_with(key: bytes) -> None:
    with pytest.raises(TrustError, match="not a key"):
        seal(FRAMES, key, CONTEXT)
    refused(sealed()[1], key)


@given(st.lists(st.binary(max_size=60), max_size=4), st.binary(max_size=40))
def test_bytes_from_nowhere_are_refused(closed: list[bytes], ephemeral: bytes) -> None:
    refused(closed, ephemeral)
    refused(closed, PUBLIC)
