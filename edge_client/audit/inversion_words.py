"""What inversion did and found, in words, figures and plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from farfield.protocols.audit.finding import Axis, Figure, Finding, Plot, Series, Table

from .attack import Attack
from .inversion_scores import interval
from .subject import Subject

ENOUGH = 4
"""Updates from which on an interval of their mean says something."""


def finding(
    attack: Attack, subject: Subject, single: Mapping[str, Any], planned: Sequence[Mapping[str, Any]]
) -> Finding:
    """The finding that follows from the trials of bare gradients and of updates as the Plan lets them out."""
    lift = [row["precision"] - row["chance"] for row in planned]
    luck = _luck(planned)
    spread = interval(lift)
    beyond = spread is None or spread.low is None or len(lift) < ENOUGH or spread.low > 0
    leak = bool(planned) and luck <= 0.05 and float(np.mean(lift)) > 0 and beyond
    short = _short(subject, single["small"])
    return Finding(
        attack=attack.name,
        title=attack.title,
        attacker=str(attack.attacker),
        verdict="leak" if leak or short else "no leak found",
        tried=_tried(subject, single, planned),
        found=_found(single, planned, luck, leak=leak, short=short),
        limits=_LIMITS,
        figures=_figures(single, planned, luck),
        plots=tuple(plot for plot in (_by_distinct(single), _by("cohorts", single), _by("ranks", single)) if plot),
        tables=_tables(single),
        data={"single": dict(single), "planned": [dict(row) for row in planned]},
    )


def _short(subject: Subject, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a client with little text would be read, beyond chance at 95 %, by who sees updates one by one."""
    spread = interval([row["precision"] - row["chance"] for row in rows])
    alone = subject.plan.protection.kind != "secagg"
    return alone and spread is not None and spread.low is not None and len(rows) >= ENOUGH and spread.low > 0


def _luck(planned: Sequence[Mapping[str, Any]]) -> float:
    """How likely a precision like this, or a better one, is if the updates hold nothing (a randomisation test)."""
    if not planned:
        return 1.0
    real = float(np.mean([row["precision"] for row in planned]))
    nulls = np.mean([row["nulls"] for row in planned], axis=0)
    return (1 + int((nulls >= real).sum())) / (1 + len(nulls))


