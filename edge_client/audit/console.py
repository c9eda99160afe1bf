"""What an audit prints, on either side: how it goes on, and what each attack found in a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import TaskID

from farfield.protocols.audit.finding import Figure, Finding, Untried
from farfield.protocols.audit.verify import Check
from farfield.protocols.terminal import bar, plain

from .attack import Attack, registered
from .folder import Published

_STYLES: Final = {"leak": "red", "failed": "red", "no leak found": "green", "passed": "green"}

_MARKS: Final = {True: "holds", False: "DOES NOT HOLD", None: "not checked"}


class AuditConsole:
    """Reports an audit: attacks and what they found as lines, the work within one as a bar (on a terminal only)."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = bar(console)
        self._whole: TaskID | None = None
        self._part = self._bar.add_task("starting", total=None, visible=False)
        self._said = ""
        self.folder: Path | None = None
        """The audit's folder, from the moment that there is one."""

    def __enter__(self) -> AuditConsole:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def on_folder(self, folder: Path) -> None:
        self.folder = folder
        plain(self.console, f"Audit in {folder}")

    def say(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._part, description=what, completed=done, total=total, visible=done < total)
        kind = what.split(",")[0]
        if not self.console.is_terminal and kind != self._said:
            plain(self.console, f"    {kind}")
            self._said = kind

    def on_attack(self, attack: Attack, number: int, attacks: int) -> None:
        if self._whole is None:
            self._whole = self._bar.add_task("attacks", total=attacks)
        self._bar.update(self._whole, completed=number - 1, description=f"attacks: {attack.title}")
        if not self.console.is_terminal:
            plain(self.console, f"{number}/{attacks} {attack.title}")

    def on_finding(self, finding: Finding) -> None:
        self._bar.update(self._part, visible=False)
        plain(self.console, f"{finding.title}: {finding.verdict} ({finding.seconds:.0f} s)", _STYLES[finding.verdict])
        for sentence in finding.found:
            plain(self.console, f"    {sentence}")

    def on_untried(self, untried: Untried) -> None:
        plain(self.console, f"{untried.title}: not tried, for {untried.reason}", "yellow")


def print_audit(console: Console, made: Published) -> None:
    """The end of an audit: its most important numbers, and where its report is."""
    plain(console, "")
    for finding in made.report.findings:
        for figure in finding.figures:
            if figure.headline:
                against = _against(figure)
                plain(console, f"{_value(figure):>12}  {figure.name}{f' ({against})' if against else ''}")
    plain(console, "")
    plain(console, f"Signed report: {made.file}")
    plain(console, f"To read: {made.page}")


def print_attacks(console: Console) -> None:
    """All attacks, with who could make them and what they take."""
    for attack in registered().values():
        plain(console, f"{attack.name}{'' if attack.default else ' (not by default)'}: {attack.title}", "bold")
        plain(console, f"    by {attack.attacker}")
        plain(console, f"    takes {attack.cost}")


def print_checks(console: Console, checks: Sequence[Check]) -> bool:
    """A line for each check of a report; whether nothing was found that does not hold."""
    for check in checks:
        style = "" if check.ok is None else "green" if check.ok else "red"
        plain(console, f"{check.name}: {_MARKS[check.ok]}; {check.said}", style)
    return all(check.ok is not False for check in checks)


def _value(figure: Figure) -> str:
    if figure.value is None:
        return "none"
    if figure.unit == "%":
        return f"{figure.value:.1%}"
    return f"{figure.value:.3g}{' ' if figure.unit else ''}{figure.unit}"


def _against(figure: Figure) -> str:
    percent = figure.unit == "%"
    held = {"chance": figure.chance, "ceiling": figure.ceiling, "claimed": figure.claimed}
    told = {name: f"{value:.1%}" if percent else f"{value:.3g}" for name, value in held.items() if value is not None}
    return ", ".join(f"{name} {value}" for name, value in told.items())
