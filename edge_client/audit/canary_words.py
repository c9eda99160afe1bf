"""What was done with canaries and what came of it, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from farfield.protocols.audit.auc import auc
from farfield.protocols.plan import Plan

from .attack import Attacker
from .canary_bounds import Measured, Ranking
from .canary_clients import ClientCanaries
from .canary_records import Canaries
from .subject import Subject


def attacker(subject: Subject, clients: ClientCanaries | None) -> str:
    if subject.federation is None:
        return Attacker.COORDINATOR
    return Attacker.HOLDER if clients is None else f"{Attacker.HOLDER}; and, of clients, {Attacker.COORDINATOR}"


def tried(subject: Subject, drawn: Canaries, seen: Sequence[float], clients: ClientCanaries | None) -> tuple[str, ...]:
    put_in = [times for one, times in zip(drawn.canaries, seen, strict=True) if one.included]
    missed = sum(not times for times in put_in)
    never = f"{missed} of them never" if missed else "each at least once"
    times = (
        f"was in {sum(put_in) / len(put_in):.2g} batches on average, which are drawn truly at random"
        if subject.plan.privacy.kind == "example"
        else f"was trained on {sum(put_in) / len(put_in):.2g} times on average, {never}"
    )
    said = [
        f"{len(drawn.canaries)} canary records were made for this audit, half of them rows of tokens that the clients' "
        "data hardly ever use, half of them words of the clients' own data with a detail drawn by lot. A coin put "
        f"{len(put_in)} of them into the clients' data, once each, and left the others out. "
        f"{len(drawn.controls):,} more were never put in, only to say how often such records are mistaken.",
        f"They are {drawn.share:.1%} of the tokens that the clients train on. One that was put in {times}.",
        f"Each was scored by how far its loss fell from the adapter before the first round to {_released(subject)}, "
        "and the highest and lowest scores were guessed to have been in and out (Steinke, Nasr and Jagielski 2023). "
        "How many guesses to make, and that the kinds are ranked together and apart, was settled before any score "
        "was seen; the bounds pay for every choice.",
    ]
    if clients is not None:
        said.append(
            f"In a federation of its own, {len(clients.included)} canary clients beside {clients.honest} honest ones "
            f"sent, by a coin each, the longest update that the Plan allows in a direction of their own or zeros, in "
            f"{clients.rounds} rounds with the Plan's clipping and noise (Andrew et al. 2023). Each was scored by how "
            "far the sums reach in its direction."
        )
    return tuple(said)


def _released(subject: Subject) -> str:
    if subject.federation is None:
        return "the one after one round of this client alone, which whoever sees its update by itself can make"
    return "the one that is released in the end"


def found(levels: Mapping[str, Measured], rankings: Sequence[Ranking], delta: float) -> tuple[str, ...]:
    said = []
    for name, level in levels.items():
        said += [_bound(name, level, delta), _promise(name, level, delta)]
    for one in rankings:
        area = auc(*one.sides)
        said.append(
            f"Of a pair of canaries one of which was in the run, the right one is taken in {area.value:.1%} of cases "
            f"for {one.name} (95 % interval {area.low:.1%} to {area.high:.1%}); guessing comes to 50 %."
        )
    return tuple(said)


def _bound(name: str, level: Measured, delta: float) -> str:
    one = level.bound
    guesses = f"Of {one.guesses.made} guesses about {one.canaries} canaries ({level.ranking}), {one.right} were right"
    if level.beyond_chance:
        return (
            f"For {name}: {guesses}, more than coins explain: ε is at least {one.epsilon:.2f} at δ = {delta:g}, with "
            f"95 % confidence. So many canaries could have shown {one.ceiling:.2f} at most."
        )
    return (
        f"For {name}: {guesses}. That is not shown to be better than guessing, so the lower bound on ε is 0. So many "
        f"canaries could have shown an ε of {one.ceiling:.2f} at most, if every guess had been right."
    )


def _promise(name: str, level: Measured, delta: float) -> str:
    if level.claimed is None:
        return f"The Plan promises no ε for {name}."
    promise = f"The Plan promises an ε of at most {level.claimed:.2f} at δ = {delta:g} for {name}"
    sharper = level.sharper
    if level.refuted:
        most = max(level.bound.epsilon, sharper.epsilon if level.gaussian else 0.0)
        return (
            f"{promise}. That is refuted: it is at least {most:.2f} with 95 % confidence. Either the noise is not what "
            "the Plan says, or this was a rare run."
        )
    if level.withstood:
        which = (
            "Held against what Gaussian noise of that size allows" if level.gaussian else "Held against Gaussian noise"
        )
        return (
            f"{promise}, and is not refuted; some success of an attack is what such a promise allows. {which}, the "
            f"lower bound is {sharper.epsilon:.2f}, and could have been {sharper.ceiling:.2f}."
        )
    if max(level.bound.ceiling, sharper.ceiling) <= level.claimed:
        untested = f"{promise}. No guesses about so few canaries could have refuted that: it stands untested here"
        return f"{untested}, and excuses nothing that was found." if level.beyond_chance else f"{untested}."
    return (
        f"{promise}. Held against Gaussian noise the lower bound is {sharper.epsilon:.2f}; since batches are sampled, "
        "that does not refute the promise, and is no good sign."
    )


def limits(subject: Subject, clients: ClientCanaries | None) -> tuple[str, ...]:
    said = [
        "A lower bound of 0 does not say that nothing leaks, only that this attack on these canaries did not show it; "
        "an attacker who knows more may do better.",
        "Canaries are made to be noticed, or to look like records; real records may stand out more or less.",
        *_unit(subject.plan),
    ]
    if subject.federation is None:
        said.append("It is one round of one client: in a federation its update is averaged with those of others.")
    if clients is not None:
        most = subject.plan.participations
        said.append(f"The canary clients took part in {clients.rounds} rounds, and the Plan's ε is for {most}.")
    if subject.plan.delivery.kind == "emulator":
        said.append("Losses are those of the emulator with its adapter; in the backbone they may tell more or less.")
    return tuple(said)


def _unit(plan: Plan) -> tuple[str, ...]:
    if plan.privacy.kind == "example":
        return (
            "The Plan counts how many records there are as public, and canaries that are put in change that number; "
            "the scores make no use of it.",
        )
    if plan.data.packing and plan.model.task == "causal-lm":
        return ("The Plan packs records, so a canary shares its window of tokens with records of its client.",)
    return ()
