"""The home of an edge client: its settings, its keys, its cache, and what it last did.

    HOME/
        edge-client.toml     settings and consent; the owner edits it, and every start reads it anew
        keys/                ca.pem  tls.key tls.pem  fleet.key  signing.key  sealing.key   (folder 0700, files 0600)
        cache/               bundles by digest
        ledger.jsonl         what runs have spent of the data's privacy; it stays when the node leaves
        local/               by run, what of its adapter never leaves this machine   (folder 0700, files 0600)
        state.json           what the resident process last did
        resident.lock        held by the one process that works here

A folder is a home from the moment that `keys` is in it. `keys` appears whole, by a rename, after everything else was
written, so whatever kills `Home.create` leaves either a home or none.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
import textwrap
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from pydantic import BaseModel, Field, ValidationError, field_validator

from farfield.protocols import plan as plans
from farfield.protocols.complaints import complaint
from farfield.protocols.errors import DataError, HomeError, PlanError
from farfield.protocols.identity import NAME

from .consent import Consent, Section
from .records import Record

if TYPE_CHECKING:
    from farfield.protocols.envelope import Identity

SETTINGS: Final = "edge-client.toml"
KEYS: Final = "keys"
_PARTIAL: Final = "keys.partial"
_CACHE: Final = "cache"
_LEDGER: Final = "ledger.jsonl"
_LOCAL: Final = "local"
_STATE: Final = "state.json"
_LOCK: Final = "resident.lock"

_STDLIB: Final = re.compile(r"builtin:stdlib/([1-9][0-9]{0,5})/([1-9][0-9]{0,5})")
_BUILTIN: Final = "builtin:"

_PROBE_BYTES: Final = 65536
"""More than all that `Home.create` writes."""

Port = Annotated[int, Field(ge=1, le=65535)]


@dataclass(frozen=True, slots=True)
class Part:
    """Part `number` (from 1) of `parts` of the standard library's prose."""

    number: int
    parts: int

    def __str__(self) -> str:
        return f"{_BUILTIN}stdlib/{self.number}/{self.parts}"

    def texts(self) -> list[str]:
        """Its texts. Raises DataError when there is too little prose for so many parts."""
        from . import stdlib

        return stdlib.clients(self.parts)[self.number - 1][1]


def data_source(text: str) -> Path | Part:
    """What `data.path` means: a file or a folder, which need not exist, or a part of the standard library.

    Raises:
        DataError: neither an absolute path nor a builtin that is known.
    """
    if text.startswith(_BUILTIN):
        match = _STDLIB.fullmatch(text)
        if not match or int(match[1]) > int(match[2]):
            raise DataError(
                "no such builtin data",
                where=text,
                hint="builtin:stdlib/I/N is part I, from 1, of N parts of the standard library's prose.",
            )
        return Part(int(match[1]), int(match[2]))
    path = Path(text)
    if not path.is_absolute():
        raise DataError("not an absolute path", where=text, hint="Give it from the root on; '/data/notes', say.")
    return path


def records(source: Path | Part, data: plans.Data, task: str, labels: int | None) -> Iterator[Record]:
    """The records of `source`, lazily.

    Raises:
        DataError: as `farfield.edge_client.records.read` does, while iterating.
        PlanError: a part of the standard library is asked for classes, which it has not.
    """
    from . import records as files

    if isinstance(source, Path):
        return files.read(source, data, task, labels)
    if task == files.CLASSIFICATION:
        raise PlanError(f"the data here, {source}, is text without classes, so it cannot do {task}")
    return (files.Text(text) for text in source.texts())


class CoordinatorSettings(Section):
    """The coordinator that this machine has enrolled with."""

    host: Annotated[str, Field(min_length=1, description="Its name or address.")]
    enrolment_port: Annotated[Port, Field(description="Where `join` went.")]
    fleet_port: Annotated[Port, Field(description="Where tasks come from and replies go.")]
    federation_port: Annotated[Port, Field(description="Where backbones come from.")]

    def target(self, port: int) -> str:
        """`host:port` as gRPC and people write it."""
        return target(self.host, port)


