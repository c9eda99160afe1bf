"""What all that is printed has in common: a bar, plain lines, and numbers as a person reads them."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def bar(console: Console) -> Progress:
    """Work under way, with its rate and the time left; on a terminal only, and gone when it is over."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def plain(console: Console, text: str, style: str = "") -> None:
    """One line of `text` as it is, however wide the terminal; square brackets are no markup."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def titled(*, right: int = 1) -> Table:
    """A table of titles, of `right` columns of numbers, and of what they mean."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    for _ in range(right):
        table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def size(count: float) -> str:
    """A number of bytes as a person reads it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
