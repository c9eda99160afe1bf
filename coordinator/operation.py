"""The commands that work a federation: `serve` and `run`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .administration import DEFAULT_HOME, HomeOption, run_document

app = typer.Typer()


@app.command()
def serve(home: HomeOption = DEFAULT_HOME) -> None:
    """Run the coordinator's service, until Ctrl-C or SIGTERM."""
    import asyncio

    from .home import Home
    from .service import serve

    console = Console()

    def say(text: str) -> None:
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        console.print(f"{stamp}  {text}", highlight=False, markup=False, soft_wrap=True)

    asyncio.run(serve(Home.open(home), say))


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(help="The Plan, a TOML file.")],
    home: HomeOption = DEFAULT_HOME,
    emulator: Annotated[
        Path | None,
        typer.Option(help="What clients get, for a Plan that ships an emulator: as `emulator build` wrote it."),
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(help="Text by which adapter and emulator are judged; else what the emulator was made with."),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Print the run's name, and do not wait for its end.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the result to this file as JSON; with --detach, the run that was made."),
    ] = None,
) -> None:
    """Have the service run a Plan with the clients that are there, and watch it."""
    from .console import RunConsole, print_result
    from .home import Home
    from .results import Result
    from .runs import RunFolder, writing
    from .submission import submit, watch

    if json_file is not None:
        with writing(json_file):
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.open("a").close()
    opened = Home.open(home)
    store = opened.store()
    console = Console()
    submitted = submit(plan, opened, store, datetime.now(UTC), emulator, public)
    if detach:
        store.close()
        print(submitted.name)
        if json_file is not None:
            _write(json_file, run_document(submitted, rounds=0))
        return
    try:
        with RunConsole(console, submitted.name, submitted.folder) as watcher:
            ended = watch(submitted.name, store, watcher)
    except KeyboardInterrupt:
        ending = f"`coordinator runs` shows it, and `coordinator cancel {submitted.name}` ends it."
        print(f"Stopped watching; the run goes on. {ending}", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        store.close()
    result = Result.read(RunFolder.open(ended.folder))
    print_result(console, result)
    if json_file is not None:
        _write(json_file, result.document())


def _write(path: Path, document: Mapping[str, Any]) -> None:
    from .runs import writing

    with writing(path):
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
