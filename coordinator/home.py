"""The coordinator's home: its folder, the settings in it, and who may read what.

    HOME/                     0700
        coordinator.toml      settings; 0600, as the database's URL may hold a password
        farfield.db           the database, unless [database] names another
        keys/                 the authority's, the server's and the signer's (authority.py); 0700, files 0600
        roster.json           the consortium's signed roster (protocols/roster.py), if there is one
        runs/RUN/             run folders (runs.py)
        superlink/            Flower's home
        logs/                 superlink.log, and the runs' logs
        ledger.jsonl          what runs have spent of their populations' privacy
        serve.lock            held by the one `coordinator serve`

Whoever may write in the home is the coordinator: commands reach the service through the database, and nothing else
asks them who they are.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
import stat
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from farfield.protocols.complaints import complaint
from farfield.protocols.errors import HomeError

if TYPE_CHECKING:
    from farfield.protocols.privacy.ledger import Budget

    from .authority import Authority
    from .storage import Store

_HOSTNAME: Final = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9-]{1,63})*")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a service listens; `str` spells it as HOST:PORT, with brackets around an IPv6 host."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: object) -> Address:
        """Raises ValueError."""
        host, colon, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
        if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
            raise ValueError('an address is HOST:PORT, for example "0.0.0.0:9094", with a port from 1 to 65535')
        if host.startswith("[") and host.endswith("]"):
            return cls(str(ipaddress.IPv6Address(host[1:-1])), int(port))
        if ":" in host:
            raise ValueError(f"an IPv6 address has brackets around it before a port, as [{host}]:{port}")
        return cls(_hostname(host), int(port))

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def _hostname(text: str) -> str:
    """`text`, if it is a name or an IP address of a machine. Raises ValueError."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if _HOSTNAME.fullmatch(text) and not re.fullmatch(r"[0-9.]+", text):
            return text
    raise ValueError(f"{text!r} is neither the name nor the IP address of a machine")


Hostname = Annotated[str, AfterValidator(_hostname)]
Listen = Annotated[Address, BeforeValidator(Address.parse)]


class Section(BaseModel):
    """A section of coordinator.toml: immutable, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Service(Section):
    """Where the services are.

    Attributes:
        hostnames: names and addresses by which clients reach this machine; the server's certificate is for these, and
            invitations name the first.
        enrolment: where new clients join; TLS.
        federation: notices and bundles; TLS with a client's certificate.
        fleet: Flower's SuperLink, tasks and replies; TLS.
        control: the SuperLink's control; never reachable from another machine.
    """

    hostnames: Annotated[tuple[Hostname, ...], Field(min_length=1, strict=False)]
    enrolment: Listen = Address("0.0.0.0", 9094)  # noqa: S104 - clients come from outside
    federation: Listen = Address("0.0.0.0", 9093)  # noqa: S104
    fleet: Listen = Address("0.0.0.0", 9092)  # noqa: S104
    control: Listen = Address("127.0.0.1", 9091)

    @field_validator("control")
    @classmethod
    def _not_from_outside(cls, control: Address) -> Address:
        if not control.is_loopback:
            raise ValueError(f"{control} can be reached from other machines; give a loopback address, as 127.0.0.1")
        return control

    @model_validator(mode="after")
    def _ports_of_their_own(self) -> Self:
        services = ("enrolment", "federation", "fleet", "control")
        ports: dict[int, str] = {}
        for name in services:
            port = getattr(self, name).port
            if port in ports:
                raise ValueError(f"'{ports[port]}' and '{name}' have the same port, {port}")
            ports[port] = name
        return self


class Database(Section):
    """Attributes:
    url: `sqlite:///FILE`, relative to the home, or `postgresql://USER@HOST/NAME`.
    """

    url: str = "sqlite:///farfield.db"


class Limits(Section):
    """What one client may ask of the enrolment and federation services.

    Attributes:
        message_bytes: the largest request that they accept.
        calls_per_peer: how many calls of one client may be open at the same time.
        calls_per_second: how many calls one client may begin in a second, in the long run.
    """

    message_bytes: Annotated[int, Field(ge=2**15, lt=2**31)] = 2**18
    calls_per_peer: Annotated[int, Field(ge=2)] = 8  # one of them is Attend, open for as long as the client runs
    calls_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0


class Runs(Section):
    """Attributes:
    parallel: how many runs work at the same time; others wait.
    """

    parallel: Annotated[int, Field(ge=1)] = 1


class Privacy(Section):
    """The most privacy that the runs over one population may spend in total.

    Attributes:
        max_epsilon: ε; None limits nothing.
        delta: δ.
    """

    max_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5


class Settings(Section):
    """coordinator.toml."""

    service: Service
    database: Database = Database()
    limits: Limits = Limits()
    runs: Runs = Runs()
    privacy: Privacy = Privacy()


_TEMPLATE: Final = """\
# Settings of this coordinator, read by every command; `coordinator serve` reads them when it starts.

[service]
# Names and addresses by which edge clients reach this machine. The server's certificate is for these (`serve` renews it
# after a change), and invitations name the first.
hostnames = {hostnames}
# Where new clients join (TLS).
enrolment = {enrolment}
# Notices and bundles (TLS with a client's certificate).
federation = {federation}
# Flower's SuperLink: tasks and replies (TLS).
fleet = {fleet}
# The SuperLink's control. Only an address of this machine to itself is accepted.
control = {control}

[database]
# sqlite:///FILE, relative to this folder, or postgresql://USER:PASSWORD@HOST/NAME (needs farfield[postgresql]).
url = {database}

