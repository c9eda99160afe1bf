"""A report as a page: one HTML file that asks for nothing else, for a screen, a telephone and paper.

The page is made of the report alone. It is not signed; the report is, so the page ends with how to verify that.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import svg
from .finding import Figure, Finding, Interval, Plot, Table
from .guarantee import chapters
from .report import Report
from .wording import capital, epsilon, number, printable, sentence

VERDICTS: Final = {
    "leak": ("▲", "Leak found"),
    "no leak found": ("○", "No leak found"),
    "passed": ("✓", "Test passed"),
    "failed": ("✕", "Test failed"),
}
"""A sign and words for each verdict: neither needs a colour."""


@dataclass(frozen=True, slots=True)
class Row:
    """A figure as it is read, with "" for what it does not have."""

    name: str
    value: str
    interval: str
    chance: str
    ceiling: str
    claimed: str
    note: str


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table, and for each of its columns whether it is of numbers."""

    table: Table
    numeric: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A plot, its legend as pairs of a swatch and a name, and its caption."""

    title: str
    image: Markup
    legend: tuple[tuple[Markup, str], ...]
    caption: str


@dataclass(frozen=True, slots=True)
class Part:
    """A finding and what is made of it."""

    finding: Finding
    name: str
    sign: str
    verdict: str
    figures: tuple[Row, ...]
    headlines: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    drawings: tuple[Drawing, ...]
    sheets: tuple[Sheet, ...]


_NUMERIC: Final = re.compile(r"[<>≤≥±+−-]?\s?[0-9]|[–—-]$")
_COLUMNS: Final = (
    ("value", "Value"),
    ("interval", "95 % interval"),
    ("chance", "Chance"),
    ("ceiling", "Ceiling"),
    ("claimed", "Claimed"),
)


def page(report: Report, key: bytes) -> str:
    """The page of a report that was signed with `key`, a raw Ed25519 public key."""
    here = Path(__file__).parent
    # Autoescape is for whatever stands in a finding; what svg.py makes has been escaped there.
    made = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_kept_together,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["sentence"] = sentence
    return made.get_template("page.html.jinja").render(
        report=report,
        key=key.hex(),
        style=Markup((here / "page.css").read_text(encoding="utf-8")),  # noqa: S704 - ours
        made=f"{report.made:%Y-%m-%d %H:%M} UTC",
        subject=_subject(report),
        verdict=_verdict(report),
        lead=_lead(report),
        claim=_claim(report),
        parts=[_part(one, f"a{n}") for n, one in enumerate(report.findings, 1)],
        bounds=_bounds(report),
        chapters=chapters(report),
        rounds=_rounds(report),
        minutes=_minutes(report),
    )


def figure(shown: Figure) -> Row:
    """A figure as text."""

    def text(value: float | None) -> str:
        return "" if value is None else quantity(value, shown.unit)

    return Row(
        name=capital(shown.name),
        value=text(shown.value) or "none",
        interval="" if shown.interval is None else interval(shown.interval, shown.unit),
        chance=text(shown.chance),
        ceiling=text(shown.ceiling),
        claimed=text(shown.claimed),
        note=shown.note,
    )


def quantity(value: float, unit: str) -> str:
    """ "12.5 %", "3.1 bits", "0.42": the value with its unit. A share, from 0 to 1, is shown in percent."""
    if unit == "%":
        return f"{number(100 * value, 3)} %"
    return f"{number(value, 3)} {unit}".rstrip()


def interval(shown: Interval, unit: str) -> str:
    """ "1 to 2", "at least 1", "at most 2"; with the confidence where that is not 95 %."""
    low, high = (None if one is None else quantity(one, unit) for one in (shown.low, shown.high))
    if low is not None and high is not None:
        text = f"{low.removesuffix(unit).rstrip()} to {high}" if unit else f"{low} to {high}"
    else:
        text = f"at least {low}" if low is not None else f"at most {high}" if high is not None else ""
    return text if shown.confidence == 0.95 or not text else f"{text} ({number(100 * shown.confidence)} %)"


def _kept_together(value: object) -> object:
    """Text in which no line ends before a percent sign, or within "ε = 8"."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return printable(value).replace(" %", "\u00a0%").replace("ε = ", "ε\u00a0=\u00a0").replace("δ = ", "δ\u00a0=\u00a0")


