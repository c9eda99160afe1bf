"""The server's side of a secure aggregation, without I/O: `open_session`, and then one `Phase` after the other.

phase = open_session(…)
while isinstance(phase, Phase):
    ask phase.clients for phase.step with phase.common and phase.own(client), and phase.receive their answers
    phase = phase.close()          # when nobody is missing, or at the deadline
phase.total                        # a Sum
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

from farfield.protocols.errors import SecAggError

from .messages import Open, decode_open, encode_open
from .phases import Advertising, Answer, Record, Sum


@final
class Phase:
    """A step that is under way.

    Attributes:
        step: what is asked for.
        clients: who is asked, in ascending order.
        common: what all of them are told.
    """

    def __init__(self, record: Record[Any]) -> None:
        self._record = record
        self._answers: dict[str, Any] = {}
        self._closed = False
        self.step: Final = record.step
        self.clients: Final = tuple(sorted(record.clients))
        self.common: Final = record.common

    @property
    def missing(self) -> frozenset[str]:
        """Who has not given an answer that counts."""
        return frozenset(self.clients) - self._answers.keys()

    def own(self, client: str) -> bytes:
        """What one of `clients` is told besides."""
        return self._record.own(client)

    def receive(self, client: str, answer: Answer) -> None:
        """Count an answer.

        Raises:
            SecAggError: the client was not asked or has answered, or what it sent is not true; nothing has changed.
            WireError: no answer to this step; nothing has changed.
        """
        if self._closed or client not in self.missing:
            raise SecAggError(f"not asked to {self.step.value}, or has answered already", where=client)
        self._answers[client] = self._record.read(client, answer)

    def close(self) -> Phase | Sum:
        """What comes of the answers that are there; those who are missing have dropped out.

        Raises:
            SecAggError: too few for the next step, or, in the last one, a dealer whose secrets are not what it
                committed itself to. The session is lost.
        """
        if self._closed:
            raise SecAggError(f"the {self.step.value} step was closed before")
        self._closed = True
        after = self._record.close(self._answers)
        return after if isinstance(after, Sum) else Phase(after)


def open_session(opened: Open, identities: Mapping[str, bytes]) -> Phase:
    """The first phase.

    Args:
        identities: raw Ed25519 key by name of all who are asked, `opened.clients` of them.

    Raises:
        SecAggError: another number of clients than the Open says.
        WireError: an Open that contradicts itself.
    """
    if len(identities) != opened.clients:
        raise SecAggError(f"{len(identities)} clients to be asked, and the session is opened for {opened.clients}")
    raw = encode_open(opened)
    decode_open(raw)
    return Phase(Advertising(raw, dict(identities)))
