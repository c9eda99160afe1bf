import string
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.protocols.errors import EnrolmentError, TrustError
from farfield.protocols.identity import (
    ENROLMENT,
    SIGNER_EKU,
    Token,
    check_name,
    enrolment_parts,
    fingerprint,
    sign,
    signer_key,
    statement,
    verify,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
TOKENS = st.builds(Token, st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32))

# --- Tokens ---------------------------------------------------------------------------------------------------------


@given(TOKENS, st.sampled_from(["", " ", "\n", "\t\r\n"]))
def test_a_token_reads_back(token: Token, around: str) -> None:
    """Whitespace around it is what copying brings along."""
    assert Token.parse(around + token.text() + around) == token
    assert not set(token.text()) - set(string.ascii_letters + string.digits + "-_.")


@settings(max_examples=5)  # each of thousands of texts
@given(TOKENS)
def test_any_one_character_altered_is_refused(token: Token) -> None:
    text = token.text()
    for position, was in enumerate(text):
        for other in string.ascii_letters + string.digits + "-_+/=. é":
            if other == was or (other == " " and position in (0, len(text) - 1)):
                continue
            with pytest.raises(EnrolmentError):
                Token.parse(text[:position] + other + text[position + 1 :])


@given(TOKENS, st.integers(0, 79), st.sampled_from(string.ascii_letters))
def test_a_token_with_a_character_more_or_less_is_refused(token: Token, position: int, added: str) -> None:
    text = token.text()
    for altered in (
        text[:position] + text[position + 1 :],
        text[:position] + added + text[position:],
        text + added,
        text + "=",
        text + "==",
    ):
        with pytest.raises(EnrolmentError):
            Token.parse(altered)


@given(st.text(max_size=120))
def test_any_other_text_is_refused(text: str) -> None:
    for one in (text, "farfield1." + text):
        with pytest.raises(EnrolmentError, match=r"^--token: "):
            Token.parse(one)


def test_a_token_does_not_show_its_secret() -> None:
    token = Token(b"s" * 16, b"a" * 32)
    assert "s" * 3 not in repr(token) and token.text() not in repr(token)


# --- Names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "7", "St-Mary.ward_3+b", "x" * 64])
def test_a_name_that_a_node_may_have(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", ".", "..", "_a", "a b", "a\n", "\na", "a/b", "a\\b", "é", "x" * 65, "a\0"])
def test_a_name_that_no_node_may_have(name: str) -> None:
    with pytest.raises(EnrolmentError, match="no name for a node"):
        check_name(name)


# --- Signatures -----------------------------------------------------------------------------------------------------

KEY = Ed25519PrivateKey.generate()


@given(st.text(max_size=9), st.lists(st.binary(max_size=9), max_size=4))
def test_a_signature_holds_for_what_was_signed(domain: str, parts: list[bytes]) -> None:
    verify(KEY.public_key(), sign(KEY, domain, *parts), domain, *parts)


@given(
    st.tuples(st.sampled_from(["plan", "task"]), st.lists(st.binary(max_size=2), max_size=3)),
    st.tuples(st.sampled_from(["plan", "task"]), st.lists(st.binary(max_size=2), max_size=3)),
)
def test_a_signature_holds_for_nothing_else(one: tuple[str, list[bytes]], other: tuple[str, list[bytes]]) -> None:
    """Not even where the parts are the same bytes, cut in other places."""
    signature = sign(KEY, one[0], *one[1])
    if one != other:
        with pytest.raises(TrustError, match=f"the signature on this {other[0]} does not hold"):
            verify(KEY.public_key(), signature, other[0], *other[1])


@given(
    st.tuples(st.text(max_size=3), st.lists(st.binary(max_size=3), max_size=3)),
    st.tuples(st.text(max_size=3), st.lists(st.binary(max_size=3), max_size=3)),
)
def test_no_two_statements_are_the_same_bytes(one: tuple[str, list[bytes]], other: tuple[str, list[bytes]]) -> None:
    """Nor does one begin with another of as many parts."""
    first, second = statement(one[0], *one[1]), statement(other[0], *other[1])
    assert (first == second) == (one == other)
    if len(one[1]) == len(other[1]) and one != other:
        assert not first.startswith(second)


def test_a_statement_is_written_as_it_is_signed() -> None:
    """Each piece with its length in front, in 8 bytes: another way of writing would be another wire version."""
    written = statement("task", b"", b"ab")
    assert written == bytes(7) + b"\x0dfarfield task" + bytes(8) + bytes(7) + b"\x02ab"
    KEY.public_key().verify(sign(KEY, "task", b"", b"ab"), written)


@given(st.integers(0, 64 * 8 - 1))
def test_an_altered_signature_does_not_hold(bit: int) -> None:
    signature = bytearray(sign(KEY, "plan", b"x"))
    signature[bit // 8] ^= 1 << bit % 8
    with pytest.raises(TrustError):
        verify(KEY.public_key(), bytes(signature), "plan", b"x")


@pytest.mark.parametrize("signature", [b"", b"x" * 63, b"x" * 65])
def test_a_signature_of_another_length_does_not_hold(signature: bytes) -> None:
    with pytest.raises(TrustError):
        verify(KEY.public_key(), signature, "plan", b"x")


def test_another_key_is_another_signer() -> None:
    with pytest.raises(TrustError):
        verify(Ed25519PrivateKey.generate().public_key(), sign(KEY, "plan", b"x"), "plan", b"x")


def test_what_is_signed_at_enrolment_names_everything_that_is_sent() -> None:
    parts = enrolment_parts(b"secret", "ann", b"request", b"fleet", b"signing", b"sealing")
    assert parts == [b"secret", b"ann", b"request", b"fleet", b"signing", b"sealing"]
    proof = sign(KEY, ENROLMENT, *parts)
    verify(KEY.public_key(), proof, ENROLMENT, *parts)
    for index in range(len(parts)):
        with pytest.raises(TrustError, match="the signature on this enrolment does not hold"):
            verify(KEY.public_key(), proof, ENROLMENT, *parts[:index], parts[index] + b"!", *parts[index + 1 :])


# --- The signer's certificate ---------------------------------------------------------------------------------------


def certificate(
    issuer: ec.EllipticCurvePrivateKey,
    *,
    issuer_name: str = "authority",
    key: Ed25519PublicKey | ec.EllipticCurvePublicKey | None = None,
    purposes: list[x509.ObjectIdentifier] | None = None,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer_name)]))
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority" if key is None else "leaf")]))
        .public_key(key or issuer.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=365))
    )
    if purposes is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=True)
    return builder.sign(issuer, hashes.SHA384())