def _tried(subject: Subject, single: Mapping[str, Any], planned: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    summed = max((row["members"] for row in planned), default=1)
    if subject.federation is None:
        which = "your own whole update, as it would be sent; where the Plan adds updates up, nobody sees it by itself"
    elif summed > 1:
        which = f"the sums of up to {summed} clients, which are all that the coordinator sees under this Plan"
    else:
        which = "single clients' updates, which the coordinator sees under this Plan"
    handles = {
        "read": "the rows of matrices in the first block, which lie in the span of the embeddings of the tokens read",
        "predicted": "the columns of matrices that add to the stream, which lie near the head's rows for the tokens "
        "that were to be predicted",
    }
    how = [handles[clue] for clue in single["clues"]]
    return (
        "Say which distinct tokens (pieces of words) were in the text that an update was trained on, by "
        + ("; and by ".join(how) if how else "how common they are: what this method trains has no side that tells")
        + ". How much each clue counts is learnt from public text that the attacker trains on itself.",
        "First on what there is to protect: the bare gradient of one step, without the Plan's protection and without "
        "its optimiser. Then on what is let out: " + which + ".",
        "Short texts were also looked for word by word, by the span check of the second block, or by comparing "
        "gradients where there is nothing to check.",
        "Chance is what naming the commonest tokens of public text gets right. An update only counts as telling where "
        "it also does better than the same values in random places with random signs.",
    )


def _found(
    single: Mapping[str, Any], planned: Sequence[Mapping[str, Any]], luck: float, *, leak: bool, short: bool
) -> tuple[str, ...]:
    said = []
    for start, when in (("first", "in the first round"), ("later", "in a later one")):
        for count, rows in single[start]["distinct"].items():
            if count == "64":
                got, chance = _mean(rows, "precision"), _mean(rows, "chance")
                said.append(
                    f"From one bare gradient {when}, {got:.0%} of 64 distinct tokens are named (chance {chance:.0%})."
                )
    if rows := single["small"]:
        said.append(
            f"A client that had such a text and nothing else, and trained on it as the Plan says, would give away "
            f"{_mean(rows, 'precision'):.0%} of them (chance {_mean(rows, 'chance'):.0%})"
            + (", and this Plan shows its coordinator each client's update by itself." if short else ".")
        )
    if rows := single["order"]:
        said.append(
            f"Of texts of {rows[0]['length']} tokens, {_mean(rows, 'rouge_1'):.0%} of the tokens and "
            f"{_mean(rows, 'rouge_l'):.0%} of their order are found (chance {_mean(rows, 'chance'):.0%} of the tokens)."
        )
    if not planned:
        return (*said, "No round let an update out that could be attacked.")
    if not any(row["clues"] for row in planned):
        return (
            *said,
            "In the updates as the Plan lets them out nothing that this attack looks at tells tokens, so it was blind "
            "to them: it names the commonest, which is chance. That is not evidence against other attacks.",
        )
    got, chance = _mean(planned, "precision"), _mean(planned, "chance")
    nothing = float(np.mean([row["nulls"] for row in planned]))
    said.append(
        f"From the updates as the Plan lets them out, {got:.1%} of {_mean(planned, 'distinct'):,.0f} distinct tokens "
        f"are named. Chance is {chance:.1%}, and updates that hold nothing give {nothing:.1%}; "
        f"p = {luck:.2g} in a randomisation test."
    )
    said.append(
        "So updates tell more of what was in the text than anybody knows without them."
        if leak
        else "For clients with as much text as these, that is not beyond chance at 95 %. Naming the commonest tokens "
        f"is right so often already that the most that could have shown is {1 - chance:.0%} more."
    )
    return tuple(said)


_LIMITS = (
    "The report holds counts and shares only; neither texts nor tokens of clients are in it.",
    "Which tokens are in a text is not yet the text. But names and rare words are tokens too.",
    "Another attacker may have public text that is more like the clients', or know a part of theirs.",
)


def _figures(single: Mapping[str, Any], planned: Sequence[Mapping[str, Any]], luck: float) -> tuple[Figure, ...]:
    figures = []
    if planned:
        values = [row["precision"] for row in planned]
        figures.append(
            Figure(
                name="tokens named rightly from updates as the Plan lets them out",
                value=_mean(planned, "precision"),
                unit="%",
                interval=interval(values),
                chance=_mean(planned, "chance"),
                ceiling=1.0,
                note=f"as many are named as there are; p = {luck:.2g} against updates that hold nothing",
                headline=True,
            )
        )
        lift = [row["precision"] - row["chance"] for row in planned]
        figures.append(
            Figure(
                name="the same, more than chance",
                value=float(np.mean(lift)),
                unit="%",
                interval=interval(lift),
                chance=0.0,
            )
        )
        figures.append(
            Figure(
                name="found without naming more wrong ones than right", value=_mean(planned, "recall_at_half"), unit="%"
            )
        )
    bare = "without the Plan's protection and optimiser"
    for name, rows, note in (
        ("64 distinct tokens from one bare gradient, the first round", single["first"]["distinct"].get("64"), bare),
        ("64 distinct tokens from one bare gradient, a later round", single["later"]["distinct"].get("64"), bare),
        ("64 distinct tokens, all that a client has, by the Plan's own training", single["small"], ""),
    ):
        if rows:
            values = [row["precision"] for row in rows]
            figures.append(
                Figure(
                    name=name,
                    value=float(np.mean(values)),
                    unit="%",
                    interval=interval(values),
                    chance=_mean(rows, "chance"),
                    ceiling=1.0,
                    note=note,
                    headline=rows is single["small"],
                )
            )
    for name, title in (("rouge_1", "ROUGE-1"), ("rouge_2", "ROUGE-2"), ("rouge_l", "ROUGE-L")):
        if rows := single["order"]:
            values = [row[name] for row in rows]
            chance = _mean(rows, "chance") if name == "rouge_1" else None
            note = f"of tokens; short texts, one bare gradient, by {rows[0]['means']}"
            figures.append(
                Figure(
                    name=title,
                    value=float(np.mean(values)),
                    unit="%",
                    interval=interval(values),
                    chance=chance,
                    ceiling=1.0,
                    note=note,
                )
            )
    return tuple(figures)


def _by_distinct(single: Mapping[str, Any]) -> Plot | None:
    curves = [
        _curve(label, single[start]["distinct"], "precision")
        for start, label in (("first", "first round"), ("later", "later round"))
        if single[start]["distinct"]
    ]
    if not curves:
        return None
    chance = next(single[start]["distinct"] for start in ("later", "first") if single[start]["distinct"])
    return Plot(
        title="Tokens from one bare gradient",
        x=Axis(label="distinct tokens in the text", log=True),
        y=Axis(label="share named rightly", low=0, high=1),
        series=(*curves, _curve("chance", chance, "chance")),
        caption="How many of a text's tokens one unprotected step gives away, by how many there are. At the height of "
        "the chance line the update says nothing that is not known from public text.",
    )


def _by(what: str, single: Mapping[str, Any]) -> Plot | None:
    names = {
        "cohorts": ("Tokens from a sum of bare gradients", "clients in the sum", "each client has 64 distinct tokens"),
        "ranks": ("Tokens by the rank of the method", "rank", "the text has 64 distinct tokens"),
    }
    if not single.get(what):
        return None
    title, label, note = names[what]
    return Plot(
        title=title,
        x=Axis(label=label, log=True),
        y=Axis(label="share named rightly", low=0, high=1),
        series=(_curve("attack", single[what], "precision"), _curve("chance", single[what], "chance")),
        caption=f"One unprotected step in a later round; {note}.",
    )


def _curve(label: str, rows: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> Series:
    points = [(float(name), [float(row[key]) for row in found]) for name, found in rows.items()]
    bands = [interval(values) for _, values in points]
    inside: Callable[[float | None], float] = lambda value: min(1.0, max(0.0, value or 0.0))  # noqa: E731
    full = all(bands) and key != "chance"
    return Series(
        label=label,
        x=tuple(x for x, _ in points),
        y=tuple(float(np.mean(values)) for _, values in points),
        low=tuple(inside(band.low) for band in bands if band) if full else (),
        high=tuple(inside(band.high) for band in bands if band) if full else (),
    )


def _tables(single: Mapping[str, Any]) -> tuple[Table, ...]:
    rows = []
    for what, label in (("first", "first round"), ("later", "later round"), ("cohorts", "sum"), ("ranks", "rank")):
        found = single[what]["distinct"] if what in ("first", "later") else single.get(what, {})
        for count, each in found.items():
            setting = f"{label}, {count} distinct tokens" if what in ("first", "later") else f"{label} {count}"
            rows.append(
                (
                    setting,
                    f"{_mean(each, 'distinct'):.0f}",
                    f"{_mean(each, 'span'):.0f}",
                    f"{_mean(each, 'precision'):.1%}",
                    f"{_mean(each, 'chance'):.1%}",
                    f"{_mean(each, 'recall_at_half'):.1%}",
                )
            )
    if not rows:
        return ()
    columns = ("bare gradient", "distinct tokens", "span", "named rightly", "chance", "found at even odds")
    caption = "Where the span is as large as the number of distinct tokens, the check is exact; beyond it is a ranking."
    return (Table(title="Single steps without protection", columns=columns, rows=tuple(rows), caption=caption),)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))