class NodeSettings(Section):
    """This machine."""

    name: Annotated[str, Field(description="Its name at the coordinator; that of its certificate. It cannot change.")]

    @field_validator("name")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError(f"{value!r} is no name for a node")
        return value


class DataSettings(Section):
    """The data, which never leaves this machine."""

    path: Annotated[
        str,
        Field(
            description="A file or a folder, from the root on; or builtin:stdlib/I/N, part I of N parts of the prose "
            "of Python's standard library."
        ),
    ]

    @field_validator("path")
    @classmethod
    def _a_source(cls, value: str) -> str:
        try:
            data_source(value)
        except DataError as error:
            raise ValueError(str(error)) from None
        return value

    @property
    def source(self) -> Path | Part:
        return data_source(self.path)


class CacheSettings(Section):
    """Backbones that were downloaded."""

    max_bytes: Annotated[
        int, Field(ge=0, description="How much disk they may take; the ones used least recently go first.")
    ] = 50_000_000_000


class Settings(Section):
    """All of `edge-client.toml`."""

    coordinator: CoordinatorSettings
    node: NodeSettings
    data: DataSettings
    cache: CacheSettings = CacheSettings()
    consent: Consent = Consent()

    @classmethod
    def parse(cls, text: str, *, where: object = SETTINGS) -> Self:
        """The settings that `text` (TOML) holds. Raises HomeError, which names the wrong key."""
        try:
            return cls.model_validate(tomllib.loads(text))
        except ValidationError as error:
            what, hint = complaint(error, _known_keys)
            raise HomeError(what, where=where, hint=hint) from None
        except (ValueError, RecursionError) as error:
            raise HomeError(f"not valid TOML: {error}", where=where) from None

    def render(self) -> str:
        """TOML that `parse` reads as these settings, every key with a comment that says what it is for."""
        lines = [
            "# The settings of this edge client. You, the owner of the data, may change them: they are read at every",
            "# start. What [consent] does not allow is refused, whatever a coordinator asks for.",
        ]
        for name, value in self:
            lines += ["", f"[{name}]", *_comment(_first_line(type(value)))]
            for key, about in type(value).model_fields.items():
                lines += ["", *_comment(about.description or "")]
                held = getattr(value, key)
                lines.append(
                    f"# {key} = {toml((about.examples or [])[0])}" if held is None else f"{key} = {toml(held)}"
                )
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Keys:
    """What an edge client is known by: everything in `keys/`, as PEM.

    Attributes:
        authority: the certificate of the coordinator's authority, the only one that is trusted.
        certificate: this node's, issued by that authority for `tls`.
        tls: private key, ECDSA P-256, of the TLS connections.
        fleet: private key, ECDSA P-384, that the SuperLink knows.
        signing: private key, Ed25519, that signs replies.
        sealing: private key, X25519, that opens what is sealed to this node.
    """

    authority: bytes
    certificate: bytes
    tls: bytes = field(repr=False)
    fleet: bytes = field(repr=False)
    signing: bytes = field(repr=False)
    sealing: bytes = field(repr=False)

    def authority_certificate(self) -> x509.Certificate:
        return _certificate(self.authority, "ca.pem")

    def node_certificate(self) -> x509.Certificate:
        return _certificate(self.certificate, "tls.pem")

    def tls_key(self) -> EllipticCurvePrivateKey:
        return _elliptic(self.tls, "tls.key")

    def fleet_key(self) -> EllipticCurvePrivateKey:
        return _elliptic(self.fleet, "fleet.key")

    def signing_key(self) -> Ed25519PrivateKey:
        key = _private(self.signing, "signing.key")
        if not isinstance(key, Ed25519PrivateKey):
            raise _damaged("signing.key", "not an Ed25519 key")
        return key

    def sealing_key(self) -> X25519PrivateKey:
        key = _private(self.sealing, "sealing.key")
        if not isinstance(key, X25519PrivateKey):
            raise _damaged("sealing.key", "not an X25519 key")
        return key

    def identity(self) -> Identity:
        """With which this node answers tasks."""
        from farfield.protocols.envelope import Identity  # brings numpy, which the other commands do without

        return Identity(self.signing_key(), self.sealing_key())


