"""One-run canaries: a lower bound on ε from the audited run itself (Steinke, Nasr and Jagielski 2023).

A coin decides of each canary whether it is in the run. Who sees what the run lets out then guesses the coins. With no
leak at all half of the guesses are right; how many more there are says how large ε is at least.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from farfield.edge_client.data import IGNORED, Example, TokenExample
from farfield.protocols.audit.finding import Finding
from farfield.protocols.privacy.accounting import SampledGaussian
from farfield.protocols.privacy.mechanism import ClientMechanism, mechanism, promised

from . import canary_clients
from . import canary_results as shown
from . import canary_words as words
from .attack import Attack, Attacker, register
from .canary_bounds import Ranking, each, measured, together
from .canary_records import KINDS, Canaries, draw
from .losses import losses
from .subject import Planted, Planting, Subject
from .trained_on import times_trained


@register
class CanariesInOneRun(Attack):
    """Canary records in the audited run, scored by how far their loss fell; and canary clients where the Plan promises
    privacy by client.
    """

    name: ClassVar[str] = "canaries"
    title: ClassVar[str] = "Canaries: was this record, or this client, in the run?"
    attacker: ClassVar[Attacker] = Attacker.HOLDER
    cost: ClassVar[str] = "two passes over at most 1,000 short texts, and a short federation if privacy is by client"
    place: ClassVar[int] = 30

    def unfit(self, subject: Subject) -> str | None:
        if subject.bench.method.sharing.local is not None:
            return (
                f"with tuning.kind = {subject.plan.tuning.kind!r} each client keeps a part of what it trains at home, "
                "and the part that is let out has no loss of its own to go by"
            )
        return None

    def plant(self, subject: Subject) -> Planting:
        return Planting(tuple(Planted(one.client, one.record) for one in draw(subject).canaries if one.included))

    def run(self, subject: Subject) -> Finding:
        drawn = draw(subject)
        # 1. How far the loss of each canary fell: the more, the likelier it was trained on.
        asked, course = drawn.canaries + drawn.controls, subject.course
        examples = [one.example for one in asked]
        before, after = (
            np.array(subject.notes.values(f"canaries/{name}", partial(losses, subject.bench, adapter, examples)))
            for name, adapter in (("initial", subject.initial), ("released", course.adapter(course.rounds)))
        )
        rankings = _rankings(drawn, (before - after) * [_targets(example) for example in examples])
        # 2. How far what whole clients sent shows, where the Plan promises that it does not.
        made, spent = mechanism(subject.plan), promised(subject.plan)
        by_client = isinstance(made, ClientMechanism) and subject.federation is not None
        tests = len(rankings) + by_client
        clients = canary_clients.measure(subject, spent.epsilon, each(tests)) if spent and by_client else None
        # 3. What that tells about the coins, as bounds on ε that hold together.
        bounds = partial(
            measured,
            delta=subject.plan.privacy.delta,
            claimed=None if spent is None else spent.epsilon,
            gaussian=made is not None and not isinstance(made.release, SampledGaussian),
            seed=subject.seed,
            tests=tests,
        )
        levels = {"records": bounds(rankings)}
        if clients is not None:
            rankings.append(Ranking("clients", np.array(clients.scores), np.array(clients.included), np.zeros(0)))
            levels["clients"] = bounds(rankings[-1:])
        seen = _seen(subject, drawn)
        return Finding(
            attack=self.name,
            title=self.title,
            attacker=words.attacker(subject, clients),
            verdict="leak" if any(level.leak for level in levels.values()) else "no leak found",
            tried=words.tried(subject, drawn, seen, clients),
            found=words.found(levels, rankings, subject.plan.privacy.delta),
            limits=words.limits(subject, clients),
            figures=shown.figures(levels, rankings),
            plots=(shown.curves(rankings), *(shown.bounds(name, level) for name, level in levels.items())),
            tables=(shown.kinds(rankings),),
            data={
                "kind": shown.flags(one.kind == KINDS[0] for one in asked),
                "client": [one.client for one in drawn.canaries],
                "included": shown.flags(one.included for one in drawn.canaries),
                "targets": [_targets(example) for example in examples],
                "loss_initial": before.tolist(),
                "loss_released": after.tolist(),
                "times_trained": [*seen],
                "client_scores": [] if clients is None else list(clients.scores),
                "client_included": "" if clients is None else shown.flags(clients.included),
            },
        )


def _rankings(drawn: Canaries, fell: NDArray[np.float64]) -> list[Ranking]:
    """All canaries in one order, and each kind by itself: one of them may show much more than the other."""
    tossed, apart = len(drawn.canaries), []
    included = np.array([one.included for one in drawn.canaries])
    for kind in KINDS:
        mine = np.array([one.kind == kind for one in drawn.canaries + drawn.controls])
        scores = fell[:tossed][mine[:tossed]]
        apart.append(Ranking(kind, scores, included[mine[:tossed]], fell[tossed:][mine[tossed:]]))
    return [together("both kinds", apart), *apart]


def _targets(example: Example) -> int:
    """How many tokens or classes are predicted in it."""
    return sum(label != IGNORED for label in example.labels[1:]) if isinstance(example, TokenExample) else 1


def _seen(subject: Subject, drawn: Canaries) -> list[float]:
    """How often each canary was trained on; 0 for those left out."""
    by_client: dict[str, list[int]] = {}
    for index, one in enumerate(drawn.canaries):
        if one.included:
            by_client.setdefault(one.client, []).append(index)
    seen = [0.0] * len(drawn.canaries)
    for name, indices in by_client.items():
        records = [drawn.canaries[index].record for index in indices]
        for index, times in zip(indices, times_trained(subject, name, records), strict=True):
            seen[index] = round(times, 4)
    return seen