def _part(one: Finding, name: str) -> Part:
    sign, verdict = VERDICTS[one.verdict]
    rows = tuple(figure(each) for each in one.figures)
    return Part(
        one,
        name,
        sign,
        verdict,
        rows,
        tuple(_headline(each) for each in one.figures if each.headline),
        tuple(column for column in _COLUMNS if any(getattr(row, column[0]) for row in rows)),
        tuple(_drawing(each, f"{name}p{n}") for n, each in enumerate(one.plots, 1)),
        tuple(_sheet(each) for each in one.tables),
    )


def _sheet(table: Table) -> Sheet:
    return Sheet(
        table,
        tuple(
            all(_NUMERIC.match(row[n]) for row in table.rows if n < len(row) and row[n])
            for n in range(len(table.columns))
        ),
    )


def _headline(shown: Figure) -> str:
    cell = figure(shown)
    beside = [
        f"95 %: {cell.interval}" if shown.interval and shown.interval.confidence == 0.95 else cell.interval,
        cell.chance and f"chance {cell.chance}",
        cell.ceiling and f"ceiling {cell.ceiling}",
        cell.claimed and f"claimed {cell.claimed}",
    ]
    more = ", ".join(one for one in beside if one)
    return f"{cell.name}: {cell.value}" + (f" ({more})" if more else "")


def _drawing(plot: Plot, name: str) -> Drawing:
    legend = [
        (svg.swatch(n, points=one.style == "points", band=bool(one.low and one.high)), one.label)
        for n, one in enumerate(plot.series)
    ]
    if plot.diagonal:
        legend.append((svg.swatch_of_chance(), "guessing"))
    return Drawing(
        plot.title,
        Markup(svg.plot(plot, name)),  # noqa: S704 - escaped there
        tuple((Markup(swatch), label) for swatch, label in legend),  # noqa: S704 - nothing of a report in it
        plot.caption,
    )


def _bounds(report: Report) -> Markup | None:
    """The chart of claimed ε beside measured bounds and their ceilings; None where no attack measured one."""
    rows = [
        svg.Bound(capital(each.name), each.value, each.ceiling, each.claimed)
        for each in _epsilons(report)
        if each.value is not None
    ]
    if not rows:
        return None
    return Markup(svg.bounds(rows, "Lower bounds on ε that were measured", "bounds"))  # noqa: S704 - escaped there


def _epsilons(report: Report) -> list[Figure]:
    """The headline figures that are lower bounds on ε: what they are is in their name or unit.

    What each is held against is its own claim. The Plan's is not always that: it may be of another unit.
    """
    return [
        each
        for one in report.findings
        for each in one.figures
        if each.headline and each.value is not None and "ε" in each.name + each.unit
    ]


def _subject(report: Report) -> str:
    if report.scope == "client":
        return f"What the update of one client gives away before it is sent, on {report.data}."
    clients = f"{report.clients} {'client' if report.clients == 1 else 'clients'}"
    rounds = f"{len(report.rounds)} {'round' if len(report.rounds) == 1 else 'rounds'}"
    return f"A federation of {clients} over {rounds}, on {report.data}."


def _verdict(report: Report) -> tuple[str, str, str]:
    """Kind, sign and words of the verdict on the whole."""
    verdicts = [one.verdict for one in report.findings]
    failed = "failed" in verdicts
    if _exceeded(report):
        return "leak", "▲", f"More leaked than the Plan claims{', and a test failed' if failed else ''}"
    if "leak" in verdicts:
        return "leak", "▲", f"Leaks were found{', and a test failed' if failed else ''}"
    if failed:
        return "failed", "✕", "A test of the protection failed"
    if not report.findings:
        return "untried", "–", "Nothing was tried"
    return "no leak found", "○", "No leak was found"


