"""deploy/README.md: its commands can be given, its files exist, its figures are those of the files."""

from __future__ import annotations

import re
from pathlib import Path

import commands
import test_helm
import test_systemd
import yaml
from dockerfile import Dockerfile

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy"
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.M | re.S)


def test_every_command_can_be_given() -> None:
    found = [words for block in BLOCKS for words in commands.in_shell(block)]
    assert {(words[0], words[1]) for words in found} == {
        *(("coordinator", name) for name in ("init", "invite", "nodes", "run")),
        ("edge-client", "join"),
    }
    assert [problem for words in found if (problem := commands.problem(words))] == []


def test_every_file_exists() -> None:
    named = set(re.findall(r"deploy/[\w./-]+\w", TEXT)) | {
        f"deploy/{name}" for name in re.findall(r"\b(?:compose[\w.]*|values)\.yaml", TEXT) if name != "values.yaml"
    }
    assert len(named) > 8
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_services_volumes_arguments_and_users_are_those_of_the_files() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
    services = set(re.findall(r"docker compose (?:run --rm|exec -T|exec|up --detach) ([a-z][\w-]*)", TEXT))
    assert {"coordinator"} <= services <= set(compose["services"])
    text = (FOLDER / "docker" / "coordinator.Dockerfile").read_text(encoding="utf-8")
    file = Dockerfile.parse(text, ROOT)
    assert set(re.findall(r"^\| `([A-Z_]+)` \|", TEXT, re.M)) == set(file.arguments())
    assert file.variables()["FARFIELD_COORDINATOR_HOME"] in TEXT
    assert set(re.findall(r"FARFIELD_DATA_\d", TEXT)) <= set(
        re.findall(r"FARFIELD_DATA_\d", (FOLDER / "compose.yaml").read_text(encoding="utf-8"))
    )
    for user in ("10001 (coordinator)", "10002 (edge client)", *test_systemd.UNITS):
        assert user in TEXT
    for name in test_systemd.UNITS:
        assert f"/var/lib/{name}/home" in TEXT
    assert f"below {test_systemd.MOST_EXPOSED / 10} of 10" in TEXT


def test_the_ports_are_those_of_the_chart_and_the_control_port_is_nobodys() -> None:
    rows = dict(re.findall(r"^\| (\d{4}) \| (\w+)", TEXT, re.M))
    assert {name: int(port) for port, name in rows.items() if name != "control"} == test_helm.PORTS
    assert rows["9091"] == "control"


def test_the_values_that_helm_is_given_are_values() -> None:
    given = re.findall(r"--set '?([\w.]+)=", TEXT)
    assert given == ["service.type", "hostnames", "image.repository"]
    assert all(test_helm.at(test_helm.VALUES, name) is not None for name in given)
