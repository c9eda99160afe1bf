import ipaddress
import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farfield.coordinator.authority import Authority
from farfield.protocols import identity
from farfield.protocols.errors import EnrolmentError, HomeError, TrustError

NOW = datetime.now(UTC).replace(microsecond=0)
HOSTS = ["coordinator.example", "10.1.2.3"]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "keys", HOSTS, NOW)


def request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | Ed25519PrivateKey, name: str = "ann") -> bytes:
    """A signing request that asks for more than any node may have."""
    builder = x509.CertificateSigningRequestBuilder(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
        [
            x509.Extension(x509.BasicConstraints.oid, True, x509.BasicConstraints(ca=True, path_length=None)),
            x509.Extension(x509.ExtendedKeyUsage.oid, True, x509.ExtendedKeyUsage([identity.SIGNER_EKU])),
            x509.Extension(
                x509.SubjectAlternativeName.oid,
                False,
                x509.SubjectAlternativeName([x509.DNSName("coordinator.example")]),
            ),
        ],
    )
    signed = builder.sign(key, None if isinstance(key, Ed25519PrivateKey) else hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.DER)


def extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> object:
    return certificate.extensions.get_extension_for_class(kind).value


def shown(authority: Authority) -> x509.Certificate:
    """The server's own certificate."""
    return x509.load_pem_x509_certificates(authority.server_credentials().chain)[0]


# --- What is made ---------------------------------------------------------------------------------------------------


def test_only_the_owner_can_read_the_keys(authority: Authority) -> None:
    assert stat.S_IMODE(authority.folder.stat().st_mode) == 0o700
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in authority.folder.iterdir()}
    assert files == {f"{name}.{end}": 0o600 for name in ("ca", "server", "signer") for end in ("key", "pem")}


def test_the_authority_signs_certificates_and_nothing_else(authority: Authority) -> None:
    certificate = authority.certificate
    assert extension(certificate, x509.BasicConstraints) == x509.BasicConstraints(ca=True, path_length=0)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.key_cert_sign and not usage.value.digital_signature
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    assert certificate.not_valid_before_utc == NOW - timedelta(days=1)
    assert certificate.not_valid_after_utc == NOW + timedelta(days=3650)
    assert authority.fingerprint == certificate.fingerprint(hashes.SHA256())
    assert Authority(authority.folder).fingerprint == authority.fingerprint


def test_the_server_is_who_clients_and_this_machine_look_for(authority: Authority) -> None:
    leaf, root = x509.load_pem_x509_certificates(authority.server_credentials().chain)
    assert root == authority.certificate
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["coordinator.example", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address(one) for one in ("10.1.2.3", "127.0.0.1", "::1")
    ]
    assert extension(leaf, x509.ExtendedKeyUsage) == x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    assert "PRIVATE" not in repr(authority.server_credentials())


def test_clients_accept_the_signer(authority: Authority) -> None:
    signer = authority.signer()
    certificate = x509.load_der_x509_certificate(signer.certificate)
    key = identity.signer_key(certificate, authority.certificate, NOW)
    identity.verify(key, identity.sign(signer.key, "plan", b"a", b"b"), "plan", b"a", b"b")
    assert certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).critical
    assert "PRIVATE" not in repr(signer)


def test_nobody_else_is_accepted_as_the_signer(authority: Authority, tmp_path: Path) -> None:
    node = authority.issue_node(request(ec.generate_private_key(ec.SECP256R1())), "ann", NOW)
    other = Authority.create(tmp_path / "other", HOSTS, NOW)
    for certificate in (node, shown(authority), x509.load_der_x509_certificate(other.signer().certificate)):
        with pytest.raises(TrustError):
            identity.signer_key(certificate, authority.certificate, NOW)


# --- Nodes ----------------------------------------------------------------------------------------------------------


