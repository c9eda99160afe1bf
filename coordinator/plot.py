"""The picture of a run: losses over rounds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .results import Result


def plot_losses(result: Result, path: Path) -> None:
    """Write a PNG: training and held-out loss per round, and the centralised run's final loss where it was measured."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.0, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for label, attribute, colour, marker in (
        ("clients' training text", "train_loss", "#9aa5b1", "."),
        ("held-out text", "eval_loss", "#0b6e99", "o"),
    ):
        points = [(r.round, getattr(r, attribute)) for r in result.rounds if getattr(r, attribute) is not None]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=label,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.8,
        )
    if result.centralised is not None and result.centralised.eval_loss is not None:
        axes.axhline(
            result.centralised.eval_loss,
            color="#c8553d",
            linestyle="--",
            linewidth=1.4,
            label="centralised, as many steps",
        )
    axes.set_xlabel("round")
    axes.set_ylabel("loss (nats per target)")
    axes.set_title(f"{result.clients} clients, run {result.run}", loc="left", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ec")
    axes.legend(frameon=False)
    figure.savefig(path, format="png")
