"""What a Plan promises, said so that it can be filed: unit, neighbours, ε and δ, and all that they rest on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field

from farfield.protocols.privacy.mechanism import ClientMechanism, ExampleMechanism, mechanism, promised

from .finding import Document, Finite

if TYPE_CHECKING:
    from farfield.protocols.plan import Plan

_NOTHING_ASSUMED: Final = "nothing is assumed, so there is nothing to enforce"


class Promise(Document):
    """Differential privacy as the Plan's accounting has it. The texts are clauses, without a full stop.

    Attributes:
        unit: whose contribution could be missing without being missed.
        neighbours: the relation between datasets that ε is about.
        epsilon: what is claimed, of all rounds together; None where the accountants find no finite one.
        epsilon_rdp: the same by Rényi differential privacy, which other reports use; never smaller.
        accountant: what computed `epsilon`, with its version.
        counted: what was composed.
        noise_multiplier, clipping_norm: σ and C; noise has a standard deviation of σ·C.
        noise: who adds it, and to what.
        sampling: what is assumed of it.
        enforced: whether that holds without the coordinator being believed; `enforcement` says by whom.
        trust: who has to be trusted, with what.
        uncovered: what a run lets out beside it.
    """

    unit: Literal["example", "client"]
    neighbours: str
    epsilon: Finite | None
    epsilon_rdp: Finite | None
    delta: Annotated[float, Field(gt=0, lt=1)]
    accountant: str
    counted: str
    noise_multiplier: Annotated[Finite, Field(gt=0)]
    clipping_norm: Annotated[Finite, Field(gt=0)]
    noise: str
    sampling: str
    enforced: bool
    enforcement: str
    trust: str
    uncovered: tuple[str, ...]


def promise(plan: Plan) -> Promise | None:
    """What `plan` promises; None where it promises nothing.

    Raises:
        PrivacyError: its target cannot be met.
    """
    made, claim = mechanism(plan), promised(plan)
    if made is None or claim is None:
        return None
    sampling, enforcement = _sampling(plan, made)
    return Promise(
        unit=made.unit,
        neighbours=f"two datasets that differ in one {made.unit} whose contribution is replaced by zero; how many "
        "there are is public",
        epsilon=_finite(claim.epsilon),
        epsilon_rdp=_finite(claim.epsilon_rdp),
        delta=claim.delta,
        accountant=claim.accountant,
        counted=_counted(plan, made),
        noise_multiplier=made.noise_multiplier,
        clipping_norm=made.clipping_norm,
        noise=_noise(made),
        sampling=sampling,
        enforced=True,  # what would have to be believed is not counted; see docs/privacy.md
        enforcement=enforcement,
        trust=_trust(plan, made),
        uncovered=_uncovered(plan, made),
    )


def _counted(plan: Plan, made: ExampleMechanism | ClientMechanism) -> str:
    rounds = f"{plan.participations} of {plan.training.rounds} rounds, as a client takes part in no more"
    if plan.participations == plan.training.rounds:
        rounds = f"all {plan.training.rounds} rounds, as if a client took part in each"
    return f"{made.steps} steps in each of {rounds}" if isinstance(made, ExampleMechanism) else rounds


def _noise(made: ExampleMechanism | ClientMechanism) -> str:
    if isinstance(made, ExampleMechanism):
        return "each client adds it to the sum of clipped gradients in each of its steps (DP-SGD)"
    if made.noise == "central":
        return "the coordinator adds it to the sum of each round"
    return "the clients add it in shares, before their updates are masked and added up unseen"


def _sampling(plan: Plan, made: ExampleMechanism | ClientMechanism) -> tuple[str, str]:
    """What is assumed, and who sees to it."""
    assumed, by = [], []
    if isinstance(made, ExampleMechanism) and made.sampling_rate < 1:
        assumed.append(
            f"each example is in a step's batch with probability {made.sampling_rate:g}, independently of all others"
        )
        by.append("each client's own program draws batches from the operating system's randomness")
    if plan.participations < plan.training.rounds:
        assumed.append(f"a client takes part in at most {plan.participations} of {plan.training.rounds} rounds")
        by.append("each client refuses the rounds that are not its turn")
    if not assumed:
        return "none is counted: how cohorts are drawn lowers no ε", _NOTHING_ASSUMED
    return "; ".join(assumed), "; ".join(by)


def _trust(plan: Plan, made: ExampleMechanism | ClientMechanism) -> str:
    if isinstance(made, ExampleMechanism):
        return "each owner of data trusts its own machine to sample, clip and add noise, and nobody else"
    if made.noise == "central":
        return "all trust the coordinator to add the noise, and with each sum as it is without noise"
    return (
        f"each client trusts that no more than a share of {plan.protection.corrupt:g} of the others works together "
        "with the coordinator or leaves its noise out; the coordinator is not trusted"
    )


def _uncovered(plan: Plan, made: ExampleMechanism | ClientMechanism) -> tuple[str, ...]:
    counts = "how many clients a round has" + (", and how many examples they hold" if made.unit == "example" else "")
    held_out = ("held-out losses, which this Plan measures without noise",) if plan.measures else ()
    return (*held_out, counts, "sizes and times of messages, and who refuses or fails", "other runs on the same data")


def _finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None
