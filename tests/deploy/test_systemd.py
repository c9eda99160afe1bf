"""The systemd units: what they say, and, where systemd is installed, what systemd says of them."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import commands
import pytest

from farfield.edge_client.cli import REVOKED

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
UNITS = {"farfield-coordinator": "coordinator", "farfield-edge-client": "edge-client"}
MOST_EXPOSED = 15
"""Tenths: systemd rates a service from 0 (sealed off) to 100 (as root, without any limit). Under 20 is "OK"."""

KNOWN = {
    "Unit": {"Description", "Wants", "After", "AssertPathExists", "StartLimitIntervalSec"},
    "Service": {
        *("Type", "User", "Group", "ExecStart", "KillMode", "KillSignal", "TimeoutStopSec", "Restart", "RestartSec"),
        *("SuccessExitStatus", "RestartPreventExitStatus"),
        *("Environment", "WorkingDirectory", "StateDirectory", "StateDirectoryMode", "UMask"),
        *("ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateMounts", "PrivateDevices", "PrivateUsers"),
        *("PrivateIPC", "RemoveIPC", "ProtectClock", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules"),
        *("ProtectKernelTunables", "ProtectControlGroups", "ProtectProc", "ProcSubset", "NoNewPrivileges"),
        *("CapabilityBoundingSet", "AmbientCapabilities", "KeyringMode", "LockPersonality", "RestrictNamespaces"),
        *("RestrictRealtime", "RestrictSUIDSGID", "RestrictAddressFamilies", "SystemCallArchitectures"),
        *("SystemCallFilter", "SystemCallErrorNumber", "MemoryDenyWriteExecute", "DevicePolicy", "DeviceAllow"),
    },
    "Install": {"WantedBy"},
}
"""Directives that systemd 248 has already, so that the units mean the same on Debian 12, RHEL 9 and Ubuntu 22.04."""

MANY = {"Environment", "SystemCallFilter", "DeviceAllow"}
"""What may be given more than once."""

HARDENED = {
    "ProtectSystem": ["strict"],
    "ProtectHome": ["yes"],
    "PrivateTmp": ["yes"],
    "PrivateMounts": ["yes"],
    "PrivateDevices": ["yes"],
    "PrivateUsers": ["yes"],
    "PrivateIPC": ["yes"],
    "ProtectClock": ["yes"],
    "ProtectHostname": ["yes"],
    "ProtectKernelLogs": ["yes"],
    "ProtectKernelModules": ["yes"],
    "ProtectKernelTunables": ["yes"],
    "ProtectControlGroups": ["yes"],
    "ProtectProc": ["invisible"],
    "NoNewPrivileges": ["yes"],
    "CapabilityBoundingSet": [""],
    "AmbientCapabilities": [""],
    "LockPersonality": ["yes"],
    "RestrictNamespaces": ["yes"],
    "RestrictRealtime": ["yes"],
    "RestrictSUIDSGID": ["yes"],
    "RestrictAddressFamilies": ["AF_INET AF_INET6 AF_UNIX"],
    "SystemCallArchitectures": ["native"],
    "SystemCallFilter": ["@system-service", "~@privileged"],
    "MemoryDenyWriteExecute": ["no"],
    "ProcSubset": ["all"],
    "UMask": ["0077"],
    "StateDirectoryMode": ["0700"],
    "KillMode": ["mixed"],
    "KillSignal": ["SIGTERM"],
    "Restart": ["on-failure"],
}
"""MemoryDenyWriteExecute and ProcSubset would break torch; a unit that sets them would start and then fail."""

UNASKED = "no systemd-analyze here: what this file knows about units was checked, and systemd itself was not asked"

Unit = dict[str, dict[str, list[str]]]


def parse(text: str) -> Unit:
    """Sections, keys, and every value of each in its order. Raises ValueError."""
    unit: Unit = {}
    section: dict[str, list[str]] | None = None
    for line in text.splitlines():
        if not line.strip() or line.startswith(("#", ";")):
            continue
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = unit.setdefault(match[1], {})
        elif (match := re.fullmatch(r"(\w+)=(.*)", line)) and section is not None:
            section.setdefault(match[1], []).append(match[2])
        else:
            raise ValueError(f"not a section and not KEY=VALUE: {line!r}")
    return unit


def problems(name: str, unit: Unit) -> Iterator[str]:
    """What is wrong with the service `name`, one line each."""
    for section, keys in unit.items():
        if section not in KNOWN:
            yield f"no section is called [{section}]"
        for key, values in keys.items():
            if key not in KNOWN.get(section, set()):
                yield f"[{section}] knows no {key}"
            if len(values) > 1 and key not in MANY:
                yield f"{key} is given {len(values)} times"
    service = unit.get("Service", {})
    for key, wanted in HARDENED.items():
        if service.get(key) != wanted:
            yield f"{key} is {service.get(key)}, not {wanted}"
    state = f"/var/lib/{name}"
    if service.get("User") != [name] or service.get("Group") != [name]:
        yield f"it does not run as {name}"
    if service.get("StateDirectory") != [name] or service.get("WorkingDirectory") != [state]:
        yield f"{state} is not what it may write"
    program, *arguments = shlex.split(service.get("ExecStart", ["nothing"])[0])
    if program != f"/opt/farfield/bin/{UNITS[name]}":
        yield f"it starts {program}"
    elif problem := commands.problem([program, *arguments]):
        yield problem
    if arguments[-2:] != ["--home", f"{state}/home"]:
        yield "its home is not below its state"
    home_is_there = f"{state}/home/{UNITS[name]}.toml"
    if unit.get("Unit", {}).get("AssertPathExists") != [home_is_there]:
        yield f"it does not ask for {home_is_there}"
    if not any(line.startswith("PATH=/opt/farfield/bin:") for line in service.get("Environment", [])):
        yield "flower-superexec would not be found"
    if not 60 <= int(service.get("TimeoutStopSec", ["0"])[0]) <= 300:
        yield "it is not given the time to stop"
    if any(re.search(r"TOKEN|SECRET|PASSWORD", line) for line in service.get("Environment", [])):
        yield "a secret is in the environment"


def read(name: str) -> str:
    return (FOLDER / f"{name}.service").read_text(encoding="utf-8")


def analysed(analyse: str, folder: Path, name: str, text: str, drop_in: str | None = None) -> str:
    """What systemd complains of in a unit: unknown or wrong directives, and a service that is too exposed.

    The program of the unit lies in /opt, which this machine need not have; the programs of this project take its place.
    """
    commands.install(folder)
    unit = folder / f"{name}.service"
    unit.write_text(text.replace("/opt/farfield/bin/", f"{folder}/"), encoding="utf-8")
    if drop_in is not None:
        (folder / f"{name}.service.d").mkdir()
        (folder / f"{name}.service.d" / "gpu.conf").write_text(drop_in, encoding="utf-8")
    verify = [analyse, "verify", "--man=no", str(unit)]
    security = [analyse, "security", "--offline=yes", "--no-pager", f"--threshold={MOST_EXPOSED}", str(unit)]
    done = subprocess.run(verify, capture_output=True, text=True)
    rated = subprocess.run(security, capture_output=True, text=True)
    complaints = done.stdout + done.stderr + (f"verify: {done.returncode}" if done.returncode else "")
    return complaints + rated.stderr + (rated.stdout if rated.returncode else "")


@pytest.mark.parametrize("name", UNITS)
def test_nothing_is_wrong_with_a_unit(name: str, tmp_path: Path) -> None:
    assert list(problems(name, parse(read(name)))) == []
    analyse = shutil.which("systemd-analyze")
    if analyse:
        assert analysed(analyse, tmp_path, name, read(name)) == ""
    else:
        print(UNASKED)


CHANGES = [
    ("ProtectSystem=strict", "ProtectSystem=full"),
    ("ProtectSystem=strict", "ProtectSystems=strict"),
    ("NoNewPrivileges=yes\n", ""),
    ("CapabilityBoundingSet=\n", "CapabilityBoundingSet=CAP_SYS_ADMIN\n"),
    ("MemoryDenyWriteExecute=no", "MemoryDenyWriteExecute=yes"),
    ("ProcSubset=all", "ProcSubset=pid"),
    ("KillMode=mixed", "KillMode=control-group"),
    ("PrivateDevices=yes", "PrivateDevices=yes\nPrivateDevices=no"),
    ("User=farfield-", "User=root-"),
    ("StateDirectory=farfield-", "StateDirectory=far-"),
    (" --home ", " --house "),
    ("/home\n", "/\n"),
    ("/opt/farfield/bin/", "/usr/bin/"),
    ("PATH=/opt/farfield/bin:", "PATH="),
    ("TimeoutStopSec=90", "TimeoutStopSec=5"),
    ("Environment=PYTHONUNBUFFERED=1", "Environment=FARFIELD_TOKEN=x"),
    ("AssertPathExists=", "ConditionPathExists="),
    ("[Install]", "[Instal]"),
]


@pytest.mark.parametrize(("good", "bad"), CHANGES)
@pytest.mark.parametrize("name", UNITS)
def test_every_change_for_the_worse_is_found(name: str, good: str, bad: str) -> None:
    assert read(name).count(good) >= 1
    before = set(problems(name, parse(read(name))))
    assert set(problems(name, parse(read(name).replace(good, bad)))) - before


@pytest.mark.parametrize("text", ["Type=exec\n", "[Service]\nType exec\n", "[Service\n"])
def test_what_is_no_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a section"):
        parse(text)


@pytest.mark.parametrize("name", UNITS)
def test_systemd_would_find_a_wrong_and_an_exposed_unit(name: str, tmp_path: Path) -> None:
    """The check above is one that can fail."""
    exposed = re.sub(r"(?m)^(Protect|Private|Restrict|SystemCall|Capability)\w+=.*\n", "", read(name))
    wrong = read(name).replace("KillMode=mixed", "KilMode=mixed")
    assert list(problems(name, parse(exposed)))
    assert list(problems(name, parse(wrong)))
    analyse = shutil.which("systemd-analyze")
    if analyse:
        for number, (text, complaint) in enumerate([(exposed, "Overall exposure"), (wrong, "KilMode")]):
            folder = tmp_path / str(number)
            folder.mkdir()
            assert complaint in analysed(analyse, folder, name, text)
    else:
        print(UNASKED)


def test_a_client_that_was_revoked_is_not_started_again() -> None:
    assert parse(read("farfield-edge-client"))["Service"]["RestartPreventExitStatus"] == [str(REVOKED)]


@pytest.mark.parametrize("name", UNITS)
def test_the_drop_in_for_a_gpu_lifts_only_the_devices(name: str, tmp_path: Path) -> None:
    text = (FOLDER / "gpu.conf").read_text(encoding="utf-8")
    unit = parse(text)
    assert set(unit) == {"Service"}
    assert set(unit["Service"]) == {"PrivateDevices", "DevicePolicy", "DeviceAllow"} <= KNOWN["Service"]
    assert unit["Service"]["DevicePolicy"] == ["closed"]
    assert all(re.fullmatch(r"/dev/nvidia[\w-]* rw", device) for device in unit["Service"]["DeviceAllow"])
    analyse = shutil.which("systemd-analyze")
    if analyse:
        assert analysed(analyse, tmp_path, name, read(name), drop_in=text) == ""
        (tmp_path / f"{name}.service.d" / "gpu.conf").write_text(text.replace("DevicePolicy", "DevicePolice"))
        verify = [analyse, "verify", "--man=no", str(tmp_path / f"{name}.service")]
        assert "DevicePolice" in subprocess.run(verify, capture_output=True, text=True).stderr
    else:
        print(UNASKED)


def test_users_and_folders_are_those_of_the_units() -> None:
    def rows(name: str) -> list[list[str]]:
        lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
        return [shlex.split(line) for line in lines if not line.startswith("#")]

    users, folders = rows("farfield.sysusers.conf"), rows("farfield.tmpfiles.conf")
    assert [(kind, user, home) for kind, user, _, _, home in users] == [
        ("u", name, f"/var/lib/{name}") for name in UNITS
    ]
    assert folders == [["d", f"/var/lib/{name}", "0700", name, name, "-"] for name in UNITS]
