"""What membership inference did and found, in words."""

from __future__ import annotations

from collections.abc import Mapping

from farfield.protocols.audit.auc import auc
from farfield.protocols.audit.curves import TprAtFpr
from farfield.protocols.audit.intervals import Estimate
from farfield.protocols.plan import Plan

from .candidates import Candidates
from .membership_results import BLIND, RMIA, Result
from .shadows import Shadows


def tried(plan: Plan, asked: Candidates, known: Shadows, *, alone: bool) -> tuple[str, ...]:
    inside = int(asked.members.sum())
    which = (
        "the adapter after one round of this client alone, which whoever sees its update by itself can make"
        if alone
        else "the adapter that is released in the end"
    )
    return (
        f"From {which}, tell {inside} examples that were trained on from {len(asked.examples) - inside} that the same "
        "clients held out. Lots decided what a client held out, and each client has the same share of both sides.",
        f"{_unit(plan)} {_visits(plan, asked)}",
        "Three scores of how much an example looks like a member: how far its loss fell in training (after Yeom et al. "
        "2018), LiRA (Carlini et al. 2022) and RMIA (Zarifzadeh et al. 2024). The last two compare with "
        f"{len(known.steps)} shadow adapters: each is trained by the Plan's settings for {max(known.steps)} steps, in "
        "one place and without protection, on another half of the same examples.",
        "The verdict goes by RMIA alone, as was settled before any score was seen: the 95 % interval of the area under "
        "its curve has to lie above one half, and above the area that the loss before training gives, which knows "
        "nothing of what was learnt.",
    )


def _unit(plan: Plan) -> str:
    if plan.data.packing and plan.model.task == "causal-lm":
        return f"An example is a window of {plan.data.max_length} tokens, since the Plan packs records."
    return "An example is a record, or a piece of one that is longer than data.max_length."


def _visits(plan: Plan, asked: Candidates) -> str:
    if plan.privacy.kind != "example":
        return f"Each member was trained on, {asked.visits:.2g} times on average."
    return (
        f"Batches are drawn truly at random: a member was in {asked.visits:.2g} of them on average, and nobody knows "
        "which members were in none."
    )


def found(results: Mapping[str, Result], control: float | None, *, leak: bool) -> tuple[str, ...]:
    best, blind = results[RMIA], results[BLIND].area
    ranked = f"Of a member and a non-member, RMIA takes the right one for the member in {_share(best.area)} of pairs."
    apart = blind.low > 0.5 or blind.high < 0.5
    return (
        f"{ranked} {_against_guessing(best, leak=leak)}",
        *(() if control is None else (_control(control),)),
        *(_at(rate) for rate in best.rates),
        f"The loss before training does so in {_share(blind)}: "
        + (
            "the two sides differ of themselves, and what the other scores show may in part come from that."
            if apart
            else "there is no sign that the two sides differ of themselves."
        ),
    )


def _against_guessing(best: Result, *, leak: bool) -> str:
    if leak:
        return "Guessing comes to 50 %: the adapter gives away something of what was trained on."
    inside, outside = int(best.curve.true_positives[-1]), int(best.curve.false_positives[-1])
    least = auc([0.0] * inside, [0.0] * outside).high
    return (
        "That is not shown to be better than guessing, which comes to 50 %. From so few examples, anything below about "
        f"{least:.0%} cannot be told from guessing."
    )


def _control(area: float) -> str:
    return (
        f"On the shadow adapters, which were trained in one place and without protection, the same attack gets "
        f"{area:.1%}: as much as it could be expected to find here."
    )


def _at(rate: TprAtFpr) -> str:
    if rate.tpr is None:
        return f"How many members it finds at {rate.fpr:.1%} false positives takes {rate.needed} non-members to say."
    return (
        f"Where at most {rate.fpr:.1%} of the non-members are taken for members, it finds {rate.tpr.value:.1%} of the "
        f"members (95 % interval {rate.tpr.low:.1%} to {rate.tpr.high:.1%}); guessing finds {rate.fpr:.1%}."
    )


def limits(plan: Plan, shadows: int, *, alone: bool) -> tuple[str, ...]:
    said = [
        f"Whoever has more than {shadows} shadow adapters, or knows the data better, may do better.",
        "These are averages over examples. Single ones may stand out more; planted canaries look for that.",
        "The intervals take examples to be independent, and pieces of one text are not quite.",
    ]
    if plan.data.packing and plan.model.task == "causal-lm":
        said.append("A window holds several records or pieces of them, so this says little of one record by itself.")
    if alone:
        said.append("It is one round of one client: in a federation its update is averaged with those of others.")
    if plan.delivery.kind == "emulator":
        said.append("Losses are those of the emulator with its adapter; in the backbone they may tell more or less.")
    return tuple(said)


def _share(area: Estimate) -> str:
    return f"{area.value:.1%} (95 % interval {area.low:.1%} to {area.high:.1%})"
