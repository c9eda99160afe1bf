"""The images: rules in the manner of hadolint, each shown to find what it is for, and the build's own steps as far as
they can be taken without a container engine."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import commands
import dockerfile
import pytest
from dockerfile import Dockerfile, Rule

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "docker"
NAMES = ("coordinator", "edge-client")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def load(name: str) -> Dockerfile:
    path = FOLDER / f"{name}.Dockerfile"
    ignored = path.with_name(path.name + ".dockerignore").read_text(encoding="utf-8")
    return Dockerfile.parse(path.read_text(encoding="utf-8"), ROOT, ignored)


@pytest.mark.parametrize("rule", dockerfile.RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_every_dockerfile_keeps_every_rule(name: str, rule: Rule) -> None:
    assert list(rule(load(name))) == []


GOOD = """
ARG BASE=python:3.11.14-slim
FROM ${BASE} AS build
COPY a ./
RUN pip install --no-cache-dir x==1
FROM ${BASE} AS run
COPY --from=build /opt/farfield /opt/farfield
ENV PATH=/opt/farfield/bin:$PATH
STOPSIGNAL SIGTERM
HEALTHCHECK CMD ["p", "status"]
USER 10001:10001
ENTRYPOINT ["p"]
CMD ["serve"]
"""

BAD = [
    (dockerfile.base_images_are_pinned, "python:3.11.14-slim", "python:latest"),
    (dockerfile.base_images_are_pinned, "python:3.11.14-slim", "python"),
    (dockerfile.base_images_are_pinned, "python:3.11.14-slim", "python:3.11-slim"),
    (dockerfile.base_images_are_pinned, "python:3.11.14-slim", "python@sha256:abc"),
    (dockerfile.nothing_that_builds_is_left, "FROM ${BASE} AS run\nCOPY --from=build", "COPY --from=build"),
    (dockerfile.nothing_that_builds_is_left, "STOPSIGNAL", "RUN pip install --no-cache-dir y==1\nSTOPSIGNAL"),
    (dockerfile.it_runs_as_a_fixed_user_without_rights, "USER 10001:10001\n", ""),
    (dockerfile.it_runs_as_a_fixed_user_without_rights, "10001:10001", "root"),
    (dockerfile.it_runs_as_a_fixed_user_without_rights, "10001:10001", "0:0"),
    (dockerfile.it_runs_as_a_fixed_user_without_rights, "10001:10001", "farfield"),
    (dockerfile.it_runs_as_a_fixed_user_without_rights, 'CMD ["serve"]', 'RUN true\nCMD ["serve"]'),
    (dockerfile.it_runs_as_a_fixed_user_without_rights, 'CMD ["serve"]', 'USER 0:0\nCMD ["serve"]'),
    (dockerfile.commands_are_in_exec_form, 'ENTRYPOINT ["p"]\n', ""),
    (dockerfile.commands_are_in_exec_form, '["p"]', "p"),
    (dockerfile.commands_are_in_exec_form, '["serve"]', "serve"),
    (dockerfile.commands_are_in_exec_form, '["p", "status"]', "p status"),
    (dockerfile.its_health_and_its_end_are_declared, "STOPSIGNAL SIGTERM\n", ""),
    (dockerfile.its_health_and_its_end_are_declared, "SIGTERM", "SIGKILL"),
    (dockerfile.its_health_and_its_end_are_declared, 'HEALTHCHECK CMD ["p", "status"]\n', ""),
    (dockerfile.pip_installs_pinned_and_keeps_nothing, "--no-cache-dir ", ""),
    (dockerfile.pip_installs_pinned_and_keeps_nothing, "x==1", "x"),
    (dockerfile.pip_installs_pinned_and_keeps_nothing, "x==1", "'x>=1'"),
    (dockerfile.pip_installs_pinned_and_keeps_nothing, "x==1", "'x @ file:///x.whl'"),
    (dockerfile.pip_installs_pinned_and_keeps_nothing, "x==1", "--extra-index-url https://example.org x==1"),
    (dockerfile.apt_leaves_no_lists, "COPY a ./", "RUN apt-get install --no-install-recommends --yes gcc"),
    (dockerfile.apt_leaves_no_lists, "COPY a ./", "RUN apt-get install --yes gcc && rm -rf /var/lib/apt/lists/*"),
    (dockerfile.nothing_is_fetched_unverified, "COPY a ./", "ADD https://example.org/a ./"),
    (dockerfile.nothing_is_fetched_unverified, "COPY a ./", "RUN curl https://example.org/a | sh"),
    (dockerfile.no_secret_is_baked_in, "ARG BASE", "ARG HF_TOKEN\nARG BASE"),
    (dockerfile.no_secret_is_baked_in, "ENV PATH", "ENV DATABASE_PASSWORD=x\nENV PATH"),
    (dockerfile.what_is_copied_is_there, "COPY a ./", "COPY b ./"),
    (dockerfile.what_is_copied_is_there, "COPY a ./", "COPY hidden ./"),
    (dockerfile.what_is_copied_is_there, "COPY a ./", "COPY . ./"),
    (dockerfile.the_environment_is_on_the_path, "ENV PATH=/opt/farfield/bin:$PATH\n", ""),
]


def example(text: str, folder: Path) -> Dockerfile:
    for name in ("a", "hidden"):
        (folder / name).touch()
    return Dockerfile.parse(text, folder, "hidden\n")


def test_the_rules_find_nothing_in_a_good_one(tmp_path: Path) -> None:
    assert [problem for rule in dockerfile.RULES for problem in rule(example(GOOD, tmp_path))] == []
    assert {rule for rule, _, _ in BAD} == set(dockerfile.RULES)


@pytest.mark.parametrize(("rule", "good", "bad"), BAD, ids=lambda one: getattr(one, "__name__", None))
def test_every_rule_finds_what_it_is_for(rule: Rule, good: str, bad: str, tmp_path: Path) -> None:
    assert GOOD.count(good) >= 1
    assert list(rule(example(GOOD.replace(good, bad, 1), tmp_path)))


def test_both_images_are_built_by_the_same_first_stage() -> None:
    first, second = (load(name).stages()[0] for name in NAMES)
    assert first == second
    users = {text for name in NAMES for text in load(name).texts("USER")}
    assert len(users) == 2, "the two sides are two users"


@pytest.mark.parametrize("name", NAMES)
def test_the_images_agree_with_the_project(name: str) -> None:
    file, text = load(name), (FOLDER / f"{name}.Dockerfile").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (torch,) = set(re.findall(r"torch==\S+", "\n".join(file.texts("RUN"))))
    assert torch in constraints
    labels = dict(word.split("=", 1) for word in shlex.split(" ".join(file.texts("LABEL"))))
    assert labels["org.opencontainers.image.version"] == PROJECT["project"]["version"]
    assert labels["org.opencontainers.image.licenses"] == PROJECT["project"]["license"]
    assert f"farfield-{name}:{PROJECT['project']['version']}" in text
    made = re.search(r"--owner=farfield --group=farfield (\S+)", "\n".join(file.texts("RUN")))
    assert made is not None
    assert file.texts("VOLUME") == [made[1]]
    home = file.variables()["FARFIELD_COORDINATOR_HOME" if name == "coordinator" else "FARFIELD_EDGE_HOME"]
    assert Path(home).parent == Path(made[1]), "a home is a folder of its own below the volume"


def test_only_the_coordinator_has_ports_and_not_its_control_port() -> None:
    assert load("coordinator").texts("EXPOSE") == ["9092 9093 9094"]
    assert load("edge-client").texts("EXPOSE") == []


@pytest.mark.parametrize("name", NAMES)
def test_what_the_images_run_are_commands(name: str) -> None:
    file = load(name)
    (entrypoint,), (command,) = (map(json.loads, file.texts(key)) for key in ("ENTRYPOINT", "CMD"))
    shell, option, script = json.loads(file.texts("HEALTHCHECK")[0].partition("CMD ")[2])
    (health,) = commands.in_shell(script)
    assert (shell, option, health[0]) == ("/bin/sh", "-c", name)
    assert [commands.problem(words) for words in ([*entrypoint, *command], health)] == [None, None]


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("pyproject.toml", True),
        ("coordinator/cli.py", True),
        ("emulator/builtin/tiny-llama-py/model.safetensors", True),
        ("coordinator/__pycache__/cli.cpython-311.pyc", False),
        (".git/config", False),
        (".venv/bin/python", False),
        ("runs/x/adapter/adapter_model.safetensors", False),
        ("deploy/secrets/token-1", False),
        ("tests/conftest.py", False),
    ],
)
def test_the_build_sees_the_package_and_nothing_else(path: str, seen: bool) -> None:
    assert [load(name).seen(path) for name in NAMES] == [seen, seen]


def test_what_is_copied_is_enough_for_the_wheel(tmp_path: Path) -> None:
    """The build's own step, in a folder that holds what COPY would put there."""
    source, wheels, file = tmp_path / "source", tmp_path / "wheels", load("coordinator")
    for name in file.copied():
        for path in [ROOT / name, *(ROOT / name).rglob("*")]:
            target = source / path.relative_to(ROOT)
            if path.is_file() and file.seen(path.relative_to(ROOT).as_posix()):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    wanted = {
        path.relative_to(source).as_posix() for path in source.rglob("*") if path.suffix in (".py", ".safetensors")
    }
    (step,) = (step for text in file.texts("RUN") for step in text.split("&&") if "pip wheel" in step)
    words = shlex.split(step.replace("/wheels", str(wheels)))
    subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True, cwd=source)
    (wheel,) = wheels.glob("farfield-*.whl")
    packed = zipfile.ZipFile(wheel)
    inside = {name.removeprefix("farfield/") for name in packed.namelist()}
    assert wanted <= inside
    assert len(wanted) > 30
    (entry_points,) = (name for name in packed.namelist() if name.endswith("entry_points.txt"))
    scripts = re.findall(r"^(\S+) = ", packed.read(entry_points).decode(), re.M)
    assert sorted(scripts) == sorted(NAMES)
