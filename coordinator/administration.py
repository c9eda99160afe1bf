"""The commands that look after a coordinator: they read and write its home, whether or not the service runs.

Each prints for a person; `--json` prints the same as one JSON document, with times in ISO 8601.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from farfield.protocols.errors import EnrolmentError, StorageError

if TYPE_CHECKING:
    from .home import Home
    from .storage import Node, Run, Store

HOME_VARIABLE = "FARFIELD_COORDINATOR_HOME"
DEFAULT_HOME = Path("~/.farfield/coordinator")

HomeOption = Annotated[Path, typer.Option("--home", envvar=HOME_VARIABLE, help="The coordinator's home.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Port = Annotated[int, typer.Option(min=1, max=65535)]

app = typer.Typer()


@app.command()
def init(
    home: Annotated[Path, typer.Argument(envvar=HOME_VARIABLE, help="A new folder.")] = DEFAULT_HOME,
    hostname: Annotated[
        list[str] | None,
        typer.Option(help="Name or address by which clients reach this machine; may be repeated. [default: its name]"),
    ] = None,
    database: Annotated[
        str | None, typer.Option(metavar="URL", help="sqlite:///FILE or postgresql://… [default: a file in the home]")
    ] = None,
    enrolment_port: Port = 9094,
    federation_port: Port = 9093,
    fleet_port: Port = 9092,
    control_port: Port = 9091,
) -> None:
    """Make a coordinator's home: its keys, its database and its settings."""
    import socket

    from .home import Home

    made = Home.create(
        home,
        hostname or [socket.gethostname()],
        _now(),
        database=database,
        enrolment=f"0.0.0.0:{enrolment_port}",
        federation=f"0.0.0.0:{federation_port}",
        fleet=f"0.0.0.0:{fleet_port}",
        control=f"127.0.0.1:{control_port}",
    )
    console = Console()
    say(console, f"Coordinator made in {made.path}, for {', '.join(made.settings.service.hostnames)}.")
    say(
        console,
        "Its settings are in coordinator.toml. keys/ca.key is what every client will trust: back it up, safely.",
    )
    say(console, f"Start it with: coordinator serve --home {made.path}")


@app.command()
def invite(
    home: HomeOption = DEFAULT_HOME,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="How many tokens; each admits one machine.")] = 1,
    expires: Annotated[str, typer.Option(help="How long they are good for: 30m, 24h, 7d.")] = "24h",
) -> None:
    """Print tokens, one a line, with which machines can join."""
    import hashlib
    import secrets

    from farfield.protocols.identity import Token

    from .home import Home

    lifetime = _duration(expires)
    opened = Home.open(home)
    authority = opened.authority().fingerprint
    tokens = [Token(secrets.token_bytes(16), authority) for _ in range(count)]
    with _store(opened) as store:
        store.invite([hashlib.sha256(token.secret).digest() for token in tokens], _now(), lifetime)
    service = opened.settings.service
    host = service.hostnames[0]
    where = f"[{host}]" if ":" in host else host
    whom = (
        "On the machine that is to join" if count == 1 else "On each machine that is to join, with a token of its own"
    )
    print(f"{whom}, within {expires}:", file=sys.stderr)
    print(f"    edge-client join {where}:{service.enrolment.port} --token TOKEN --data PATH", file=sys.stderr)
    for token in tokens:
        print(token.text())