def test_a_node_gets_what_was_decided_and_not_what_it_asked_for(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority.issue_node(request(key, name="coordinator"), "ann", NOW)
    certificate.verify_directly_issued_by(authority.certificate)
    assert certificate.subject.rfc4514_string() == "CN=ann"
    assert certificate.public_key() == key.public_key()
    assert extension(certificate, x509.BasicConstraints) == x509.BasicConstraints(ca=False, path_length=None)
    assert extension(certificate, x509.ExtendedKeyUsage) == x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    with pytest.raises(x509.ExtensionNotFound):
        extension(certificate, x509.SubjectAlternativeName)
    assert certificate.not_valid_before_utc == NOW - timedelta(days=1)
    assert certificate.not_valid_after_utc == NOW + timedelta(days=365)


def test_every_certificate_has_a_serial_number_of_its_own(authority: Authority) -> None:
    asked = request(ec.generate_private_key(ec.SECP256R1()))
    assert len({authority.issue_node(asked, "ann", NOW).serial_number for _ in range(8)}) == 8


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP256K1()),
        rsa.generate_private_key(65537, 2048),
        Ed25519PrivateKey.generate(),
    ],
    ids=["P-384", "secp256k1", "RSA", "Ed25519"],
)
def test_a_node_has_a_p256_key(
    authority: Authority, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | Ed25519PrivateKey
) -> None:
    with pytest.raises(EnrolmentError, match="the signing request of ann: another key than NIST P-256"):
        authority.issue_node(request(key), "ann", NOW)


def test_a_request_is_signed_by_the_key_in_it(authority: Authority) -> None:
    """Or anyone could get a certificate for a key that is another's."""
    point = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    mine, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    asked = request(mine)
    for was, becomes in (
        (mine.public_key().public_bytes(*point), other.public_key().public_bytes(*point)),
        (b"ann", b"bob"),
    ):
        assert was in asked
        with pytest.raises(EnrolmentError, match="not signed by the key in it"):
            authority.issue_node(asked.replace(was, becomes), "ann", NOW)


def test_a_node_has_a_name_that_nodes_may_have(authority: Authority) -> None:
    with pytest.raises(EnrolmentError, match="no name for a node"):
        authority.issue_node(request(ec.generate_private_key(ec.SECP256R1())), "a b", NOW)


REQUEST = request(ec.generate_private_key(ec.SECP256R1()))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(REQUEST) - 1), value=st.integers(1, 255), cut=st.booleans())
def test_no_altered_request_gets_a_certificate_for_another_key(
    authority: Authority, position: int, value: int, cut: bool
) -> None:
    """Beside what is signed there are a few bits that the parser takes in either way; the key is not among them."""
    altered = bytearray(REQUEST[:position] if cut else REQUEST)
    if not cut:
        altered[position] ^= value
    try:
        issued = authority.issue_node(bytes(altered), "ann", NOW)
    except EnrolmentError:
        return
    assert not cut and issued.public_key() == x509.load_der_x509_csr(REQUEST).public_key()


@pytest.mark.parametrize("version", [1, 2, 255])
def test_a_request_of_another_version_gets_no_certificate(authority: Authority, version: int) -> None:
    assert REQUEST.count(b"\2\1\0") >= 1
    altered = REQUEST.replace(b"\2\1\0", bytes([2, 1, version]), 1)
    with pytest.raises(EnrolmentError, match="the signing request of ann: not a signing request"):
        authority.issue_node(altered, "ann", NOW)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_no_request_gets_no_certificate(authority: Authority, raw: bytes) -> None:
    with pytest.raises(EnrolmentError, match="not a signing request"):
        authority.issue_node(raw, "ann", NOW)


# --- A real handshake -----------------------------------------------------------------------------------------------


def test_a_client_and_the_server_trust_each_other(authority: Authority, tmp_path: Path) -> None:
    """By OpenSSL, with what the two of them have: chain, pinned authority, client certificate, hostname."""
    credentials = authority.server_credentials()
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority.issue_node(request(key), "ann", NOW)
    files = {
        "server.pem": credentials.chain + credentials.key,
        "ca.pem": credentials.authority,
        "node.pem": certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tmp_path / "ca.pem")
    serving.verify_mode = ssl.CERT_REQUIRED
    serving.load_cert_chain(tmp_path / "server.pem")
    calling = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    calling.load_cert_chain(tmp_path / "node.pem")
    for context in (serving, calling):
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    here, there = socket.socketpair()
    received = []

    def call() -> None:
        with calling.wrap_socket(there, server_hostname="10.1.2.3") as connection:
            received.append(connection.recv(1))

    client = threading.Thread(target=call)
    client.start()
    with serving.wrap_socket(here, server_side=True) as connection:
        subject = dict(pair[0] for pair in connection.getpeercert()["subject"])  # type: ignore[index,misc]
        connection.sendall(b"x")
        client.join()
    assert received == [b"x"]
    assert subject == {"commonName": "ann"}


# --- Renewal --------------------------------------------------------------------------------------------------------


def test_days_are_counted(authority: Authority) -> None:
    assert authority.days_left(NOW) == {"server": 365, "signer": 365, "authority": 3650}
    assert authority.days_left(NOW + timedelta(days=335, hours=1))["server"] == 29
    assert authority.days_left(NOW + timedelta(days=366))["signer"] == -1


