"""The healthcheck of each image, run against a home whose service lives, and one whose service does not."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import commands
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from dockerfile import Dockerfile

from farfield.coordinator.home import Home
from farfield.edge_client.home import Home as EdgeHome
from farfield.edge_client.keys import Keys
from farfield.edge_client.settings import CoordinatorSettings, DataSettings, NodeSettings, Settings

FOLDER = Path(__file__).parents[2] / "deploy" / "docker"
NOW = datetime.now(UTC)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    commands.install(folder)
    return folder


def healthy(name: str, home: Path, programs: Path) -> bool:
    text = (FOLDER / f"{name}.Dockerfile").read_text(encoding="utf-8")
    file = Dockerfile.parse(text, FOLDER)
    (variable,) = (key for key, value in file.variables().items() if value == f"/var/lib/farfield/{name}")
    words = json.loads(file.texts("HEALTHCHECK")[0].partition("CMD ")[2])
    environment = {**os.environ, variable: str(home), "PATH": f"{programs}:/usr/bin:/bin"}
    return subprocess.run(words, env=environment, capture_output=True).returncode == 0


def test_a_coordinator_is_healthy_while_its_service_says_so(tmp_path: Path, programs: Path) -> None:
    path = tmp_path / "home"
    assert not healthy("coordinator", path, programs), "there is no home"
    store = Home.create(path, ["localhost"], NOW).store()
    try:
        assert not healthy("coordinator", path, programs), "nothing serves"
        store.beat(os.getpid(), datetime.now(UTC))
        assert healthy("coordinator", path, programs)
        store.beat(os.getpid(), datetime.now(UTC) - timedelta(hours=1))
        assert not healthy("coordinator", path, programs), "what served has hung"
    finally:
        store.close()


def test_an_edge_client_is_healthy_while_its_process_lives(tmp_path: Path, programs: Path) -> None:
    path = tmp_path / "home"
    assert not healthy("edge-client", path, programs), "it has not joined"
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "edge-1")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1))
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    settings = Settings(
        coordinator=CoordinatorSettings(host="coordinator", enrolment_port=9094, fleet_port=9092, federation_port=9093),
        node=NodeSettings(name="edge-1"),
        data=DataSettings(path="/data"),
    )
    signing, sealing = (
        one.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        for one in (Ed25519PrivateKey.generate(), X25519PrivateKey.generate())
    )
    home = EdgeHome.create(path, settings, Keys(certificate, certificate, private, private, signing, sealing))
    assert not healthy("edge-client", path, programs), "no process works here"
    with home.held():
        assert healthy("edge-client", path, programs)
    assert not healthy("edge-client", path, programs), "it has stopped"
