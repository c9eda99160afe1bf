"""The keys of an edge client: none shows, and one that is damaged is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from farfield.edge_client.keys import Keys
from farfield.protocols.errors import HomeError

KEYS = Keys(b"authority", b"certificate", b"tls secret", b"fleet secret", b"signing secret", b"sealing secret")


def pem(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(HomeError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_keys_do_not_show_secrets() -> None:
    assert "secret" not in repr(KEYS)


@pytest.mark.parametrize(
    "read",
    [
        Keys.authority_certificate,
        Keys.node_certificate,
        Keys.tls_key,
        Keys.fleet_key,
        Keys.signing_key,
        Keys.sealing_key,
        Keys.identity,
    ],
)
def test_a_key_that_is_damaged_is_named(read: Callable[[Keys], object]) -> None:
    said = refused(lambda: read(KEYS))
    assert said.startswith("keys/") and "not a" in said


def test_a_key_of_another_kind_is_refused_by_name() -> None:
    signs, opens = pem(Ed25519PrivateKey.generate()), pem(X25519PrivateKey.generate())
    for keys, said in (
        (replace(KEYS, signing=signs, sealing=signs), "keys/sealing.key: not an X25519 key"),
        (replace(KEYS, signing=opens, sealing=opens), "keys/signing.key: not an Ed25519 key"),
    ):
        assert refused(keys.identity).startswith(said)