def test_what_is_due_is_renewed_and_the_keys_stay(authority: Authority) -> None:
    before = {path.name: path.read_bytes() for path in authority.folder.iterdir()}
    assert authority.renew(HOSTS, NOW + timedelta(days=335)) == []
    later = NOW + timedelta(days=335, seconds=1)
    assert authority.renew(HOSTS, later) == ["server", "signer"]
    after = {path.name: path.read_bytes() for path in authority.folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"server.pem", "signer.pem"}
    assert authority.days_left(later) == {"server": 365, "signer": 365, "authority": 3314}
    assert authority.renew(HOSTS, later) == []
    signer = x509.load_der_x509_certificate(authority.signer().certificate)
    identity.signer_key(signer, authority.certificate, later)


def test_each_can_be_renewed_by_itself(authority: Authority) -> None:
    later = NOW + timedelta(days=100)
    authority.renew_signer(later)
    assert authority.days_left(later) == {"server": 265, "signer": 365, "authority": 3550}
    authority.renew_server(HOSTS, later)
    assert authority.days_left(later)["server"] == 365


def test_other_hostnames_make_another_server_certificate(authority: Authority) -> None:
    assert authority.renew([*HOSTS, "new.example"], NOW) == ["server"]
    names = shown(authority).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "new.example" in names.get_values_for_type(x509.DNSName)
    assert authority.renew(["new.example", *HOSTS], NOW) == []


@pytest.mark.parametrize("name", ["server", "signer"])
def test_a_key_that_was_removed_is_made_anew(authority: Authority, name: str) -> None:
    before = (authority.folder / f"{name}.key").read_bytes()
    (authority.folder / f"{name}.key").unlink()
    assert authority.renew(HOSTS, NOW) == [name]
    assert (authority.folder / f"{name}.key").read_bytes() != before
    assert shown(authority).public_key() == key_of(authority, "server")
    signer = x509.load_der_x509_certificate(authority.signer().certificate)
    assert signer.public_key() == authority.signer().key.public_key()


def key_of(authority: Authority, name: str) -> object:
    key = serialization.load_pem_private_key((authority.folder / f"{name}.key").read_bytes(), None)
    return key.public_key()


def test_nothing_outlives_the_authority(authority: Authority) -> None:
    late = NOW + timedelta(days=3600)
    authority.renew_server(HOSTS, late)
    assert shown(authority).not_valid_after_utc == authority.certificate.not_valid_after_utc


@pytest.mark.parametrize("now", [NOW - timedelta(days=2), NOW + timedelta(days=3650)])
def test_an_authority_that_is_not_valid_issues_nothing(authority: Authority, now: datetime) -> None:
    with pytest.raises(TrustError, match=r"certificate authority: valid from .* Set this machine's clock"):
        authority.renew_signer(now)
    with pytest.raises(TrustError):
        authority.issue_node(REQUEST, "ann", now)


# --- Damage ---------------------------------------------------------------------------------------------------------


def test_damage_names_the_file(authority: Authority) -> None:
    (authority.folder / "server.key").write_bytes((authority.folder / "signer.key").read_bytes())
    with pytest.raises(HomeError, match=r"keys/server.key: damaged, or another kind of key\. Restore"):
        authority.server_credentials()
    (authority.folder / "signer.key").write_bytes(b"junk")
    with pytest.raises(HomeError, match=r"keys/signer.key: damaged"):
        authority.signer()
    (authority.folder / "signer.key").unlink()
    with pytest.raises(HomeError, match=r"keys/signer.key: cannot be read: no such file"):
        authority.signer()
    (authority.folder / "ca.pem").write_bytes(b"junk")
    with pytest.raises(HomeError, match=r"keys/ca.pem: not a certificate"):
        Authority(authority.folder)


def test_what_a_crash_left_behind_is_in_nobodys_way(authority: Authority) -> None:
    partial = authority.folder / "server.pem.partial"
    partial.write_bytes(b"half a certif")
    partial.chmod(0o644)
    authority.renew_server(HOSTS, NOW)
    assert not partial.exists()
    assert stat.S_IMODE((authority.folder / "server.pem").stat().st_mode) == 0o600


def test_keys_are_never_overwritten(authority: Authority) -> None:
    with pytest.raises(HomeError, match="cannot be written: file exists"):
        Authority.create(authority.folder, HOSTS, NOW)
