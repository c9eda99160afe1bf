"""compose.yaml: one coordinator and three edge clients, each with no more rights than it needs."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import commands
import pytest
import yaml
from dockerfile import Dockerfile

FOLDER = Path(__file__).parents[2] / "deploy"
EDGES = ("edge-1", "edge-2", "edge-3")
CONTROL = "9091"

Compose = dict[str, Any]


def load(name: str) -> Compose:
    document = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def image(service: Compose) -> Dockerfile:
    path = FOLDER / service["build"]["context"] / service["build"]["dockerfile"]
    return Dockerfile.parse(path.read_text(encoding="utf-8"), FOLDER.parent)


def problems(compose: Compose) -> Iterator[str]:
    """What is wrong, one line each."""
    services = compose["services"]
    if set(services) != {"coordinator", *EDGES}:
        yield f"services: {sorted(services)}"
    for name, service in services.items():
        yield from (f"{name}: {problem}" for problem in unsafe(service))
        yield from (f"{name}: {problem}" for problem in dangling(service, compose))
    published = [str(port).split("/")[0] for service in services.values() for port in service.get("ports", [])]
    if published != ["9092:9092", "9093:9093", "9094:9094"]:
        yield f"published: {published}"
    for name in EDGES:
        service = services.get(name, {})
        if service.get("depends_on") != {"coordinator": {"condition": "service_healthy"}}:
            yield f"{name} does not wait until the coordinator is healthy"
        if service.get("networks") != ["federation"]:
            yield f"{name} reaches more than the coordinator"
        data = [mount for mount in service.get("volumes", []) if isinstance(mount, dict)]
        if [(mount["target"], mount["read_only"]) for mount in data] != [("/data", True)]:
            yield f"{name} may write where its data is"
        elif data[0].get("bind") != {"create_host_path": False}:
            yield f"{name}: a mistyped data folder would be made, empty"
    if not (compose["networks"].get("federation") or {}).get("internal"):
        yield "the edge clients' network leads out"
    for name, secret in compose.get("secrets", {}).items():
        if set(secret) != {"file"}:
            yield f"secret {name} is no file"
    homes = [mount for service in services.values() for mount in service.get("volumes", []) if isinstance(mount, str)]
    if len(set(homes)) != len(services):
        yield "two services have one home"


def unsafe(service: Compose) -> Iterator[str]:
    wanted = {"read_only": True, "init": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
    for key, value in wanted.items():
        if service.get(key) != value:
            yield f"{key} is {service.get(key)!r}, not {value!r}"
    for key in ("privileged", "cap_add", "network_mode", "pid", "ipc", "devices", "user", "env_file"):
        if key in service:
            yield f"{key} is set"
    if not any(mount.startswith("/tmp:") for mount in service.get("tmpfs", [])):
        yield "nothing can be written below /tmp"
    if any(re.search(r"TOKEN|SECRET|PASSWORD|KEY", str(name), re.I) for name in service.get("environment", {})):
        yield "a secret is in the environment"
    if any(":/var/run/docker.sock" in str(mount) for mount in service.get("volumes", [])):
        yield "the engine's socket is mounted"
    if CONTROL in json.dumps(service.get("ports", [])):
        yield "the control port is published"
    if not service.get("healthcheck", {}).get("test"):
        yield "no healthcheck"
    if not service.get("stop_grace_period"):
        yield "ten seconds to stop are too few"
    if not re.search(r":\d+\.\d+\.\d+", service["image"]):
        yield "the image has no version"


def dangling(service: Compose, compose: Compose) -> Iterator[str]:
    """What is named and not there."""
    for network in service.get("networks", []):
        if network not in compose["networks"]:
            yield f"no network {network}"
    for mount in service.get("volumes", []):
        if isinstance(mount, str) and mount.split(":")[0] not in compose["volumes"]:
            yield f"no volume {mount}"
    for secret in service.get("secrets", []):
        if secret["source"] not in compose["secrets"]:
            yield f"no secret {secret['source']}"
    dockerfile = FOLDER / service["build"]["context"] / service["build"]["dockerfile"]
    if not dockerfile.is_file():
        yield f"no {dockerfile}"


def test_nothing_is_wrong() -> None:
    assert list(problems(load("compose.yaml"))) == []


def edge(compose: Compose) -> Compose:
    service = compose["services"]["edge-2"]
    assert isinstance(service, dict)
    return service


def coordinator(compose: Compose) -> Compose:
    service = compose["services"]["coordinator"]
    assert isinstance(service, dict)
    return service


CHANGES: dict[str, Callable[[Compose], object]] = {
    "a client less": lambda one: one["services"].pop("edge-3"),
    "privileged": lambda one: coordinator(one).update(privileged=True),
    "more capabilities": lambda one: coordinator(one).update(cap_add=["NET_ADMIN"]),
    "all capabilities": lambda one: edge(one).pop("cap_drop"),
    "privileges to gain": lambda one: edge(one).pop("security_opt"),
    "writable": lambda one: edge(one).update(read_only=False),
    "nowhere to write": lambda one: edge(one).pop("tmpfs"),
    "nobody reaps": lambda one: coordinator(one).pop("init"),
    "root": lambda one: edge(one).update(user="0:0"),
    "the host's network": lambda one: edge(one).update(network_mode="host"),
    "the control port": lambda one: coordinator(one)["ports"].append("9091:9091"),
    "a client's port": lambda one: edge(one).update(ports=["8080:8080"]),
    "a token in the environment": lambda one: edge(one).update(environment={"FARFIELD_TOKEN": "x"}),
    "a token in the file": lambda one: one["secrets"].update({"token-1": {"environment": "TOKEN"}}),
    "no healthcheck": lambda one: coordinator(one).pop("healthcheck"),
    "no wait": lambda one: edge(one).update(depends_on=["coordinator"]),
    "no time to stop": lambda one: coordinator(one).pop("stop_grace_period"),
    "a way out": lambda one: one["networks"]["federation"].update(internal=False),
    "another way out": lambda one: edge(one).update(networks=["federation", "outside"]),
    "writable data": lambda one: edge(one)["volumes"][1].update(read_only=False),
    "data that is made": lambda one: edge(one)["volumes"][1].pop("bind"),
    "two clients with one home": lambda one: edge(one)["volumes"].__setitem__(0, "edge-1:/var/lib/farfield"),
    "a volume that is not there": lambda one: one["volumes"].pop("edge-2"),
    "a secret that is not there": lambda one: one["secrets"].pop("token-2"),
    "a network that is not there": lambda one: one["networks"].pop("outside"),
    "the engine's socket": lambda one: edge(one)["volumes"].append("/var/run/docker.sock:/var/run/docker.sock"),
    "any version": lambda one: edge(one).update(image="farfield-edge-client:latest"),
    "no such Dockerfile": lambda one: edge(one)["build"].update(dockerfile="deploy/docker/edge.Dockerfile"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_for_the_worse_is_found(change: str) -> None:
    compose = copy.deepcopy(load("compose.yaml"))
    CHANGES[change](compose)
    assert list(problems(compose))


def test_the_healthchecks_are_those_of_the_images() -> None:
    for name, service in load("compose.yaml")["services"].items():
        health = service["healthcheck"]
        (declared,) = image(service).texts("HEALTHCHECK")
        options = dict(re.findall(r"--([a-z-]+)=(\S+)", declared))
        assert [health["test"][0], json.dumps(health["test"][1:])] == ["CMD", declared.partition("CMD ")[2]], name
        assert options == {key.replace("_", "-"): str(value) for key, value in health.items() if key != "test"}, name


def test_homes_lie_in_volumes_that_the_images_own() -> None:
    for name, service in load("compose.yaml")["services"].items():
        (home,) = (mount for mount in service["volumes"] if isinstance(mount, str))
        assert [home.split(":")[1]] == image(service).texts("VOLUME"), name


def test_a_client_joins_once_and_then_starts(tmp_path: Path) -> None:
    """The script itself is run, with a program in place of ours that writes down how it was called."""
    services = load("compose.yaml")["services"]
    (entrypoint,) = {tuple(services[name]["entrypoint"]) for name in EDGES}
    secrets = [services[name]["secrets"] for name in EDGES]
    assert secrets == [[{"source": f"token-{number}", "target": "token"}] for number in (1, 2, 3)]
    script = entrypoint[2].replace("$$", "$")
    assert script.count("/run/secrets/token") == 1
    assert [commands.problem(words) for words in commands.in_shell(script)] == [None, None]

    home, program, token = tmp_path / "home", tmp_path / "edge-client", tmp_path / "token"
    token.write_text("farfield1.x\n", encoding="utf-8")
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$1" = start ] || cat > {tmp_path}/given\n')
    program.chmod(0o755)
    words = [*entrypoint[:2], script.replace("/run/secrets/token", str(token))]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "FARFIELD_EDGE_HOME": str(home)}
    assert "FARFIELD_EDGE_HOME" in image(services["edge-1"]).variables()

    subprocess.run(words, check=True, env=environment)
    join = "join coordinator:9094 --token - --data /data --no-start"
    assert (tmp_path / "calls").read_text().splitlines() == [join, "start"]
    assert (tmp_path / "given").read_text() == "farfield1.x\n"
    (home / "keys").mkdir(parents=True)
    token.unlink()
    subprocess.run(words, check=True, env=environment)
    assert (tmp_path / "calls").read_text().splitlines() == [join, "start", "start"]


def test_the_gpu_file_changes_only_what_it_must() -> None:
    base, cuda = load("compose.yaml")["services"], load("compose.cuda.yaml")["services"]
    assert set(cuda) == set(EDGES) < set(base)
    for service in cuda.values():
        assert set(service) == {"image", "build", "deploy"}
        assert set(service["build"]) == {"args"}
        assert set(service["build"]["args"]) <= set(image(base["edge-1"]).arguments())
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
