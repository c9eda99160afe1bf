"""One client's own part of a federation's first round: what it would send, before it sends it."""

from __future__ import annotations

from collections.abc import Mapping

from farfield.protocols.tensors import State

from .subject import Course, Member, Subject


class Alone(Course):
    """One round in which nobody else takes part."""

    rounds = 1

    def __init__(self, subject: Subject, members: Mapping[str, Member]) -> None:
        self._initial = subject.initial
        self._names = tuple(subject.clients)
        (name,) = self._names

        def make() -> State:
            subject.say("training on your data as the Plan says", 0, 1)
            return dict(subject.update(members[name].data().train, self._initial, client=name).update)

        self._update = subject.notes.state("update", make)

    def adapter(self, number: int) -> State:
        if not number:
            return self._initial
        return {name: value + self._update[name] for name, value in self._initial.items()}

    def aggregate(self, number: int) -> State:
        return self._update

    def members(self, number: int) -> tuple[str, ...]:
        return self._names
