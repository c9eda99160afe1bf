"""The `coordinator` command within the process of the tests: no start to wait for, and the same entry point."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
from tiny import Ended

from farfield.coordinator import cli

Command = Callable[..., Ended]


def running(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *group: str) -> Command:
    """Runs `coordinator GROUP ARGUMENTS` up to where it would exit."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["coordinator", *group, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err, 0)

    return run


def refused(ended: Ended, *parts: str) -> None:
    """One line that says what is wrong, status 2, and nothing else."""
    assert (ended.status, ended.out) == (2, ""), ended
    assert re.fullmatch(r"error: [^\n]+\n", ended.err), ended.err
    for part in parts:
        assert part in ended.err
