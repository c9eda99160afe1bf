"""Membership inference: who holds the adapter tells examples that were trained on from examples that were not."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from farfield.protocols.audit.finding import Finding

from . import membership_results as shown
from . import membership_scores as scoring
from . import membership_words as words
from .attack import Attack, Attacker, register
from .candidates import candidates
from .losses import losses
from .membership_results import BLIND, LIRA, LOSS, OFFLINE, RMIA, result
from .shadows import shadows
from .subject import Subject

SHADOWS: Final = 4
SHADOWS_ALONE: Final = 2


@register
class Membership(Attack):
    name: ClassVar[str] = "membership"
    title: ClassVar[str] = "Membership: was this example trained on?"
    attacker: ClassVar[Attacker] = Attacker.HOLDER
    cost: ClassVar[str] = "four short trainings, and six passes over at most 800 examples"
    place: ClassVar[int] = 50

    def unfit(self, subject: Subject) -> str | None:
        if subject.bench.method.sharing.local is not None:
            return (
                f"with tuning.kind = {subject.plan.tuning.kind!r} each client keeps a part of what it trains at home, "
                "and the part that is let out has no loss of its own to go by"
            )
        if not any(read().held_out for read in subject.clients.values()):
            return "no client holds anything out (data.held_out), so there is nothing to compare members with"
        return None

    def run(self, subject: Subject) -> Finding:
        # 1. Whom it asks about, and their losses before and after training.
        asked = candidates(subject)
        initial, released = (
            np.array(
                subject.notes.values(f"membership/{name}", partial(losses, subject.bench, adapter, asked.examples))
            )
            for name, adapter in (
                ("initial", subject.initial),
                ("released", subject.course.adapter(subject.course.rounds)),
            )
        )
        # 2. What losses look like of what was trained on, and of what was not.
        count = SHADOWS_ALONE if subject.federation is None else SHADOWS
        known = shadows(subject, asked.examples, count, asked.visits)
        # 3. How far the two sides are apart.
        scores = {
            RMIA: scoring.rmia(released, known.losses),
            LIRA: scoring.lira(released, known.losses, known.trained),
            OFFLINE: scoring.lira_offline(released, known.losses, known.trained),
            LOSS: scoring.loss_difference(initial, released),
            BLIND: -initial,
        }
        results = {name: result(score[asked.members], score[~asked.members]) for name, score in scores.items()}
        leak, control = shown.leaks(results), shown.control(known)
        alone = subject.federation is None
        return Finding(
            attack=self.name,
            title=self.title,
            attacker=Attacker.COORDINATOR if alone else self.attacker,
            verdict="leak" if leak else "no leak found",
            tried=words.tried(subject.plan, asked, known, alone=alone),
            found=words.found(results, control, leak=leak),
            limits=words.limits(subject.plan, len(known.steps), alone=alone),
            figures=shown.figures(results, control),
            plots=(shown.plot(results),),
            tables=(shown.scores(results), *shown.clients(asked, scores[RMIA])),
            data={
                "client": list(asked.clients),
                "member": _flags(asked.members),
                "loss_initial": initial.tolist(),
                "loss_released": released.tolist(),
                "loss_shadows": known.losses.tolist(),
                "trained_by_shadow": [_flags(row) for row in known.trained],
                "shadow_steps": list(known.steps),
            },
        )


def _flags(values: NDArray[np.bool_]) -> str:
    """A character for each: 1 for True."""
    return "".join("1" if value else "0" for value in values)
