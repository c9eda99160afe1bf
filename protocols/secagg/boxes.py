"""The keys of a session: what two clients agree on, and the boxes in which shares travel from one to the other.

    S          = X25519(private key of one, public key of the other)
    mask key   = HKDF-SHA256(S of the mask keys, info = "mask" ‖ session ‖ both names in ascending order)
    box key    = HKDF-SHA256(S of the box keys, info = "box" ‖ session ‖ dealer ‖ holder)
    own mask   = HKDF-SHA256(seed, info = "own mask" ‖ session ‖ name)
    box        = AES-256-GCM(box key, nonce = 0, share of the seed ‖ share of the mask key, associated data = info)

`session` is the digest of all that the session's members have been told before they shared anything: the Open, the
roster, the randomness of the graph. Clients that were told different things get keys that have nothing to do with one
another: their boxes do not open, and their masks do not cancel. Each box key is used once, hence the fixed nonce.
"""

from __future__ import annotations

import hashlib
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from farfield.protocols.errors import SecAggError
from farfield.protocols.identity import statement

from .masks import KEY_BYTES
from .shamir import SHARE_BYTES

BOX_BYTES: Final = 2 * SHARE_BYTES + 16

_NONCE: Final = bytes(12)


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """The secret that both sides come to, 32 bytes. Raises SecAggError when `public` is no key."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # a point of small order
        raise SecAggError("an X25519 key with which nothing can be agreed on") from None


def pair_key(secret: bytes, session: bytes, one: str, other: str) -> bytes:
    """The key of the mask between two clients, whichever of them is `one`."""
    first, second = sorted((one, other))
    return _derived(secret, _info("mask", session, first, second))


def own_key(seed: bytes, session: bytes, name: str) -> bytes:
    """The key of the mask that a client adds for itself."""
    return _derived(seed, _info("own mask", session, name))


def box_key(secret: bytes, session: bytes, dealer: str, holder: str) -> bytes:
    return _derived(secret, _info("box", session, dealer, holder))


def close_box(key: bytes, shares: tuple[bytes, bytes], session: bytes, dealer: str, holder: str) -> bytes:
    """The box with the shares of a dealer's seed and mask key, `BOX_BYTES` long."""
    return AESGCM(key).encrypt(_NONCE, shares[0] + shares[1], _info("box", session, dealer, holder))


def open_box(key: bytes, box: bytes, session: bytes, dealer: str, holder: str) -> tuple[bytes, bytes]:
    """The shares. Raises SecAggError when they were put in for another session or holder, or by somebody else."""
    try:
        shares = AESGCM(key).decrypt(_NONCE, box, _info("box", session, dealer, holder))
    except InvalidTag:
        raise SecAggError("the box does not open: of another session, or altered on the way", where=dealer) from None
    if len(shares) != 2 * SHARE_BYTES:
        raise SecAggError(f"a box with {len(shares)} bytes in it", where=dealer)
    return shares[:SHARE_BYTES], shares[SHARE_BYTES:]


def share_digests(shares: tuple[bytes, bytes], session: bytes, dealer: str, holder: str) -> tuple[bytes, bytes]:
    """What a dealer tells the server of the shares in a box, so that the server knows them when they are revealed."""
    info = _info("share", session, dealer, holder)
    return commitment("share of a seed", shares[0], info), commitment("share of a key", shares[1], info)


def commitment(kind: str, secret: bytes, *context: bytes) -> bytes:
    """SHA-256 of a statement about a secret: says nothing about 32 random bytes, and nobody finds others that fit."""
    return hashlib.sha256(statement(f"secagg {kind}", secret, *context)).digest()


def _info(kind: str, session: bytes, *names: str) -> bytes:
    return statement(f"secagg {kind}", session, *(name.encode() for name in names))


def _derived(secret: bytes, info: bytes) -> bytes:
    return HKDF(hashes.SHA256(), KEY_BYTES, None, info).derive(secret)
