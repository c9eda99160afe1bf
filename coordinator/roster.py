"""The commands for a consortium's roster: who belongs to it, signed with a key that the coordinator does not have.

    at the coordinator     roster list ─▶ members.json                  roster install
    at the consortium      roster key ─▶ key     roster sign ─▶ roster.json ┘

The consortium's part needs no coordinator's home, and belongs on a machine of its own.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farfield.protocols.durable import write
from farfield.protocols.errors import HomeError, TrustError

from .administration import DEFAULT_HOME, HomeOption

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from farfield.protocols.roster import Roster

app = typer.Typer(help="Bind secure sums to the nodes that a consortium vouches for.", no_args_is_help=True)


@app.command()
def key(file: Annotated[Path, typer.Argument(help="A new file for the private key.")]) -> None:
    """Make a consortium's key pair, and print the public key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    made = Ed25519PrivateKey.generate()
    file = file.expanduser()
    with _disk(file):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as stream:
            stream.write(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    print(
        f"Private key made in {file}. It belongs on a machine of the consortium's, never on the coordinator's:\n"
        "whoever has it decides whom the clients believe. Back it up, safely. Each client's owner writes the public\n"
        'key into edge-client.toml, in [consent], as roster_key = "…":',
        file=sys.stderr,
    )
    print(made.public_key().public_bytes_raw().hex())


@app.command("list")
def list_(
    home: HomeOption = DEFAULT_HOME,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", allow_dash=True, help="Also write them to this file, for the consortium; - prints JSON."
        ),
    ] = None,
) -> None:
    """The nodes that are enrolled, with the keys that they sign with."""
    members = _enrolled(home)
    document = json.dumps({name: raw.hex() for name, raw in members.items()}, indent=2) + "\n"
    if json_file == Path("-"):
        print(document, end="")
        return
    if not members:
        print("No node has joined yet; `coordinator invite` prints a token for one.")
    else:
        _print_members(members)
        print(
            "\nThis is the coordinator's word. Before it is signed, compare each key with what `edge-client status`\n"
            "shows on its machine, by telephone say, and take out what nobody answers for.",
            file=sys.stderr,
        )
    if json_file is not None:
        _replace(json_file.expanduser(), document.encode())


@app.command()
def sign(
    members: Annotated[
        Path, typer.Argument(help="A JSON file of names and keys, as `coordinator roster list` writes.")
    ],
    key_file: Annotated[Path, typer.Option("--key", help="The consortium's private key.")],
    out: Annotated[Path, typer.Option(help="Where the signed roster goes; one that is there is replaced.")],
    name: Annotated[str, typer.Option(help="What the consortium calls itself.")] = "consortium",
    expires: Annotated[
        int, typer.Option(metavar="DAYS", min=0, max=36500, help="How many days it is good for; 0 for ever.")
    ] = 365,
) -> None:
    """Sign who belongs to the consortium, on a machine of the consortium's, and show what was signed."""
    from farfield.protocols import roster

    issued = datetime.now(UTC).replace(microsecond=0)
    until = issued + timedelta(days=expires) if expires else None
    private = _private(key_file.expanduser())
    drawn = roster.draw_up(name, _json(members.expanduser()), issued, until)
    signed = roster.sign(drawn, private)
    _replace(out.expanduser(), signed)
    _print_members(drawn.members)
    print(f"\n{_signed_by(drawn, private.public_key().public_bytes_raw())}\nWritten to {out}; it is no secret.")


@app.command()
def install(
    file: Annotated[Path, typer.Argument(metavar="ROSTER", help="The signed roster.")],
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Send a signed roster along with every run that begins from now on."""
    from farfield.protocols import roster

    from .home import Home

    opened, raw = Home.open(home), _read(file.expanduser(), roster.MOST_BYTES + 1)
    public = roster.stated_key(raw)
    found = roster.open_roster(raw, public, datetime.now(UTC))
    for name, own in _enrolled(home).items():
        if found.members.get(name) != own:
            why = "with another key" if name in found.members else "not at all"
            print(
                f"warning: {name} is enrolled, and on the roster {why}. Clients that ask for the roster refuse any "
                "round that it is in.",
                file=sys.stderr,
            )
    _replace(opened.roster_file, raw)
    print(f"{_signed_by(found, public)}\nInstalled in {opened.path}; every run that begins from now on comes with it.")


# --- What they share ------------------------------------------------------------------------------------------------


def _enrolled(home: Path) -> dict[str, bytes]:
    """Raw signing key of every node that is not revoked."""
    from .home import Home

    with closing(Home.open(home).store()) as store:
        return {node.name: node.signing_key for node in store.nodes() if node.revoked_at is None}


def _print_members(members: Mapping[str, bytes]) -> None:
    width = max(map(len, ("NODE", *members)))
    print(f"{'NODE':{width}}   KEY")
    for name, raw in sorted(members.items()):
        print(f"{name:{width}}   {raw.hex()}")


def _signed_by(roster: Roster, public: bytes) -> str:
    until = f"until {roster.expires:%Y-%m-%d %H:%M} UTC" if roster.expires else "for ever"
    count = "1 node" if len(roster.members) == 1 else f"{len(roster.members)} nodes"
    return (
        f"Roster of {roster.consortium!r}: {count}, issued {roster.issued:%Y-%m-%d %H:%M} UTC, good {until}.\n"
        f"Signed with the key {public.hex()}."
    )


def _private(file: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem = _read(file, 1 << 16)
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        hint = f"If none can have read it, protect it with: chmod 600 {file}"
        raise HomeError(f"others may use this secret (its mode is {mode:04o})", where=file, hint=hint)
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        hint = "`coordinator roster key FILE` makes one."
        raise TrustError("not a consortium's private key", where=file, hint=hint)
    return key


def _json(file: Path) -> object:
    try:
        return json.loads(_read(file, 1 << 24))
    except (ValueError, RecursionError) as error:
        raise TrustError(f"not valid JSON: {error}", where=file) from None


def _read(file: Path, most: int) -> bytes:
    with _disk(file), file.open("rb") as stream:
        return stream.read(most)


def _replace(file: Path, raw: bytes) -> None:
    """Put `raw` at `file`, whole or not at all."""
    with _disk(file):
        write(file, raw)


@contextmanager
def _disk(file: Path) -> Iterator[None]:
    """Turn what the disk refuses into a HomeError."""
    try:
        yield
    except FileExistsError:
        raise HomeError("exists already", where=file, hint="Give another place; a key is never replaced.") from None
    except OSError as error:
        raise HomeError(f"cannot be used: {(error.strerror or str(error)).lower()}", where=file) from None