[limits]
# Of the enrolment and federation services: the largest request that they accept, in bytes; how many calls of one client
# may be open at the same time; and how many it may begin in a second, in the long run.
message_bytes = {message_bytes}
calls_per_peer = {calls_per_peer}
calls_per_second = {calls_per_second}

[runs]
# How many runs work at the same time; others wait.
parallel = {parallel}

[privacy]
# The most ε, at delta, that runs over one population may spend in total. A population is named by a Plan's
# `privacy.population`; `coordinator ledger` shows what was spent. Without it nothing limits them.
# max_epsilon = 8.0
delta = {delta}
"""


@dataclass(frozen=True, slots=True)
class Home:
    """A coordinator's folder, whole, with settings that hold. Made by `create` and `open`.

    Attributes:
        path: absolute.
    """

    path: Path
    settings: Settings

    @classmethod
    def create(
        cls, path: Path, hostnames: Sequence[str], now: datetime, *, database: str | None = None, **addresses: str
    ) -> Home:
        """Make the folder with its keys, its database and its settings: all of it, or nothing.

        Args:
            database: its URL; by default a file in the home.
            addresses: `enrolment`, `federation`, `fleet` and `control`, as HOST:PORT, where not the usual ones.

        Raises:
            HomeError: it exists and is not empty, cannot be written, or a setting is wrong.
            StorageError: the database cannot be made.
        """
        from .authority import Authority

        service: dict[str, Any] = {"hostnames": list(hostnames), **addresses}
        settings = _validated(
            {"service": service, "database": {} if database is None else {"url": database}}, "coordinator.toml"
        )
        path = _expanded(path)
        building = None
        try:
            if path.exists() and not (path.is_dir() and not any(path.iterdir())):
                hint = "Give another place, or remove it."
                raise HomeError("exists already and is not an empty folder", where=path, hint=hint)
            path.parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))  # mode 0700
            for name in ("runs", "superlink", "logs"):
                (building / name).mkdir(mode=0o700)
            toml = building / "coordinator.toml"
            toml.touch(mode=0o600)
            toml.write_text(_toml(settings), encoding="utf-8")
            Authority.create(building / "keys", settings.service.hostnames, now)
            cls(building, settings).store(upgrade=True).close()
            building.rename(path)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            hint = "Make room, or choose another place."
            raise HomeError(f"cannot be made: {reason}", where=path, hint=hint) from None
        finally:
            if building is not None:  # renamed by now, unless something failed
                shutil.rmtree(building, ignore_errors=True)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Home:
        """The home at `path`.

        Raises:
            HomeError: there is none, others may read its secrets, or a setting is wrong.
        """
        path = _expanded(path)
        toml = path / "coordinator.toml"
        try:
            text = toml.read_text(encoding="utf-8")
            for secret in (toml, path / "keys", *sorted((path / "keys").glob("*.key")), *path.glob("*.db")):
                _check_secret(secret)
        except (FileNotFoundError, NotADirectoryError):
            hint = "Name it with --home, or make one with `coordinator init`."
            raise HomeError("not a coordinator's home", where=path, hint=hint) from None
        except (OSError, UnicodeDecodeError) as error:
            raise HomeError(f"cannot be read: {error}", where=path) from None
        try:
            document = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise HomeError(f"not valid TOML: {error}", where=toml) from None
        return cls(path, _validated(document, toml))

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    @property
    def superlink(self) -> Path:
        return self.path / "superlink"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def lock(self) -> Path:
        return self.path / "serve.lock"

    @property
    def budget(self) -> Budget | None:
        """What the runs over one population may spend; None where nothing limits them."""
        from farfield.protocols.privacy.ledger import Budget

        settings = self.settings.privacy
        return None if settings.max_epsilon is None else Budget(settings.max_epsilon, settings.delta)

    @property
    def roster_file(self) -> Path:
        return self.path / "roster.json"

    def roster(self) -> bytes:
        """A consortium's signed roster, as it was installed; empty where none was. Raises HomeError."""
        try:
            return self.roster_file.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise HomeError(f"cannot be read: {error.strerror}", where=self.roster_file) from None

    def authority(self) -> Authority:
        """Its keys. Raises HomeError when they are missing or damaged."""
        from .authority import Authority

        return Authority(self.path / "keys")

    def store(self, *, upgrade: bool = False) -> Store:
        """Its database, opened; `upgrade` makes or changes the tables. Raises StorageError."""
        from .storage import Store

        return Store.open(self.settings.database.url, base=self.path, upgrade=upgrade)


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser().resolve()
    except (RuntimeError, OSError) as error:
        raise HomeError(str(error), where=path) from None


def _check_secret(path: Path) -> None:
    """Raises HomeError when others than the owner may do anything with the file or folder."""
    mode = path.stat().st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        right = 700 if path.is_dir() else 600
        hint = f"Others may have read it; if not, protect it with: chmod {right} {path}"
        raise HomeError(f"open to others than its owner (mode {stat.S_IMODE(mode):04o})", where=path, hint=hint)


def _validated(document: dict[str, Any], where: object) -> Settings:
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        what, hint = complaint(error, _known_keys)
        raise HomeError(what, where=where, hint=hint) from None


def _known_keys(path: list[str]) -> Iterable[str]:
    section: Any = Settings.model_fields[path[0]].annotation if path else Settings
    return cast("Iterable[str]", section.model_fields)


def _toml(settings: Settings) -> str:
    """The settings, with a word about each; JSON's strings and numbers are TOML's."""
    values = {key: value for section in dict(settings).values() for key, value in dict(section).items()}
    values["database"] = values.pop("url")
    return _TEMPLATE.format(
        **{
            key: json.dumps(str(value) if isinstance(value, Address) else value, ensure_ascii=False)
            for key, value in values.items()
        }
    )
