"""Pictures: the losses of a run over its rounds, and what an emulator can be for so many bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from farfield.emulator.search import Candidate

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


def plot_tradeoff(candidates: Sequence[Candidate], path: Path) -> None:
    """Write a PNG: over the bytes of each candidate how its gradients agree, and its own loss where it has one.

    Args:
        candidates: the chosen one first. Those that hold all of the middle are drawn hollow.
    """
    from matplotlib.figure import Figure

    measures = [("gradients agree (cosine)", [one.fidelity.agreement for one in candidates])]
    losses = [one.fidelity.loss for one in candidates if one.fidelity.loss is not None]
    if len(losses) == len(candidates):
        measures.append(("loss alone (nats per token)", losses))
    figure = Figure(figsize=(8.4, 3.2 * len(measures) + 0.8), dpi=150, layout="constrained", facecolor="white")
    sizes = [one.size / 1e6 for one in candidates]
    for axes, (title, values) in zip(figure.subplots(len(measures), 1, squeeze=False)[:, 0], measures, strict=True):
        for number, (one, x, y) in enumerate(zip(candidates, sizes, values, strict=True), 1):
            colour = "#c8553d" if number == 1 else "#0b6e99"
            face = "white" if one.discloses else colour
            axes.plot(x, y, "o", markersize=9 if number == 1 else 6, color=colour, markerfacecolor=face)
            # On either side in turn: neighbours in rank are often neighbours here.
            place, side = ((6, 3), "left") if number % 2 else ((-6, 3), "right")
            axes.annotate(str(number), (x, y), place, textcoords="offset points", ha=side, fontsize=8, color=colour)
        axes.set_ylabel(title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e9ec")
        axes.margins(0.08, 0.15)
    axes.set_xlabel("bytes of the stand-in (MB)")
    names = [f"{number}  {one.choice}{' *' * one.discloses}" for number, one in enumerate(candidates, 1)]
    notes = ["1 was chosen", *(["* all of the middle is in it"] if any(one.discloses for one in candidates) else [])]
    figure.legend(
        handles=[axes.plot([], [], " ")[0] for _ in (*names, *notes)],
        labels=[*names, *notes],
        loc="outside right upper",
        handlelength=0,
        handletextpad=0,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path, format="png")
