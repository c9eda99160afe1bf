"""What the commands of a backbone's owner print: how a build goes on, what came of it, and what it gives away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from farfield.protocols.terminal import bar, decimals, plain, size, titled

if TYPE_CHECKING:
    from farfield.emulator.build import Report
    from farfield.emulator.disclosure import Share
    from farfield.emulator.distill import Check
    from farfield.emulator.inspection import Inspection
    from farfield.emulator.leakage import Leakage
    from farfield.emulator.search import Candidate

TRADEOFF = "build/tradeoff.png"

_MEANINGS = (
    "rank: share of the matrices' parameters that their factors have; share: of the middle's bytes; loss: by itself;",
    "wrong: of the stream behind the middle; agree: cosine of the tuned blocks' gradients, here and on the backbone;",
    "whole: share of the middle's blocks that are in it as they are, or in 4 bits.",
)


class BuildLines:
    """Reports the making and the judging of an emulator: a bar for what is counted, and lines for what is known.

    Stages and candidates are lines where no terminal shows a bar, so that a log has them.
    """

    def __init__(self, console: Console, show: Callable[[str, int, int], None], indent: int = 0) -> None:
        """
        Args:
            show: sets the bar: what is done, how much of it, and of how much; it is hidden when that is all.
        """
        self._console, self._show, self._indent = console, show, " " * indent
        self._stage = ""

    def on_stage(self, what: str) -> None:
        self._stage = what
        self._show(f"emulator: {what}", 0, 1)
        if not self._console.is_terminal:
            plain(self._console, f"{self._indent}{what}")

    def on_candidate(self, candidate: Candidate, done: int, count: int) -> None:
        self._show(f"emulator: {candidate.choice}", done, count)
        if not self._console.is_terminal:
            agreement = candidate.fidelity.agreement
            found = f"{candidate.choice}: {size(candidate.size)}, gradients agree by {agreement:.3f}"
            plain(self._console, f"{self._indent}{done}/{count} {found}")

    def on_step(self, done: int, steps: int, loss: float) -> None:
        self._show(f"emulator: {self._stage} (loss {loss:.3f})", done, steps)

    def on_check(self, check: Check) -> None:
        lm = f", loss alone {check.lm:.4f}" if check.lm else ""
        found = f"distilled {check.step} steps: {check.hidden:.1%} of the stream wrong{lm}"
        plain(self._console, f"{self._indent}{found}")


@contextmanager
def reporting(console: Console) -> Iterator[BuildLines]:
    """What a command that makes or judges an emulator reports to, with a bar of its own."""
    with bar(console) as shown:
        part = shown.add_task("starting", total=None)

        def show(description: str, done: int, total: int) -> None:
            shown.update(part, description=description, completed=done, total=total)

        yield BuildLines(console, show)


def print_report(console: Console, report: Report, out: Path) -> None:
    """The end of `emulator build`: what a search compared, what was built, and how near it is to the backbone."""
    if report.candidates:
        console.print("\n[bold]Compared[/] on public text, before distillation", highlight=False)
        console.print(_candidates(report.candidates, report.middle_bytes), highlight=False)
        for meaning in _MEANINGS:
            plain(console, meaning)
        if report.candidates[0].discloses:
            plain(console, "* Nothing else fits the budget, so all of the middle is in it.", "yellow")
        elif any(one.discloses for one in report.candidates):
            plain(console, "* holds all of the middle, and keeps nothing back: not chosen while anything else fits.")
    split = report.layout.split
    table = titled(right=2)
    table.add_row("Stand-in", size(report.emulated_bytes), _share(report.emulated_bytes, report.middle_bytes),
                  f"of the middle's {size(report.middle_bytes)}: {escape(str(report.choice))}")  # fmt: skip
    table.add_row("Emulator", size(report.emulator_bytes), _share(report.emulator_bytes, report.backbone_bytes),
                  f"of the backbone's {size(report.backbone_bytes)}; blocks {split.first}-{len(report.layout.middle)}-"
                  f"{split.last} for {split.first}-{len(split.middle)}-{split.last}")  # fmt: skip
    if report.backbone_loss is not None:
        table.add_row("Backbone's loss", decimals(report.backbone_loss), "", "on public text that was held out")
    distilled = report.checks[-1].step if report.checks else 0
    for title, near, said in (
        ("Before distilling", report.before, ""),
        ("As it is shipped", report.fidelity, f"after {distilled} steps of distillation"),
    ):
        if not distilled and title == "Before distilling":
            continue
        table.add_row(title, decimals(near.loss), "", said)
        table.add_row("", f"{near.hidden:.1%}", "", "of the stream behind the middle is wrong")
        table.add_row("", f"{near.agreement:.3f}", "", "cosine of the tuned blocks' gradients, emulator and backbone")
    console.print()
    console.print(table, highlight=False)
    plain(console, f"\n{_in_words(report)}")
    if report.choice.disclosed(len(split.middle)) >= 1:
        plain(console, "It holds every block of the middle, so there is little that it keeps back.", "yellow")
    if report.candidates:
        plain(console, f"The trade-off is drawn in {out / TRADEOFF}")
    plain(console, f"What it gives away: coordinator emulator leakage {out} PLAN.toml")


def print_inspection(console: Console, found: Inspection) -> None:
    """`emulator inspect`."""
    split = found.layout.split
    console.print(f"[bold]digest[/]  {found.digest}", highlight=False, soft_wrap=True)
    table = titled()
    table.add_row("kind", "", escape(f"{found.architecture}, {found.dtype}, {found.parameters:,} parameters"))
    ends = f"the first {split.first} and the last {split.last} as they are, to be tuned"
    table.add_row("blocks", str(len(found.layout.origins)), f"for the backbone's {split.depth}: {ends}")
    made = f"made from {', '.join(map(str, found.layout.middle))} of the blocks {split.middle[0]} to {split.middle[-1]}"
    table.add_row("stand-in", str(len(found.layout.middle)), f"{made}, counted from 0")
    if found.ranks:
        low, high = found.ranks
        table.add_row(
            "", "", f"its matrices are two factors each, of rank {low}" + (f" to {high}" if high > low else "")
        )
    if found.layout.quantization == "nf4":
        table.add_row("", "", "its matrices are in NF4: 4.25 bits a value")
    table.add_row("distilled", str(found.distilled), "optimiser steps")
    if found.round:
        table.add_row("", "", f"the last of them with the adapter of a run's round {found.round}")
    table.add_row("bundle", size(found.bundle_bytes), "all files: what a client downloads")
    table.add_row("weights", size(found.weight_bytes), "")
    for title, count in (
        ("  tuned blocks", found.outer_bytes),
        ("  stand-in", found.stand_in_bytes),
        ("  all else", found.other_bytes),
    ):
        said = "embeddings, final norm and head" if title.strip() == "all else" else ""
        table.add_row(title, size(count), said)
    console.print(table, highlight=False)
    console.print("\n[bold]To train on it a client needs[/]", highlight=False)
    needs = titled()
    needs.add_row("weights", size(found.weight_bytes), "in memory, whatever is trained")
    needs.add_row("training state", f"~ {size(found.full_state_bytes)}", found.STATE)
    console.print(needs, highlight=False)
    plain(console, found.NOT_COUNTED)


def print_leakage(console: Console, found: Leakage) -> None:
    """`emulator leakage`: what the owner gives away, and what that comes to in words."""
    given = found.disclosed
    table = titled(right=2)
    table.add_row("[bold]Parameters[/]", "[bold]as they are[/]", "[bold]in 4 bits[/]", "")
    for title, share in (
        ("whole backbone", given.whole),
        ("  embeddings, head", given.around),
        ("  tuned blocks", given.outer),
        ("  middle", given.middle),
    ):
        table.add_row(title, _share(share.unchanged, share.parameters), _share(share.rounded, share.parameters),
                      _held(share))  # fmt: skip
    console.print(table, highlight=False)
    made = f"The stand-in was made from {given.blocks:.0%} of the middle's blocks"
    plain(console, f"{made}, whose matrices differ from what it has of them by {given.error:.1%} of their norm.")
    plain(console, f"{found.hidden:.1%} of the stream behind the middle is wrong.")
    if (losses := found.losses) is not None:
        shown = titled(right=2)
        shown.add_row("[bold]Loss[/]", "", "[bold]quality[/]", "")
        for title, loss, said in (
            ("Backbone", losses.backbone, "zero-shot"),
            ("Emulator", losses.emulator, "zero-shot"),
            ("Emulator, tuned", losses.emulator_tuned, f"alone, {found.budget.steps} steps"),
            ("Backbone, plugged in", losses.plug_in, "with what was tuned on the emulator"),
            ("Backbone, tuned itself", losses.backbone_tuned, "as many steps"),
            ("Attacker", losses.attacked, f"trains all of the emulator, {found.budget}"),
            ("Floor", losses.floor, "the same attack on a stand-in of random weights"),
        ):
            quality = losses.quality(loss)
            shown.add_row(title, decimals(loss), "" if quality is None else f"{quality:.0%}", said)
        console.print()
        console.print(shown, highlight=False)
        plain(console, "Quality is 0 % at the floor, and 100 % at the better of the backbone and the backbone tuned.")
    console.print()
    for sentence in found.verdict:
        plain(console, sentence)


def _candidates(candidates: Sequence[Candidate], middle: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("blocks", "selected by", "rank", "bits"):
        table.add_column(title, no_wrap=True)
    for title in ("bytes", "share", "loss", "wrong", "agree", "whole"):
        table.add_column(title, justify="right", no_wrap=True)
    for place, one in enumerate(candidates):
        choice, near = one.choice, one.fidelity
        table.add_row(
            str(choice.blocks),
            choice.select,
            "" if choice.low_rank is None else f"{choice.low_rank:g}",
            "NF4" if choice.quantization == "nf4" else "",
            size(one.size),
            _share(one.size, middle),
            decimals(near.loss),
            f"{near.hidden:.1%}",
            f"{near.agreement:.3f}",
            f"{one.disclosed:.0%}{'*' if one.discloses else ''}",
            style="" if place else "bold",
        )
    return table


def _in_words(report: Report) -> str:
    left = report.emulated_bytes / report.middle_bytes
    small = f"The stand-in has {left:.0%} of the middle's bytes"
    if report.backbone_loss is None or report.fidelity.loss is None:
        return f"{small}, and gets {report.fidelity.hidden:.1%} of the stream behind it wrong."
    worse = report.fidelity.loss - report.backbone_loss
    how = f"{worse:.3f} nats worse than" if worse > 0 else f"no worse ({-worse:.3f} nats better) than"
    return f"{small}; by itself the emulator is {how} the backbone on public text."


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _held(share: Share) -> str:
    return f"of {share.parameters:,} ({size(share.bytes)})"