_FILES: Final = {
    "authority": "ca.pem", "certificate": "tls.pem", "tls": "tls.key", "fleet": "fleet.key", "signing": "signing.key",
    "sealing": "sealing.key",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class State:
    """What the resident process last did, for `edge-client status`.

    Attributes:
        pid, instance: the process, and the random name it attends under.
        since: when `connected` became what it is.
        run, round, activity: what it works on; None and "" when it waits.
        last_error: the last thing that went wrong, for a person.
        fleet_id: by which the SuperLink knows the last connection, if there was one.
    """

    pid: int
    instance: str
    connected: bool
    since: datetime
    run: str | None
    round: int | None
    activity: str
    last_error: str | None
    updated: datetime
    fleet_id: int | None = None


class Home:
    """One enrolled edge client on disk."""

    def __init__(self, path: Path, settings: Settings) -> None:
        """Not called directly: `create` and `open` check what they hand out."""
        self.path, self.settings = path, settings

    @classmethod
    def create(cls, path: Path, settings: Settings, keys: Keys) -> Home:
        """Make the home at `path`, whole or not at all; best within `vacant`.

        Settings that stood there before are kept as `edge-client.toml.old`.

        Raises:
            HomeError: there is a home already, or the disk refuses.
        """
        _refuse_second(path)
        partial = path / _PARTIAL
        with _disk(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove(partial)  # of a process that was killed here
            try:
                partial.mkdir(mode=0o700)
                for attribute, name in _FILES.items():
                    _write(partial / name, getattr(keys, attribute))
                _sync(partial)
                if (path / SETTINGS).exists():
                    _write(path / f"{SETTINGS}.old", (path / SETTINGS).read_bytes())
                _write(path / SETTINGS, settings.render().encode())
                partial.rename(path / KEYS)
                _sync(path)
            except BaseException:
                _remove(partial)
                raise
        return cls(path, settings)

    @classmethod
    def open(cls, path: Path) -> Home:
        """The home at `path`, with its settings as they are now.

        Raises:
            HomeError: no edge client has enrolled here, a secret lies open to others, or a setting is wrong.
        """
        if not enrolled(path):
            raise HomeError(
                "no edge client has enrolled here", where=path, hint="`edge-client join HOST:PORT --home …` does it."
            )
        _check_permissions(path)
        return cls(path, read_settings(path))

    @property
    def cache(self) -> Path:
        """The folder of downloaded bundles; it need not exist."""
        return self.path / _CACHE

    @property
    def ledger(self) -> Path:
        """The file of what runs have spent of the data's privacy; it need not exist."""
        return self.path / _LEDGER

    @property
    def local(self) -> Path:
        """The folder of what the node keeps of adapters for itself; it need not exist."""
        return self.path / _LOCAL

    def keys(self) -> Keys:
        """The keys. Raises HomeError when one is missing or may be read by others."""
        _check_permissions(self.path)
        try:
            return Keys(**{name: (self.path / KEYS / file).read_bytes() for name, file in _FILES.items()})
        except OSError as error:
            raise HomeError(f"cannot be read: {error.strerror}", where=error.filename, hint=_LOST_KEYS) from None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from working here; released by the system when this process ends, even if killed.

        Raises:
            HomeError: another process works here; says which.
        """
        with held(self.path):
            yield

    def holder(self) -> int | None:
        """The process that works here: its id (0 where that cannot be read), or None when none does."""
        try:
            lock = (self.path / _LOCK).open(encoding="ascii")
        except OSError:
            return None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _pid(lock.read())
        return None

    def state(self) -> State | None:
        """What the resident process last did; None when it never did anything, or the file cannot be read."""
        try:
            found = json.loads((self.path / _STATE).read_text(encoding="utf-8"))
            times = {name: datetime.fromisoformat(found[name]) for name in ("since", "updated")}
            return State(**{one.name: times.get(one.name, found[one.name]) for one in fields(State)})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def save_certificate(self, certificate: bytes) -> None:
        """Replace this node's certificate (PEM). Raises HomeError when the disk refuses."""
        with _disk(self.path):
            _write(self.path / KEYS / _FILES["certificate"], certificate)

    def save_state(self, state: State) -> None:
        """Replace `state.json`. Raises HomeError when the disk refuses."""
        value = asdict(state) | {"since": state.since.isoformat(), "updated": state.updated.isoformat()}
        with _disk(self.path):
            _write(self.path / _STATE, (json.dumps(value, indent=2) + "\n").encode(), durable=False)


@contextmanager
def vacant(path: Path) -> Iterator[Settings | None]:
    """Keep a place for a home while its owner enrols, so that no token is used up for a place that is none.

    Yields the settings that stand there already, for instance of a node that has left, or None. The folder is made, and
    taken away again if no home was created in it.

    Raises:
        HomeError: there is a home already, another process works there, the settings that stand there are wrong, the
            place can be changed by others, or it cannot be written.
    """
    _refuse_second(path)
    with _disk(path):
        made = [one for one in (path, *path.parents) if not one.exists()]
    try:
        with _disk(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_writers(path)
            probe = path / f".probe-{os.getpid()}"
            try:
                _write(probe, bytes(_PROBE_BYTES))
            finally:
                probe.unlink(missing_ok=True)
        with held(path):
            _refuse_second(path)
            yield read_settings(path) if (path / SETTINGS).exists() else None
    finally:
        if made and not (path / KEYS).exists():
            with suppress(OSError):  # it was never made, or something else is in it
                (path / _LOCK).unlink(missing_ok=True)
                for one in made:
                    one.rmdir()


def forget(path: Path) -> None:
    """Remove keys, cache, parts of adapters and state, within `held`; the settings, with the owner's consent, stay.

    Raises:
        HomeError: the disk refuses.
    """
    with _disk(path):
        _remove(path / _PARTIAL)
        if (path / KEYS).exists():
            (path / KEYS).rename(path / _PARTIAL)  # from here on this is no home, whatever happens
        _sync(path)
        _remove(path / _PARTIAL)
        _remove(path / _CACHE)
        _remove(path / _LOCAL)
        (path / _STATE).unlink(missing_ok=True)


def enrolled(path: Path) -> bool:
    """Whether an edge client has enrolled at `path`, sound or not. Raises HomeError when that cannot be seen."""
    with _disk(path):
        return (path / KEYS).exists()


def read_settings(path: Path) -> Settings:
    """The settings in the folder `path`. Raises HomeError."""
    file = path / SETTINGS
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "Put it back, or forget this home with `edge-client leave --force` and join again."
        raise HomeError("the settings are missing", where=file, hint=hint) from None
    except OSError as error:
        raise HomeError(f"cannot be read: {error.strerror}", where=file) from None
    except UnicodeDecodeError:
        raise HomeError("not UTF-8 text", where=file) from None
    return Settings.parse(text, where=file)


def target(host: str, port: int) -> str:
    """`host:port`; an IPv6 address goes in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_LOST_KEYS: Final = "Without it this node is nobody: have it revoked, `edge-client leave --force`, and join again."


def _refuse_second(path: Path) -> None:
    if enrolled(path):
        raise HomeError(
            "an edge client has enrolled here already",
            where=path,
            hint="`edge-client start` runs it and `edge-client leave` withdraws it; --home DIR names another place.",
        )


def _check_permissions(path: Path) -> None:
    """Raise HomeError if anybody else may read a secret, or change what this machine trusts and allows."""
    _check_writers(path)
    folder = path / KEYS
    names = sorted(name for name in _FILES.values() if name.endswith(".key"))
    for secret in (folder, *(folder / name for name in names)):
        try:
            mode = stat.S_IMODE(secret.stat().st_mode)
        except FileNotFoundError:
            raise HomeError("is missing", where=secret, hint=_LOST_KEYS) from None
        except OSError as error:
            raise HomeError(f"cannot be read: {error.strerror}", where=secret) from None
        if mode & 0o077:
            raise HomeError(
                f"others may use this secret (its mode is {mode:04o})",
                where=secret,
                hint=f"If none can have read it, `chmod -R go= {folder}`; else have the node revoked and join again.",
            )


def _check_writers(path: Path) -> None:
    for one in (path, path / SETTINGS):
        if one.exists() and one.stat().st_mode & stat.S_IWOTH:
            raise HomeError(
                "everyone on this machine may change it, and so what this client trusts and allows",
                where=one,
                hint=f"`chmod o-w {one}`.",
            )


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep other processes from working in the folder `path`; see `Home.held`."""
    with _disk(path):
        lock = os.fdopen(os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="ascii")
    with lock:
        for attempt in range(_LOCK_ATTEMPTS):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == _LOCK_ATTEMPTS - 1:
                    pid = _pid(lock.read())
                    raise HomeError(
                        f"another edge-client process{f' ({pid})' if pid else ''} runs here",
                        where=path,
                        hint="Stop it first, or give another place with --home.",
                    ) from None
            time.sleep(0.01)  # `edge-client status` looks at the lock for a moment
        with suppress(OSError):  # a full disk; the lock holds, only whose it is cannot be said
            os.truncate(lock.fileno(), 0)
            os.pwrite(lock.fileno(), str(os.getpid()).encode(), 0)
        yield


_LOCK_ATTEMPTS: Final = 20


def _pid(text: str) -> int:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0


def _write(file: Path, raw: bytes, *, durable: bool = True) -> None:
    """Put `raw` at `file`, mode 0600, whole or not at all; on the disk before returning if `durable`."""
    partial = file.with_name(f"{file.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(raw)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into a HomeError."""
    try:
        yield
    except OSError as error:
        raise HomeError(
            f"cannot be used: {(error.strerror or str(error)).lower()}",
            where=error.filename or path,
            hint="Make room or see to its permissions, or name another place with --home.",
        ) from None


def _certificate(pem: bytes, name: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion):
        raise _damaged(name, "not a certificate") from None


def _private(pem: bytes, name: str) -> Any:
    try:
        return load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        raise _damaged(name, "not a private key") from None


def _elliptic(pem: bytes, name: str) -> EllipticCurvePrivateKey:
    key = _private(pem, name)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise _damaged(name, "not a key on an elliptic curve")
    return key


def _damaged(name: str, what: str) -> HomeError:
    return HomeError(what, where=f"{KEYS}/{name}", hint=_LOST_KEYS)


def _known_keys(path: list[str]) -> set[str]:
    known: type[BaseModel] = Settings
    for part in path:
        inner = known.model_fields[part].annotation
        assert isinstance(inner, type) and issubclass(inner, BaseModel)
        known = inner
    return set(known.model_fields)


def _first_line(section: type) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="# ")


def toml(value: object) -> str:
    """A setting as TOML."""
    match value:
        case str():
            # JSON's escapes are TOML's, but for one character that JSON leaves as it is.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case tuple():
            return f"[{', '.join(map(toml, value))}]"
        case int():
            return f"{value:_}" if value >= 10_000_000 else str(value)
        case float():
            return repr(value)
    raise AssertionError(f"settings hold no {type(value).__name__}")
