"""Reports as an audit could have made them, with every kind of figure, plot and table."""

from __future__ import annotations

import hashlib
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from farfield.coordinator import plans
from farfield.protocols.audit.finding import Axis, Figure, Finding, Interval, Mark, Plot, Series, Table, Untried
from farfield.protocols.audit.promise import promise
from farfield.protocols.audit.provenance import code_digest, release, versions
from farfield.protocols.audit.report import Report, RoundSummary
from farfield.protocols.audit.spending import Spending

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()


def report(example: str = "private.toml", **changes: Any) -> Report:
    """A report on the Plan of an example, with a rich set of findings unless `changes` has others."""
    plan = plans.load(EXAMPLES / example)
    promised = promise(plan)
    spent = promised and Spending(
        population="default",
        unit=promised.unit,
        epsilon=promised.epsilon,
        delta=promised.delta,
        head=hashlib.sha256(b"a ledger").hexdigest(),
        entries=plan.training.rounds,
    )
    rounds = [RoundSummary(round=number, clients=8) for number in range(1, plan.training.rounds)]
    lost = RoundSummary(
        round=plan.training.rounds, clients=7, dropped=1, problems=("a client did not answer in 60 seconds",)
    )
    values: dict[str, Any] = {
        "made": datetime(2031, 5, 6, 12, 30, 15, tzinfo=UTC),
        "farfield": release(),
        "code": code_digest(),
        "versions": versions(),
        "scope": "federation",
        "plan": plan.canonical().decode(),
        "plan_digest": plan.digest,
        "backbone": hashlib.sha256(b"a backbone").hexdigest(),
        "seed": 7,
        "clients": 8,
        "data": "the standard library's prose",
        "rounds": (*rounds, lost),
        "promise": promised,
        "ledger": spent,
        "findings": findings(promised.epsilon if promised else None),
        "untried": UNTRIED,
    }
    return Report.model_validate({**values, **changes})


def findings(claimed: float | None) -> tuple[Finding, ...]:
    """One of each kind, where the Plan claims this ε."""
    return self_test(), canaries(claimed), exposure(), membership(), inversion(claimed)


def altered(raw: bytes, **changes: Any) -> bytes:
    """A sealed report with other values in it, canonical again, under the signature of the one before."""
    document = json.loads(raw)
    document["report"] |= changes
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


UNTRIED = (
    Untried(attack="emulator", title="Emulator", reason="the Plan delivers the adapter, so there is no emulator"),
    Untried(attack="backdoor", title="Backdoor by one client", reason="it was not asked for"),
)


def self_test() -> Finding:
    return Finding(
        attack="protocol",
        title="Secure aggregation must stop cheats",
        attacker="a coordinator, or who has taken its place, that does not keep to the protocol",
        verdict="passed",
        tried=("Eight ways to cheat were tried against the configuration of this Plan, with 8 clients.",),
        found=("Each of them made the clients stop before they sent anything that could be read.",),
        tables=(
            Table(
                title="What was tried",
                columns=("Cheat", "Stopped by", "In step"),
                rows=(
                    ("A client named alive and dead", "the signed survivor set", "5"),
                    ("A second key for one client", "the signed roster", "2"),
                    ("Other models for other clients", "masks that do not cancel", "4"),
                ),
                caption="The numbers of the steps are those of docs/security.md.",
            ),
        ),
        seconds=1.4,
    )


def canaries(claimed: float | None) -> Finding:
    return Finding(
        attack="canaries",
        title="One-run canaries",
        attacker="anybody who holds the adapter that is released in the end",
        verdict="no leak found",
        tried=("A thousand records that nobody has were made up, and half of them, by lot, were trained on once.",),
        found=(
            "Guesses which of them were trained on were right in 51 % of cases, which chance explains.",
            "With so many canaries, no more than ε = 5.81 could have been shown at 95 %.",
        ),
        limits=("Records that stand out more than these may be remembered better.",),
        figures=(
            Figure(
                name="ε at least, by one-run canaries",
                value=0.12,
                interval=Interval(low=0.12),
                chance=0.0,
                ceiling=5.81,
                claimed=claimed,
                note="Steinke et al. 2023, 1,000 canaries",
                headline=True,
            ),
            Figure(
                name="True positives at 1 % false positives",
                value=0.018,
                unit="%",
                interval=Interval(low=0.008, high=0.034),
                chance=0.01,
                ceiling=1.0,
            ),
        ),
        plots=(
            Plot(
                title="Scores of canaries that were trained on, and of others",
                x=Axis(label="loss after less loss before, nats"),
                y=Axis(label="share of canaries at most so high", low=0, high=1),
                series=(
                    Series(
                        label="trained on",
                        x=tuple((k - 20) / 10 for k in range(41)),
                        y=tuple(1 / (1 + math.exp(-(k - 19) / 4)) for k in range(41)),
                    ),
                    Series(
                        label="not trained on",
                        x=tuple((k - 20) / 10 for k in range(41)),
                        y=tuple(1 / (1 + math.exp(-(k - 20) / 4)) for k in range(41)),
                    ),
                ),
                caption="If the curves lie on one another, nobody can tell the two kinds apart by their loss.",
            ),
        ),
        data={"scores": [0.25, -0.5, 1e-9], "trained on": [True, False, True]},
        seconds=61.0,
    )


