"""The claim of a report and what it rests on, in the order in which NIST SP 800-226 looks at a guarantee.

NIST SP 800-226, "Guidelines for evaluating differential privacy guarantees" (2025), asks from the top down: how strong
is the guarantee and for whom, which algorithm gives it and how useful is its result, and what has to hold underneath.
Every line here follows from the report alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeAlias

from .report import Report
from .wording import epsilon, number, sentence

Answer: TypeAlias = tuple[str, str]
"""A question in a word or two, and the answer in sentences."""


@dataclass(frozen=True, slots=True)
class Chapter:
    """A part of the evaluation."""

    title: str
    answers: tuple[Answer, ...]


def chapters(report: Report) -> tuple[Chapter, ...]:
    """All parts, from the claim to what it stands on."""
    plan: dict[str, Any] = json.loads(report.plan)
    return (
        Chapter("The guarantee", (_parameters(report), _unit(report), _neighbours(report), _budget(report))),
        Chapter("The algorithm", (_mechanism(report), _sampling(report), _randomness(report), _tests(report))),
        Chapter("Usefulness", (_utility(plan), _bias(report))),
        Chapter("Trust and threats", (_trust(report, plan), _threats(report), _side_channels(report))),
        Chapter("Data and access", (_exposure(report, plan), _access(plan), _uncovered(report))),
    )


def _parameters(report: Report) -> Answer:
    claim = report.promise
    if claim is None:
        return "Parameters", (
            "None. The Plan adds no noise, so no ε bounds what the run gives away. The figures above say what "
            "particular attacks got, and no more."
        )
    beside = "" if claim.epsilon_rdp is None else f" By Rényi accounting it is {number(claim.epsilon_rdp)}."
    return "Parameters", (
        f"Claimed is {epsilon(claim.epsilon, claim.delta)}. It was computed by {claim.accountant}.{beside} "
        f"Counted are {claim.counted}."
    )


def _unit(report: Report) -> Answer:
    if report.promise is None:
        return "Unit", "None, as there is no guarantee."
    if report.promise.unit == "client":
        return "Unit", "All that one client holds. If several people's data lie at one client, they are covered as one."
    return "Unit", (
        "One example of one client. Somebody whose data are in several examples is covered less: ε grows with how many "
        "they are."
    )


def _neighbours(report: Report) -> Answer:
    if report.promise is None:
        return "Neighbours", "Not defined, as there is no guarantee."
    return "Neighbours", (
        f"{sentence(report.promise.neighbours)} The ε for exchanging one for another is about twice as large."
    )


def _budget(report: Report) -> Answer:
    spent = report.ledger
    if spent is None:
        return "Budget", "The report has no ledger, so it says nothing of other runs on the same data."
    return "Budget", (
        f"The ledger has {spent.entries:,} {'entry' if spent.entries == 1 else 'entries'}. By it, one {spent.unit} of "
        f"the population “{spent.population}” has spent {epsilon(spent.epsilon, spent.delta)}, this run included."
    )


def _mechanism(report: Report) -> Answer:
    claim = report.promise
    if claim is None:
        return "Noise", "None is added."
    return "Noise", (
        f"{sentence(claim.noise)} Contributions are clipped to the norm {number(claim.clipping_norm)}, and the noise "
        f"multiplier is {number(claim.noise_multiplier)}."
    )


def _sampling(report: Report) -> Answer:
    claim = report.promise
    if claim is None:
        return "Sampling", "Nothing is claimed of it."
    sure = "This is enforced" if claim.enforced else "This is not enforced"
    return "Sampling", f"{sentence(claim.sampling)} {sure}: {claim.enforcement}."


def _randomness(report: Report) -> Answer:
    if report.promise is None:
        return "Randomness, floating point", "They bear on no guarantee here."
    return "Randomness, floating point", (
        f"Farfield {report.farfield} draws noise as whole steps of a grid, which leaves nothing in the last bits of "
        "floating-point numbers, from AES-256 with a key of the operating system's, never from a seed. It can be "
        "checked in the sources whose digest is below."
    )


def _tests(report: Report) -> Answer:
    tests = [one for one in report.findings if one.verdict in ("passed", "failed")]
    if not tests:
        return "Tests of it", "This audit made no test of the protection itself."
    told = "; ".join(f"{one.title}: {one.verdict}" for one in tests)
    return "Tests of it", f"{told}."


def _utility(plan: dict[str, Any]) -> Answer:
    privacy, training = plan["privacy"], plan["training"]
    measured = privacy["kind"] == "none" or privacy["exact_evaluation"]
    held_out = "are measured in the run" if measured else "are not measured, as that would give away what noise hides"
    return "Utility", (
        f"An audit does not measure how good the adapter is. It was trained for {training['rounds']} rounds. Losses on "
        f"held-out records {held_out}."
    )


def _bias(report: Report) -> Answer:
    known = "It was not examined whether the adapter serves some people worse than others."
    if report.promise is None:
        return "Bias", known
    return "Bias", f"{known} Clipping and noise take most from those who are few, so it should be, on data with groups."


def _trust(report: Report, plan: dict[str, Any]) -> Answer:
    readers = {
        "secagg": "the coordinator is trusted with sums of updates, and with no single one",
        "sealed": "the coordinator is trusted with each client's update",
        "none": "whoever carries messages is trusted with each client's update, as in a simulation",
    }[plan["protection"]["kind"]]
    if report.promise is None:
        return "Trust model", sentence(readers)
    return "Trust model", f"{sentence(report.promise.trust)} {sentence(readers)}"


def _threats(report: Report) -> Answer:
    who = list(dict.fromkeys(one.attacker for one in report.findings))
    if not who:
        return "Threat model", "No attack was made, so no attacker was tried."
    return "Threat model", "Tried was what these could do. " + " ".join(sentence(one) for one in who)


def _side_channels(report: Report) -> Answer:
    missing = sum(one.dropped for one in report.rounds)
    dropped = (
        f"{missing:,} {'answer' if missing == 1 else 'answers'} of a client did not come"
        if missing
        else ("every client that was asked answered")
    )
    return "Side channels", (
        "Sizes and times of messages, and who answers, are covered by no guarantee and by no attack unless one above "
        f"says so. In the audited run {dropped}."
    )


def _exposure(report: Report, plan: dict[str, Any]) -> Answer:
    sent = "an emulator of the backbone" if plan["delivery"]["kind"] == "emulator" else "the adapter"
    scope = "one client's update, before it is sent" if report.scope == "client" else "a whole federation"
    return "Data collection", (
        f"Records stay with their clients. A client is sent {sent}, and answers with an update. "
        f"Attacked was {scope}, on {report.data}."
    )


def _access(plan: dict[str, Any]) -> Answer:
    how = plan["protection"]
    if how["kind"] == "secagg":
        return "Access, security", (
            f"Updates are masked and added up unseen, against a share of {how['corrupt']:g} of the clients that work "
            f"together with a coordinator that is {how['adversary']}, and with up to {how['dropouts']:g} of them lost."
        )
    if how["kind"] == "sealed":
        return "Access, security", "Updates are encrypted to the coordinator, which reads them."
    return "Access, security", "The Plan protects no messages; a coordinator's service starts no such run."


def _uncovered(report: Report) -> Answer:
    if report.promise is None:
        return "Not covered", "Everything, as there is no guarantee."
    return "Not covered", f"{sentence('; '.join(report.promise.uncovered))}"