@app.command()
def status(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Whether the service runs, and how many nodes, invitations and runs there are."""
    from .home import Home

    opened, now = Home.open(home), _now()
    with _store(opened) as store:
        since, beat = store.serving_since(now), store.last_beat()
        nodes = Counter(_node_state(node, serving=since is not None) for node in store.nodes())
        runs = Counter(run.state.value for run in store.runs())
        invitations = store.open_invitations(now)
        database = store.name
    days = opened.authority().days_left(now)
    if as_json:
        last = {"process": beat[0], "last_beat": _iso(beat[1])} if beat else {"process": None, "last_beat": None}
        print_json(
            {
                "home": str(opened.path),
                "service": {"running": since is not None, "since": _iso(since), **last},
                "database": database,
                "nodes": {state: nodes[state] for state in ("attending", "away", "revoked")},
                "invitations": invitations,
                "runs": {state: runs[state] for state in _run_states()},
                "certificates": days,
            }
        )
        return
    if since and beat:
        service = Text(f"running since {_at(since)}, process {beat[0]}", "green")
    else:
        service = Text(f"not running; last seen {_at(beat[1])}" if beat else "not running", "yellow")
    admitted = nodes["attending"] + nodes["away"]
    revoked = f", {nodes['revoked']} revoked" if nodes["revoked"] else ""
    counted = ", ".join(f"{runs[state]} {state}" for state in _run_states() if runs[state])
    certificates = Text(", ").join(_days(name, left) for name, left in days.items())
    print_table(
        Console(),
        (),
        [
            [Text("Service", "bold"), service],
            [Text("Home", "bold"), str(opened.path)],
            [Text("Database", "bold"), database],
            [Text("Nodes", "bold"), f"{nodes['attending']} attending of {admitted} enrolled{revoked}"],
            [Text("Invitations", "bold"), f"{invitations} open"],
            [Text("Runs", "bold"), counted or "none yet"],
            [Text("Certificates", "bold"), certificates],
        ],
    )


@app.command()
def nodes(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """The machines that were admitted."""
    from .home import Home

    with _store(Home.open(home)) as store:
        serving = store.serving_since(_now()) is not None
        found = store.nodes()
    if as_json:
        print_json([_node_document(node, serving) for node in found])
        return
    console = Console()
    if not found:
        say(console, "No node has joined yet; `coordinator invite` prints a token for one.")
        return
    rows: list[list[str | Text]] = [
        [node.name, _node_words(node, serving), _at(node.enrolled_at), _printable(node.address or "")] for node in found
    ]
    print_table(console, ("NODE", "STATE", "ENROLLED", "ADDRESS"), rows)


@app.command()
def runs(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """The runs, oldest first."""
    from .home import Home

    with _store(Home.open(home)) as store:
        found = [(run, _finished_rounds(store, run)) for run in store.runs()]
    if as_json:
        print_json([run_document(run, rounds) for run, rounds in found])
        return
    console = Console()
    if not found:
        say(console, "There is no run yet; `coordinator run PLAN.toml` makes one.")
        return
    styles = {"queued": "", "running": "green", "finished": "dim", "failed": "red", "cancelled": "yellow"}
    rows: list[list[str | Text]] = [
        [
            run.name,
            Text(run.state.value, styles[run.state.value]),
            str(rounds),
            _at(run.created_at),
            _printable(run.detail),
        ]
        for run, rounds in found
    ]
    print_table(console, ("RUN", "STATE", "ROUNDS", "CREATED", "DETAIL"), rows)


@app.command()
def cancel(
    run: Annotated[str, typer.Argument(help="Its name, as `coordinator runs` prints it.")],
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """End a run; its finished rounds are kept."""
    from .home import Home
    from .storage import RunState

    with _store(Home.open(home)) as store:
        store.end(run, RunState.CANCELLED, "cancelled with `coordinator cancel`", _now())
        ended = store.run(run)
        assert ended is not None
        rounds = _finished_rounds(store, ended)
    if ended.state is not RunState.CANCELLED:
        raise StorageError(f"the run has {ended.state.value} already", where=run)
    if as_json:
        print_json(run_document(ended, rounds))
    else:
        say(Console(), f"Run {run} is cancelled; what it has finished is kept in {ended.folder}.")


@app.command()
def revoke(
    node: Annotated[str, typer.Argument(help="Its name, as `coordinator nodes` prints it.")],
    because: Annotated[str, typer.Option(help="The reason, for whoever looks later and for the node.")] = "",
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Admit a node no longer: its keys and its certificate are worth nothing from now on."""
    from .home import Home

    with _store(Home.open(home)) as store:
        store.revoke(node, because, _now())
        revoked = store.node(node)
        assert revoked is not None and revoked.revoked_at is not None
    if as_json:
        print_json(_node_document(revoked, serving=False))
    else:
        say(Console(), f"Node {node} is revoked, since {_at(revoked.revoked_at)}. Its name is not given again.")


# --- What they say --------------------------------------------------------------------------------------------------


def _node_state(node: Node, *, serving: bool) -> str:
    """A node attends the service; when that does not run, no node does, whatever it last wrote."""
    if node.revoked_at:
        return "revoked"
    return "attending" if node.instance and serving else "away"


def _node_words(node: Node, serving: bool) -> Text:
    match _node_state(node, serving=serving):
        case "revoked":
            because = f" because {_printable(node.revoked_because)}" if node.revoked_because else ""
            return Text(f"revoked{because}", "red")
        case "attending":
            return Text("attending", "green")
        case _:
            return Text(f"away since {_at(node.seen_at)}" if node.seen_at else "never attended", "dim")


def _node_document(node: Node, serving: bool) -> dict[str, Any]:
    return {
        "node": node.name,
        "state": _node_state(node, serving=serving),
        "enrolled_at": _iso(node.enrolled_at),
        "seen_at": _iso(node.seen_at),
        "address": node.address,
        "revoked_at": _iso(node.revoked_at),
        "revoked_because": node.revoked_because,
        "certificate": node.certificate,
    }


def run_document(run: Run, rounds: int) -> dict[str, Any]:
    return {
        "run": run.name,
        "state": run.state.value,
        "detail": run.detail,
        "rounds": rounds,
        "plan_digest": run.plan_digest,
        "backbone": run.backbone,
        "folder": str(run.folder),
        "created_at": _iso(run.created_at),
        "started_at": _iso(run.started_at),
        "finished_at": _iso(run.finished_at),
    }


def _finished_rounds(store: Store, run: Run) -> int:
    """Without number 0, which is the evaluation before the first."""
    return sum(record.round > 0 for record in store.rounds(run.name))


def _run_states() -> list[str]:
    from .storage import RunState

    return [state.value for state in RunState]


def _days(name: str, left: int) -> Text:
    from .authority import RENEW_DAYS

    if left < 0:
        return Text(f"{name} has expired", "red")
    return Text(f"{name} {left} days", "yellow" if left < RENEW_DAYS else "")


def _at(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


# --- How they print and read ----------------------------------------------------------------------------------------


def print_table(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
    """Columns as wide as what is in them. No line is cut or folded, so that what is piped stays one line a row."""
    table = [[Text(title, "bold") for title in titles]] if titles else []
    table += [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    widths = [max(cell_len(cell.plain) for cell in column) for column in zip(*table, strict=True)]
    for row in table:
        line = Text()
        for cell, width in zip(row, widths, strict=True):
            line.append_text(cell).append(" " * (width - cell_len(cell.plain) + 3))
        line.rstrip()
        console.print(line, soft_wrap=True, highlight=False)


def say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=2))


def _printable(text: str) -> str:
    """One line that leaves the terminal alone: the text may come from a client."""
    return "".join(one if one.isprintable() else "?" for one in " ".join(text.split()))


def _duration(text: str) -> timedelta:
    """30m, 24h or 7d. Raises EnrolmentError."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})([mhd])", text)
    unit = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}
    lifetime = int(found[1]) * unit[found[2]] if found else timedelta()
    if not timedelta() < lifetime <= timedelta(days=365):
        hint = "Give minutes, hours or days, as 30m, 24h or 7d; at most 365d."
        raise EnrolmentError(f"{text!r} is no time that a token could be good for", where="--expires", hint=hint)
    return lifetime


@contextmanager
def _store(home: Home) -> Iterator[Store]:
    store = home.store()
    try:
        yield store
    finally:
        store.close()


def _now() -> datetime:
    return datetime.now(UTC)
