"""What was done with planted secrets and what came of it, in words."""

from __future__ import annotations

from collections.abc import Sequence

from .exposure_results import CHANCE, ERROR, MAXIMUM, Group, beyond_chance, detectable, leaks, named
from .planted_secrets import CODES, EACH, Secrets
from .subject import Subject


def tried(subject: Subject, drawn: Secrets, seen: Sequence[float], looks: Sequence[int]) -> tuple[str, ...]:
    planted = sorted({one.times for one in drawn.secrets if one.times})
    trained = {
        times: [each for one, each in zip(drawn.secrets, seen, strict=True) if one.times == times] for times in planted
    }
    counts = ", ".join(f"{sum(some) / len(some):.3g} ({named(times)})" for times, some in trained.items())
    often = (
        f"are in {counts} batches on average, which are drawn truly at random"
        if subject.plan.privacy.kind == "example"
        else f"were trained on {counts} times on average"
    )
    return (
        f"Sentences that end in a code of three digits were put into clients' data, {EACH} different ones "
        f"{_listed(planted)} times each; {EACH} more were never put in. They are {drawn.share:.1%} of the tokens that "
        f"the clients train on, and {often}, all copies together.",
        f"After {len(looks) - 1} of the rounds, and before the first, the model was asked how likely it finds each of "
        f"all {len(CODES):,} codes at the end of each sentence. Exposure is log₂ of their number less log₂ of the "
        f"planted one's rank (Carlini et al. 2019): from 0 to {MAXIMUM:.2f} bits, which is the model's first guess.",
        f"A secret that the model has never seen has {CHANCE:.2f} bits on average. The verdict goes by the last round: "
        f"secrets planted equally often are ranked so high together by chance with a probability below {ERROR:.0%}, "
        "divided by how many such groups there are.",
    )


def found(groups: Sequence[Group]) -> tuple[str, ...]:
    said = [_group(one, groups) for one in groups]
    if not leaks(groups):
        said.append(
            f"No secret is shown to be given away. This could have shown {MAXIMUM:.2f} bits at most; for {EACH} "
            f"secrets together, a mean below about {detectable(groups):.1f} bits cannot be told from chance."
        )
    return tuple(said)


def _group(one: Group, groups: Sequence[Group]) -> str:
    mean = f"Secrets {named(one.times)} have an exposure of {one.mean:.2f} bits on average, of {MAXIMUM:.2f}"
    if not one.times:
        return f"{mean}; they are here to show what chance looks like (p = {one.chance:.2g})."
    if not beyond_chance(one, groups):
        return f"{mean}. That is not shown to be more than chance (p = {one.chance:.2g})."
    first = sum(found.low > MAXIMUM - 1e-9 for found in one.exposures)
    return (
        f"{mean}, more than chance explains (p = {one.chance:.2g}): who has the adapter needs "
        f"{_guesses(one.mean)} where others need {len(CODES):,}. {first} of {len(one.exposures)} are the model's "
        "first guess."
    )


def limits(subject: Subject) -> tuple[str, ...]:
    said = [
        "The attacker knows the sentence and that three digits are missing. Who knows less finds less.",
        "Secrets of another kind, longer ones, or ones that look like the rest of the data may be learnt sooner or "
        "later than these.",
        f"{EACH} secrets of each number of repeats show what happens, and little of how often.",
    ]
    if subject.plan.privacy.kind == "example":
        said.append("The Plan's ε is for one record; a secret in k records has only what is promised to k of them.")
    if subject.federation is None:
        said.append("It is one round of one client: in a federation its update is averaged with those of others.")
    if subject.plan.delivery.kind == "emulator":
        said.append("The emulator with its adapter was asked; the backbone with it may tell more or less.")
    return tuple(said)


def _guesses(bits: float) -> str:
    count = round(2 ** (MAXIMUM - bits))
    return "about one guess" if count <= 1 else f"about {count:,} guesses"


def _listed(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
