"""Exposure of planted secrets (Carlini et al. 2019, "The secret sharer", arXiv 1802.08232).

A code in a sentence is repeated in a client's data, and after some of the rounds the model is asked how likely it finds
each code that might stand there. How high the planted one is in that order is how much the model gives it away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar, Final

import numpy as np

from farfield.edge_client.records import CLASSIFICATION
from farfield.protocols.audit.exposure import Exposure, by_rank
from farfield.protocols.audit.finding import Finding

from . import exposure_results as shown
from . import exposure_words as words
from .attack import Attack, Attacker, register
from .exposure_results import group, leaks
from .planted_secrets import Question, Secret, Secrets, draw, length
from .subject import Planted, Planting, Subject
from .trained_on import times_trained

LOOKS: Final = 7
"""After how many rounds the model is asked, at most, besides before the first."""


@register
class ExposureOfSecrets(Attack):
    name: ClassVar[str] = "exposure"
    title: ClassVar[str] = "Exposure: can a secret be read out of the adapter?"
    attacker: ClassVar[Attacker] = Attacker.HOLDER
    cost: ClassVar[str] = "about 1,500 short texts through the model, after eight of the rounds"
    place: ClassVar[int] = 40

    def unfit(self, subject: Subject) -> str | None:
        if subject.plan.model.task == CLASSIFICATION:
            return "a model that only names classes cannot be asked for a text"
        if subject.bench.method.sharing.local is not None:
            return (
                f"with tuning.kind = {subject.plan.tuning.kind!r} each client keeps a part of what it trains at home, "
                "and the part that is let out predicts nothing by itself"
            )
        if (longest := length(subject)) > subject.plan.data.max_length:
            return f"a secret takes {longest} tokens, and the Plan cuts texts at {subject.plan.data.max_length}"
        return None

    def plant(self, subject: Subject) -> Planting:
        drawn = draw(subject).secrets
        return Planting(tuple(Planted(one.client, one.record, one.times) for one in drawn if one.times))

    def run(self, subject: Subject) -> Finding:
        drawn, course = draw(subject), subject.course
        # 1. After some rounds, the rank of every secret among all codes.
        looks = rounds_to_look_at(course.rounds)
        found: dict[int, list[Exposure]] = {}
        for done, number in enumerate(looks):
            subject.say(f"asking for secrets after round {number}", done, len(looks))
            asked = subject.notes.values(f"exposure/round-{number:04}", partial(_exposures, subject, drawn, number))
            found[number] = [Exposure(**one) for one in asked]
        # 2. How surely the planted ones are ranked higher than secrets that were never seen.
        groups = group(drawn.secrets, found[looks[-1]])
        seen = _seen(subject, drawn.secrets)
        return Finding(
            attack=self.name,
            title=self.title,
            attacker=Attacker.COORDINATOR if subject.federation is None else self.attacker,
            verdict="leak" if leaks(groups) else "no leak found",
            tried=words.tried(subject, drawn, seen, looks),
            found=words.found(groups),
            limits=words.limits(subject),
            figures=shown.figures(groups),
            plots=(shown.over_rounds(drawn.secrets, found),),
            tables=(shown.each(drawn.secrets, seen, found[looks[-1]]),),
            data={
                "client": [one.client for one in drawn.secrets],
                "times_planted": [one.times for one in drawn.secrets],
                "times_trained": [*seen],
                "rounds": [*looks],
                "exposure": [[one.value for one in found[number]] for number in looks],
                "exposure_at_least": [[one.low for one in found[number]] for number in looks],
            },
        )


def rounds_to_look_at(rounds: int) -> list[int]:
    """0, the last one, and some between, more of them at the beginning, where there is more to see."""
    return sorted({0, *(round(one) for one in np.geomspace(1, rounds, LOOKS))})


def _exposures(subject: Subject, drawn: Secrets, number: int) -> list[dict[str, Any]]:
    subject.bench.load(subject.course.adapter(number))
    found = []
    for secret in drawn.secrets:
        scores = Question(subject, secret).scores()
        found.append(asdict(by_rank(float(scores[secret.code]), np.delete(scores, secret.code))))
    return found


def _seen(subject: Subject, secrets: Sequence[Secret]) -> list[float]:
    """How often each secret was trained on."""
    return [round(times_trained(subject, one.client, [one.record])[0], 2) if one.times else 0.0 for one in secrets]
