"""Sealing: what one private key can open, and only in the context that it was sealed for.

    K = HKDF-SHA256(X25519(ephemeral, recipient), salt = ephemeral ‖ recipient, info = context)
    frame i = AES-256-GCM(K, nonce = i ‖ last, frame i, associated data = context)

`seal` draws an ephemeral key for each message, and `lock` takes a key that is drawn for one; so K is used once, and
nonces may count from zero. The frames form the STREAM construction of Hoang, Reyhanitabar, Rogaway and Vizár (CRYPTO
2015): the position and a flag on the last one are part of the nonce, so frames can be neither reordered nor left out
nor cut off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .errors import TrustError

TAG_BYTES: Final = 16
KEY_BYTES: Final = 32


def lock(frames: Iterable[bytes], key: bytes, context: bytes) -> Iterator[bytes]:
    """The frames, each `TAG_BYTES` longer, made one by one.

    Args:
        frames: at least one; of none, nothing could tell that they had been cut off.
        key: 32 random bytes, never used for anything else.
    """
    cipher = AESGCM(key)
    for index, frame, last in _numbered(frames):
        yield cipher.encrypt(_nonce(index, last), frame, context)


def unlock(frames: Iterable[bytes], key: bytes, context: bytes) -> Iterator[bytes]:
    """The frames that were locked, one by one. Nothing may be done with them before the last one has come.

    Raises:
        TrustError: locked in another context or with another key, altered, reordered, cut short or missing.
    """
    cipher = AESGCM(key)
    index = None
    for index, frame, last in _numbered(frames):
        try:
            yield cipher.decrypt(_nonce(index, last), frame, context)
        except InvalidTag:
            raise TrustError("the seal does not hold: made for another round or node, or altered on the way") from None
    if index is None:
        raise TrustError("nothing is sealed here: all frames are missing")


def seal(frames: Iterable[bytes], recipient: bytes, context: bytes) -> tuple[bytes, Iterator[bytes]]:
    """The ephemeral public key, and the frames as `lock` makes them.

    Args:
        recipient: X25519 public key, 32 bytes.

    Raises:
        TrustError: `recipient` is no key.
    """
    ephemeral = X25519PrivateKey.generate()
    public = ephemeral.public_key().public_bytes_raw()
    return public, lock(frames, _shared(ephemeral, recipient, public + recipient, context), context)


def unseal(frames: Iterable[bytes], ephemeral: bytes, private: X25519PrivateKey, context: bytes) -> Iterator[bytes]:
    """The frames that were sealed, as `unlock` gives them. Raises TrustError as it does."""
    recipient = private.public_key().public_bytes_raw()
    return unlock(frames, _shared(private, ephemeral, ephemeral + recipient, context), context)


def _shared(private: X25519PrivateKey, public: bytes, salt: bytes, context: bytes) -> bytes:
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # not 32 bytes, or a point of small order
        raise TrustError("not a key that anything can be sealed with") from None
    return HKDF(hashes.SHA256(), KEY_BYTES, salt, context).derive(shared)


def _nonce(index: int, last: bool) -> bytes:
    return index.to_bytes(11, "big") + bytes([last])


def _numbered(frames: Iterable[bytes]) -> Iterator[tuple[int, bytes, bool]]:
    """Each frame with its position, and whether it is the last."""
    ahead = iter(frames)
    frame = next(ahead, None)
    index = 0
    while frame is not None:
        after = next(ahead, None)
        yield index, frame, after is None
        frame, index = after, index + 1
