"""One audit from its first attack to its last, whoever asked for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from farfield.protocols.audit.finding import Finding, Untried
from farfield.protocols.errors import AuditError, did_you_mean

from .attack import Attack, registered
from .subject import Subject


class Progress(Protocol):
    """Is told how an audit goes on; `Subject.say` is told what each attack does."""

    def on_attack(self, attack: Attack, number: int, attacks: int) -> None: ...
    def on_finding(self, finding: Finding) -> None: ...
    def on_untried(self, untried: Untried) -> None: ...


def chosen(names: Sequence[str] | None) -> list[Attack]:
    """The attacks of these names, in the order of a report; those that are made by default where there are none.

    Raises:
        AuditError: there is no attack of a name.
    """
    known = registered()
    if names is None:
        return [attack for attack in known.values() if attack.default]
    for name in names:
        if name not in known:
            raise AuditError(f"no attack {name!r}", where="--attacks", hint=did_you_mean(name, known))
    return [attack for name, attack in known.items() if name in names]


def conduct(subject: Subject, attacks: Sequence[Attack], progress: Progress) -> tuple[list[Finding], list[Untried]]:
    """Make the attacks that can be made, and say why the others were not.

    Raises:
        FarfieldError: an attack cannot be made to its end. What was found before is kept in the subject's notes.
    """
    reasons = {attack.name: attack.unfit(subject) for attack in attacks}
    fit = [attack for attack in attacks if reasons[attack.name] is None]
    for attack in fit:
        subject.plantings[attack.name] = attack.plant(subject)
    findings = []
    for number, attack in enumerate(fit, 1):
        progress.on_attack(attack, number, len(fit))
        made = subject.notes.values(f"findings/{attack.name}", partial(_made, attack, subject))
        finding = Finding.model_validate(made)
        progress.on_finding(finding)
        findings.append(finding)
    untried = []
    for attack in registered().values():
        if attack not in fit:
            reason = reasons.get(attack.name) or "it was not asked for"
            untried.append(Untried(attack=attack.name, title=attack.title, reason=reason))
            progress.on_untried(untried[-1])
    return findings, untried


def _made(attack: Attack, subject: Subject) -> object:
    began = time.monotonic()
    found = attack.run(subject)
    return found.model_copy(update={"seconds": round(time.monotonic() - began, 1)}).model_dump(mode="json")