def _lead(report: Report) -> str:
    attacks = [one for one in report.findings if one.verdict in ("leak", "no leak found")]
    tests = [one for one in report.findings if one.verdict in ("passed", "failed")]
    told = []
    if attacks:
        found = sum(one.verdict == "leak" for one in attacks)
        if len(attacks) == 1:
            told.append(f"One attack was made, and found {'something' if found else 'nothing'} beyond chance.")
        else:
            told.append(f"{len(attacks)} attacks were made; {found or 'none'} of them found something beyond chance.")
    if tests:
        failed = sum(one.verdict == "failed" for one in tests)
        if len(tests) == 1:
            told.append(f"One test of the protection was made, and {'failed' if failed else 'passed'}.")
        else:
            told.append(f"{len(tests)} tests of the protection were made; {failed or 'none'} of them failed.")
    left = len(report.untried)
    if left:
        told.append(f"{left} {'attack was' if left == 1 else 'attacks were'} not tried.")
    return " ".join(told)


def _claim(report: Report) -> str:
    """What the attacks say of the Plan's claim, and no more than that."""
    claim = report.promise
    if claim is None:
        found = any(one.verdict == "leak" for one in report.findings)
        none = "The Plan claims no ε, so there is no claim to hold the attacks against."
        return none if found else f"{none} That no leak was found does not mean that there is none."
    said = f"The Plan claims {epsilon(claim.epsilon, claim.delta)} for one {claim.unit}."
    if over := _exceeded(report):
        told = figure(over)
        return (
            f"{said} That does not hold: {told.name}, was measured to be {told.value}, and claimed is {told.claimed}."
        )
    held = [one for one in _epsilons(report) if one.claimed is not None]
    if held and all(one.ceiling is not None and one.ceiling <= (one.claimed or 0) for one in held):
        most = max(one.ceiling or 0 for one in held)
        reach = f"an ε above {number(most, 3)} could not have been shown, however much leaks"
        return f"{said} This was not falsified at 95 % by these attacks, and could not be: {reach}."
    # A figure of one step is held against a claim of one step, and says nothing of the whole run by itself.
    whole = [
        one.ceiling for one in held if one.ceiling is not None and math.isclose(one.claimed or 0, claim.epsilon or 0)
    ]
    if whole and max(whole) <= (claim.epsilon or 0):
        reach = f"of the whole run, no ε above {number(max(whole), 3)} could have been shown"
        return (
            f"{said} This was not falsified at 95 % by these attacks; but {reach}, only single steps were held to more."
        )
    if held:
        return f"{said} This was not falsified at 95 % by these attacks."
    return f"{said} None of these attacks measured an ε to hold it against, so none could have falsified it."


def _exceeded(report: Report) -> Figure | None:
    """The largest measured lower bound on ε that is above what is claimed of it."""
    over = [one for one in _epsilons(report) if one.claimed is not None and (one.value or 0) > one.claimed]
    return max(over, key=lambda one: one.value or 0, default=None)


def _rounds(report: Report) -> str:
    if not report.rounds:
        return "none"
    counts = [one.clients for one in report.rounds]
    low, high = min(counts), max(counts)
    clients = f"{low}" if low == high else f"{low} to {high}"
    missing = sum(one.dropped for one in report.rounds)
    dropouts = f"{missing or 'no'} {'dropout' if missing == 1 else 'dropouts'}"
    return f"{len(counts)}, of {clients} {'client' if high == 1 else 'clients'} each; {dropouts}"


def _minutes(report: Report) -> str:
    seconds = sum(one.seconds for one in report.findings)
    return f"{number(seconds)} seconds" if seconds < 90 else f"{round(seconds / 60)} minutes"
