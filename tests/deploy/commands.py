"""The two commands as they are, for checking what the files below deploy/ call."""

from __future__ import annotations

import functools
import shlex
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import click

PROGRAMS = ("coordinator", "edge-client")


@functools.cache
def programs() -> dict[str, click.Command]:
    with warnings.catch_warnings():
        # typer 0.20 imports names that click 8.5 deprecates.
        warnings.filterwarnings("ignore", "'click.utils", DeprecationWarning)
        import typer

        from farfield.coordinator.cli import app as coordinator
        from farfield.edge_client.cli import app as edge_client
    return {"coordinator": typer.main.get_command(coordinator), "edge-client": typer.main.get_command(edge_client)}


def problem(words: Iterable[str]) -> str | None:
    """Why the command cannot be given: "there is no option …". None when it can."""
    program, *arguments = words
    found = programs()[Path(program).name]
    while isinstance(found, click.Group):
        if not arguments or arguments[0] not in found.commands:
            return f"{program} has no command {' '.join(arguments[:1])!r}"
        found, arguments = found.commands[arguments[0]], arguments[1:]
    try:
        found.make_context(str(found.name), list(arguments))
    except click.ClickException as error:
        return f"{program} {found.name}: {error.format_message()}"
    return None


def install(folder: Path) -> None:
    """Put the two programs into a folder, as the wheel would."""
    for name, package in zip(PROGRAMS, ("coordinator", "edge_client"), strict=True):
        program = folder / name
        program.write_text(f"#!{sys.executable}\nfrom farfield.{package}.cli import main\n\nmain()\n", encoding="utf-8")
        program.chmod(0o755)


def in_shell(text: str) -> list[list[str]]:
    """The commands of ours in a shell script or one line of it, as words.

    What stands before the program's name (sudo, docker compose exec …) and what redirects it is left out. A program's
    name that nothing follows is something else: the name of a service or of a unit.
    """
    found = []
    for line in joined_lines(text):
        words = shlex.split(line, comments=True)
        for index, word in enumerate(words):
            after = words[index + 1 : index + 2]
            if Path(word).name in PROGRAMS and after and after[0] not in PROGRAMS:
                found.append([Path(word).name, *until_operator(words[index + 1 :])])
                break
    return found


def joined_lines(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def until_operator(words: list[str]) -> list[str]:
    kept = []
    for word in words:
        if word in ("<", ">", ">>", "|", "||", "&&", ";", "fi", "then"):
            break
        kept.append(word)
    return kept