def exposure() -> Finding:
    rounds = tuple(float(number) for number in range(19))
    return Finding(
        attack="exposure",
        title="Exposure of planted secrets",
        attacker="another client: it gets the adapter of every round, and sends what it likes",
        verdict="leak",
        tried=("Secrets of eight digits were put among one client's records, from 1 to 16 times.",),
        found=("The secret that was there 16 times is the likeliest of all 4,096 candidates after round 9.",),
        limits=("It says nothing of secrets that stand in a text in another way.",),
        figures=(
            Figure(
                name="Exposure of a secret that was there 16 times",
                value=11.4,
                unit="bits",
                interval=Interval(low=9.8, high=12.0),
                chance=1.0,
                ceiling=12.0,
                headline=True,
            ),
            Figure(name="Exposure of a secret that was there once", value=None, unit="bits", note="it was left out"),
        ),
        plots=(
            Plot(
                title="Exposure after each round",
                x=Axis(label="round"),
                y=Axis(label="exposure, bits", low=0),
                series=tuple(
                    Series(
                        label=f"{times} times",
                        x=rounds,
                        y=tuple(min(12.0, 1 + number * times / 12) for number in rounds),
                        low=tuple(max(0.0, 0.4 + number * times / 14) for number in rounds) if times == 4 else (),
                        high=tuple(min(12.0, 1.8 + number * times / 10) for number in rounds) if times == 4 else (),
                    )
                    for times in (1, 4, 16)
                ),
                marks=(Mark(label="the most there can be: 12 bits", y=12.0), Mark(label="chance", y=1.0)),
                caption="Each bit more halves the candidates that somebody would have to try.",
            ),
        ),
        seconds=43.5,
    )


def membership() -> Finding:
    false = tuple(k / 500 for k in range(501))
    return Finding(
        attack="membership",
        title="Membership inference",
        attacker="anybody who holds the adapter that is released in the end",
        verdict="leak",
        tried=("For 500 records that were trained on and 500 that were not, it was guessed which they are.",),
        found=("LiRA with four shadow adapters finds 9 % of the records at one false alarm in a hundred.",),
        figures=(
            Figure(
                name="LiRA, true positives at 1 % false positives",
                value=0.09,
                unit="%",
                interval=Interval(low=0.066, high=0.119),
                chance=0.01,
                ceiling=1.0,
                headline=True,
            ),
            Figure(
                name="Area under the curve", value=0.71, interval=Interval(low=0.68, high=0.74), chance=0.5, ceiling=1.0
            ),
        ),
        plots=(
            Plot(
                title="Who was trained on: found and falsely accused",
                x=Axis(label="false positive rate", log=True, low=0.001, high=1),
                y=Axis(label="true positive rate", log=True, low=0.001, high=1),
                series=(
                    Series(
                        label="LiRA",
                        x=false,
                        y=tuple(rate**0.55 for rate in false),
                        low=tuple(0.8 * rate**0.55 for rate in false),
                        high=tuple(min(1.0, 1.2 * rate**0.55) for rate in false),
                        style="steps",
                    ),
                    Series(label="RMIA", x=false, y=tuple(rate**0.7 for rate in false), style="steps"),
                    Series(label="loss threshold", x=false, y=tuple(rate**0.92 for rate in false), style="steps"),
                ),
                diagonal=True,
                caption="The left side counts: few false alarms, and how many are found all the same.",
            ),
        ),
        seconds=180.0,
    )


def inversion(claimed: float | None) -> Finding:
    sizes = (1.0, 2.0, 4.0, 8.0)
    return Finding(
        attack="inversion",
        title="Inversion of updates into text",
        attacker="the coordinator, who keeps to the protocol and is curious: it sees what each round lets out",
        verdict="no leak found",
        tried=("From one round's sum it was ranked which tokens were in the texts that were trained on.",),
        found=("The tokens that came first were no more often in the texts than others.",),
        figures=(
            Figure(
                name="Tokens found, of those in the texts",
                value=0.031,
                unit="%",
                interval=Interval(low=0.02, high=0.046),
                chance=0.029,
                ceiling=1.0,
                headline=True,
            ),
            Figure(
                name="ε at least, by many releases",
                value=0.9,
                interval=Interval(low=0.9, confidence=0.99),
                ceiling=3.1,
                claimed=claimed,
                headline=True,
            ),
        ),
        plots=(
            Plot(
                title="Tokens found against the size of the cohort",
                x=Axis(label="clients in the sum", log=True),
                y=Axis(label="share of the tokens that was found", low=0, high=1),
                series=(
                    Series(
                        label="without the Plan's protection",
                        x=sizes,
                        y=(0.98, 0.91, 0.71, 0.42),
                        low=(0.95, 0.86, 0.63, 0.33),
                        high=(1.0, 0.95, 0.79, 0.52),
                        style="points",
                    ),
                    Series(label="with it", x=sizes, y=(0.04, 0.03, 0.03, 0.03), style="points"),
                ),
                marks=(Mark(label="chance", y=0.029),),
            ),
            Plot(
                title="Error of the gradient that was matched",
                x=Axis(label="step of the search"),
                y=Axis(label="relative error of the matched gradient over all trained tensors, no unit", log=True),
                series=(Series(label="one client", x=(0.0, 250.0, 500.0), y=(1.0, 3e-3, 2e-5)),),
                marks=(Mark(label="what noise alone makes", y=0.5), Mark(label="float32", y=0.4)),
            ),
        ),
        seconds=88.0,
    )
