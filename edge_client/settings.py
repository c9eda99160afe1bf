"""`edge-client.toml`: its sections, read and written.

The owner edits the file, so every key stands in it with a comment that says what it is for, and a wrong one is named.
"""

from __future__ import annotations

import json
import textwrap
import tomllib
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import BaseModel, Field, ValidationError, field_validator

from farfield.protocols.complaints import complaint
from farfield.protocols.errors import DataError, HomeError
from farfield.protocols.identity import NAME

from .consent import Consent, Section
from .sources import Part, data_source

SETTINGS: Final = "edge-client.toml"

Port = Annotated[int, Field(ge=1, le=65535)]


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