AUTHORITY_KEY = ec.generate_private_key(ec.SECP384R1())
AUTHORITY = certificate(AUTHORITY_KEY)


def signer(**changes: object) -> x509.Certificate:
    given_: dict[str, object] = {"key": KEY.public_key(), "purposes": [SIGNER_EKU], **changes}
    return certificate(AUTHORITY_KEY, **given_)  # type: ignore[arg-type]


def test_the_signers_key_is_that_of_its_certificate() -> None:
    assert signer_key(signer(), AUTHORITY, NOW) == KEY.public_key()


@pytest.mark.parametrize("now", [NOW - timedelta(days=1), NOW + timedelta(days=365)])
def test_the_first_and_the_last_moment_count(now: datetime) -> None:
    assert signer_key(signer(), AUTHORITY, now) == KEY.public_key()


@pytest.mark.parametrize("now", [NOW - timedelta(days=1, seconds=1), NOW + timedelta(days=365, seconds=1)])
def test_a_signer_is_not_valid_for_ever(now: datetime) -> None:
    with pytest.raises(TrustError, match=r"valid from 2026-02-28 to 2027-03-01, and this machine's clock says .* Set"):
        signer_key(signer(), AUTHORITY, now)


STRANGER = ec.generate_private_key(ec.SECP384R1())


@pytest.mark.parametrize(
    "wrong",
    [
        certificate(STRANGER, key=KEY.public_key(), purposes=[SIGNER_EKU]),  # the name, but not the key
        certificate(STRANGER, issuer_name="other", key=KEY.public_key(), purposes=[SIGNER_EKU]),
        certificate(AUTHORITY_KEY, issuer_name="other", key=KEY.public_key(), purposes=[SIGNER_EKU]),
    ],
    ids=["key", "both", "name"],
)
def test_another_authority_makes_no_signer(wrong: x509.Certificate) -> None:
    with pytest.raises(TrustError, match="not issued by the authority that was pinned"):
        signer_key(wrong, AUTHORITY, NOW)


@pytest.mark.parametrize(
    "purposes",
    [None, [ExtendedKeyUsageOID.CLIENT_AUTH], [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CODE_SIGNING]],
)
def test_a_certificate_for_another_purpose_makes_no_signer(purposes: list[x509.ObjectIdentifier] | None) -> None:
    """A node's certificate is issued by the same authority."""
    with pytest.raises(TrustError, match="issued for another purpose"):
        signer_key(signer(purposes=purposes), AUTHORITY, NOW)


def test_a_signer_has_an_ed25519_key() -> None:
    with pytest.raises(TrustError, match="not an Ed25519 key"):
        signer_key(signer(key=STRANGER.public_key()), AUTHORITY, NOW)


def test_a_fingerprint_is_sha256_of_the_certificate() -> None:
    assert fingerprint(AUTHORITY) == AUTHORITY.fingerprint(hashes.SHA256())
    assert len(fingerprint(AUTHORITY)) == 32
    assert fingerprint(AUTHORITY) != fingerprint(certificate(AUTHORITY_KEY))
