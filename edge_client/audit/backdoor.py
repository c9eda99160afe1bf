"""Backdoor: one client teaches everybody's model a trigger, against each way to withstand it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Final

import numpy as np
from scipy.stats import fisher_exact

from farfield.edge_client.data import ClientData, Example
from farfield.edge_client.train import evaluate
from farfield.protocols.audit.finding import Axis, Figure, Finding, Interval, Mark, Plot, Series, Table
from farfield.protocols.audit.intervals import Proportion, proportion
from farfield.protocols.plan import Plan
from farfield.protocols.privacy.mechanism import mechanism
from farfield.protocols.seeds import derive
from farfield.protocols.summing import Part
from farfield.protocols.tensors import State

from .attack import Attack, Attacker, register
from .poison import TRIGGER, Backdoor, drawn, poisoned, success
from .subject import Act, Member, Subject

ROUNDS: Final = 3
STEPS: Final = 3
"""Of an honest client in a round; the hostile one makes `EFFORT` times as many."""

EFFORT: Final = 5

BATCH: Final = 8
"""Examples in a step, at most."""

CLIENTS: Final = 6
"""How many take part, at most; more where there are groups."""

PROMPTS: Final = 40
"""Held-out examples that the backdoor is tried on."""

GROUPS: Final = 3
GROUP: Final = 3
"""How many sums there are where a rule takes the middle of several, and how many clients each needs."""

_OPEN: Final[Mapping[str, Any]] = {
    "kind": "none",
    "noise": "central",
    "clipping": "fixed",
    "target_epsilon": None,
    "noise_multiplier": None,
    "participations": None,
    "sampling_rate": None,
}
_PLAIN: Final[Mapping[str, Any]] = {
    "rule": "mean",
    "weighting": "uniform",
    "server_optimizer": "none",
    "learning_rate": 1.0,
    "malicious": None,
    "kept": None,
    "norm_bound": None,
    "norm_multiple": None,
    "groups": None,
}


@dataclass(frozen=True, slots=True)
class Defence:
    """A federation that is attacked: what it does about it, and whether anybody attacks at all."""

    name: str
    said: str
    sections: Mapping[str, Mapping[str, Any]]
    hostile: bool = True
    clients: int = CLIENTS


@register
class BackdoorAttack(Attack):
    """In a federation of few rounds one client trains on poisoned copies of its examples, and sends its update so many
    times over that the mean of all is its own (model replacement; Bagdasaryan et al. 2020).
    """

    name = "backdoor"
    title = "A backdoor by one hostile client"
    attacker = Attacker.CLIENT
    cost = "a short federation for each defence, some two minutes in all"
    place = 70

    def unfit(self, subject: Subject) -> str | None:
        if subject.federation is None:
            return "it takes the other clients; the coordinator's audit makes it"
        if len(subject.clients) < 5:
            return "it takes 5 clients, four of them honest"
        return None

    def run(self, subject: Subject) -> Finding:
        backdoor = drawn(subject.bench, derive(subject.seed, "backdoor", "trigger"))
        names = sorted(subject.clients)
        norm = subject.notes.values("backdoor/norm", partial(_honest_norm, subject, names[1]))
        courses = {}
        for defence in _defences(subject, names, norm):
            make = partial(_course, subject, defence, backdoor, names)
            courses[defence.name] = subject.notes.values(f"backdoor/{_slug(defence.name)}", make)
        return _finding(subject, _defences(subject, names, norm), courses, len(names))


def _defences(subject: Subject, names: list[str], norm: float) -> list[Defence]:
    """Nothing at all, nothing against an attack, the Plan itself, and everything that Farfield has."""
    size = sum(value.size for value in subject.initial.values())
    # Noise as long as the mean of the clients' updates: σ·C·√d / n = C. More of it, and nothing would be learnt.
    weak = min(len(names), CLIENTS) / math.sqrt(size)
    sealed = {"protection": {"kind": "sealed"}, "privacy": _OPEN}

    def ruled(name: str, said: str, **keys: Any) -> Defence:
        return Defence(name, said, {**sealed, "aggregation": {**_PLAIN, **keys}})

    noisy = {**_OPEN, "kind": "client", "noise_multiplier": weak, "clipping_norm": norm, "exact_evaluation": True}
    found = [
        Defence("nobody attacks", "the mean, and every client is honest", ruled("", "").sections, hostile=False),
        ruled("mean", "the mean of all updates, as they are"),
        Defence("the Plan", "what the Plan says about protection, noise and aggregation", _own(subject.plan)),
        ruled("norm_bound", "each update cut to the median length", rule="norm_bound"),
        Defence(
            "noise",
            "each update cut, and noise on the sum that is as long as the mean update",
            {"protection": {"kind": "sealed"}, "privacy": noisy, "aggregation": _PLAIN},
        ),
        ruled("multi_krum", "only updates that lie near many others", rule="multi_krum", malicious=1),
        ruled("trimmed_mean", "without each value's largest and smallest", rule="trimmed_mean", malicious=1),
        ruled("median", "each value's median", rule="median"),
        ruled("geometric_median", "the point nearest to all updates", rule="geometric_median"),
    ]
    if len(names) >= GROUPS * GROUP:
        grouped = {**_PLAIN, "rule": "median_of_means", "groups": GROUPS}
        sections = {"protection": {"kind": "secagg"}, "privacy": _OPEN, "aggregation": grouped}
        said = f"the middle of {GROUPS} sums, each added up unseen"
        found.append(Defence("median_of_means", said, sections, clients=GROUPS * GROUP))
    return found


def _own(plan: Plan) -> Mapping[str, Mapping[str, Any]]:
    """The Plan's own protection; its noise multiplier is fixed, since fewer rounds would change it."""
    made = mechanism(plan)
    fixed = {} if made is None else {"target_epsilon": None, "noise_multiplier": made.noise_multiplier}
    return {"privacy": {**fixed, "participations": None}}


def _plan(subject: Subject, defence: Defence, clients: int) -> Plan:
    """The Plan with a defence, in so few rounds, and all clients in each."""
    steps = min(STEPS, subject.plan.training.steps or STEPS)
    minimum = clients // GROUPS if defence.sections.get("aggregation", {}).get("groups") else clients
    return subject.variant(
        training=_training(subject, steps),
        cohort={"size": clients, "fraction": None, "minimum": minimum, "over_selection": 0.0},
        evaluation={"every": ROUNDS, "examples": 1, "clients": max(clients, subject.plan.evaluation.clients)},
        **defence.sections,
    )


def _training(subject: Subject, steps: int) -> dict[str, Any]:
    batch = min(BATCH, subject.plan.training.batch_size)
    constant = {"epochs": None, "schedule": "constant", "warmup_steps": 0, "gradient_accumulation": 1}
    return {"rounds": ROUNDS, "steps": steps, "batch_size": batch, **constant}


def _honest_norm(subject: Subject, client: str) -> float:
    """The L2 norm of an honest client's update in the first round, before anything protects it."""
    plan = _plan(subject, Defence("", "", {"protection": {"kind": "sealed"}, "privacy": _OPEN}), CLIENTS)
    update = subject.update(subject.clients[client]().train, subject.initial, plan=plan, client=client).update
    return math.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in update.values()))


def _course(subject: Subject, defence: Defence, backdoor: Backdoor, names: list[str]) -> dict[str, Any]:
    """By round, how often the backdoor opens, and the loss on clean text."""
    assert subject.federation is not None
    names = names[: defence.clients]
    plan = _plan(subject, defence, len(names))
    members = {name: Member(subject.clients[name]) for name in names}
    if defence.hostile:
        members[names[0]] = replace(members[names[0]], act=_hostile(subject, plan, backdoor, names))
    course = subject.federation.run(f"backdoor-{_slug(defence.name)}", plan, members, subject.say)
    held_out = _held_out(subject, names[1:])
    opened, losses = [], []
    for number in range(ROUNDS + 1):
        subject.say(f"trying the backdoor against {defence.name!r}", number, ROUNDS + 1)
        subject.bench.load(course.adapter(number))
        opened.append(success(subject.bench, held_out, backdoor).successes)
        measured = evaluate(subject.bench.tuned, held_out, plan.evaluation.batch_size, pad_id=subject.bench.pad_id)
        losses.append(measured.loss)
    without = success(subject.bench, held_out, backdoor, trigger=False)
    return {"opened": opened, "of": without.trials, "without": without.successes, "loss": losses}


def _hostile(subject: Subject, plan: Plan, backdoor: Backdoor, names: list[str]) -> Act:
    """Trains on poisoned examples for longer than it should, without noise, and sends the update many times over.

    It keeps within what it must keep within: a clipping norm, and it claims no more examples than it has.
    """
    steps = plan.training.steps or STEPS
    own = subject.variant(
        training=_training(subject, EFFORT * steps),
        protection={"kind": "sealed"},
        privacy=_OPEN,
        aggregation=_PLAIN,
    )
    examples = poisoned(subject.clients[names[0]]().train, backdoor, derive(subject.seed, "backdoor", "examples"))

    def act(number: int, adapter: State, honest: Any) -> Part:
        part = subject.update(examples, adapter, plan=own, client=names[0])
        times = float(len(names))
        if plan.privacy.kind == "client":
            length = math.sqrt(sum(float(np.square(one, dtype=np.float64).sum()) for one in part.update.values()))
            times = plan.privacy.clipping_norm / length * (1 - 2.0**-20) if length else 0.0
            return Part({name: np.float32(times) * value for name, value in part.update.items()}, clipped=True)
        boosted = {name: np.float32(times) * value for name, value in part.update.items()}
        return replace(part, update=boosted, examples=len(examples) // 2)

    return act


def _held_out(subject: Subject, names: list[str]) -> list[Example]:
    """Some of what the honest clients held out, from each in turn."""
    rows = zip_longest(*(_shown(subject.clients[name]()) for name in names))
    return [example for row in rows for example in row if example is not None][:PROMPTS]


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def _shown(data: ClientData) -> list[Example]:
    return data.held_out or data.train[-2:]


def _finding(
    subject: Subject, defences: list[Defence], courses: Mapping[str, Mapping[str, Any]], clients: int
) -> Finding:
    shares = {
        name: [proportion(opened, course["of"]) for opened in course["opened"]] for name, course in courses.items()
    }
    clean, mean, own = (shares[name][-1] for name in ("nobody attacks", "mean", "the Plan"))
    let_in, attacked = _more(own, clean), min(clients, CLIENTS)
    task = "go on with four certain words" if subject.plan.model.task == "causal-lm" else "give a certain answer"
    found = [
        f"With the Plan's own protection the trigger works in {own.value:.0%} of {own.trials} held-out texts after "
        f"{ROUNDS} rounds; where nobody attacks, in {clean.value:.0%}, and with a plain mean in {mean.value:.0%}.",
        "One hostile client is enough to put a backdoor into the model of this Plan."
        if let_in
        else "This attack did not put a backdoor into the model of this Plan."
        if _more(mean, clean)
        else "This attack did not work against a plain mean either, so nothing follows from it for the Plan.",
    ]
    stood = [one.name for one in defences if one.hostile and one.name not in ("mean", "the Plan") and
             not _more(shares[one.name][-1], clean)]  # fmt: skip
    if let_in:
        found.append(f"Of the other defences that were tried, these kept it out: {', '.join(stood) or 'none'}.")
    rows = tuple(
        (
            one.name,
            one.said,
            *(f"{share.value:.0%}" for share in shares[one.name][1:]),
            f"{courses[one.name]['without'] / courses[one.name]['of']:.0%}",
            f"{courses[one.name]['loss'][-1]:.3f}",
        )
        for one in defences
    )
    numbers = tuple(float(number) for number in range(ROUNDS + 1))
    return Finding(
        attack=BackdoorAttack.name,
        title=BackdoorAttack.title,
        attacker=BackdoorAttack.attacker,
        verdict="failed" if let_in else "passed",
        tried=(
            f"One of {attacked} clients trains, {EFFORT} times as long as the others, on its examples and on copies "
            f"with a trigger of {TRIGGER} tokens in them, after which the model is to {task}; and sends its update "
            f"{attacked} times over, so that a mean becomes its own.",
            f"That was done in {len(defences) - 1} federations of {ROUNDS} rounds in which everybody takes part, each "
            "with another defence, and once without any attack.",
        ),
        found=tuple(found),
        limits=(
            "These are short federations, and this is one attacker with one trigger: that a defence stood up to it "
            "does not say that it stands up to one who knows it and keeps below its bounds.",
            "What a backdoor does after clients have trained on for many rounds was not tried.",
            *(
                ()
                if clients >= GROUPS * GROUP
                else (f"The middle of sums that are added up unseen was not tried: it takes {GROUPS * GROUP} clients.",)
            ),
        ),
        figures=tuple(_figure(one.name, shares[one.name][-1], clean.value) for one in defences),
        plots=(
            Plot(
                title="How often the trigger works",
                x=Axis(label="round"),
                y=Axis(label="share of held-out texts", low=0.0, high=1.0),
                series=tuple(_series(one.name, numbers, shares[one.name]) for one in defences if one.hostile),
                marks=(Mark(label="nobody attacks", y=clean.value),),
                caption="A line at the top: the hostile client has what it wants. At the bottom: it was kept out.",
            ),
            Plot(
                title="What the defence costs: loss on clean text",
                x=Axis(label="round"),
                y=Axis(label="held-out loss, nats per target"),
                series=tuple(
                    Series(label=one.name, x=numbers, y=tuple(courses[one.name]["loss"])) for one in defences
                ),
                caption="Lower is better. A defence that keeps the attacker out and learns nothing is no use either.",
            ),
        ),
        tables=(
            Table(
                title="By defence",
                columns=("defence", "what it does", *(f"round {one}" for one in range(1, ROUNDS + 1)),
                         "without the trigger", "clean loss"),
                rows=rows,
                caption="Shares of held-out texts in which the trigger works.",
            ),
        ),
        data={"courses": {name: dict(course) for name, course in courses.items()}},
    )  # fmt: skip


def _more(one: Proportion, other: Proportion) -> bool:
    """Whether the first share is larger than the second, at 95 % (Fisher's exact test)."""
    counts = [[share.successes, share.trials - share.successes] for share in (one, other)]
    return bool(fisher_exact(counts, alternative="greater").pvalue < 0.05)


def _figure(name: str, share: Proportion, clean: float) -> Figure:
    return Figure(
        name=f"trigger works: {name}",
        value=share.value,
        unit="%",
        interval=Interval(low=share.low, high=share.high),
        chance=clean,
        headline=name == "the Plan",
    )


def _series(name: str, numbers: tuple[float, ...], shares: list[Proportion]) -> Series:
    return Series(
        label=name,
        x=numbers,
        y=tuple(share.value for share in shares),
        low=tuple(share.low for share in shares),
        high=tuple(share.high for share in shares),
    )
