"""One client's side of a secure aggregation, without I/O: `begin`, and then `State.answer` once for each step.

Whatever is wrong with a step ends the session, and nobody can ask twice: not for two masked vectors, and not for
shares of a neighbour's seed and then of its mask key, which together would lay that neighbour's vector bare.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Final, final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from farfield.protocols.errors import SecAggError

from .masks import Words
from .messages import Open
from .states import Advertised, Answer, Confirmed, Joining, Known, Owner, Revealed, Shared, Submitted, Terms

_STATES: Final[Mapping[str, Callable[..., Known]]] = {
    kind.__name__: kind for kind in (Joining, Advertised, Revealed, Shared, Submitted, Confirmed)
}


@final
class State:
    """A client that waits for `step`, and can be asked once.

    Attributes:
        step: what it waits for.
    """

    __slots__ = ("_owner", "_record", "step")

    def __init__(self, record: Known, owner: Owner) -> None:
        self._record: Known | None = record
        self._owner = owner
        self.step: Final = record.step

    def __repr__(self) -> str:
        return f"State({self._owner.name!r}, {self.step}, {'over' if self._record is None else 'waiting'})"

    def answer(self, common: bytes, own: bytes = b"", vector: Words | None = None) -> tuple[State | None, Answer]:
        """The next state, None after the last step, and what to send.

        Whether it returns or raises, this state is used up and knows nothing any more.

        Args:
            common: what the server tells everybody in this step.
            own: what it tells this client.
            vector: for SUBMIT the fixed-point values, uint32 or, for a modulus of 16 bits, uint16; it is masked in
                place.

        Raises:
            SecAggError: the session must not go on, or is over already. Nothing was given away.
            WireError: no message of this step.
            FarfieldError: whatever `expected` raises.
        """
        record, self._record = self._record, None
        if record is None:
            raise SecAggError(
                f"{self._owner.name!r} has answered this {self.step.value} step, or given the session up",
                hint="Each step is answered once; open a new session.",
            )
        after, answer = record.answer(self._owner, common, own, vector)
        return (None if after is None else State(after, self._owner)), answer


def begin(name: str, identity: Ed25519PrivateKey, terms: Terms, expected: Callable[[Open], None]) -> State:
    """A client that waits for a session to be opened.

    Args:
        identity: the node's signing key.
        expected: raises when an Open is not about the Plan, model, ranges and noise that this client knows.
    """
    return State(Joining(), Owner(name, identity, terms, expected))


def dump(state: State) -> bytes:
    """The state, secrets in clear, for `restore` in another process of a simulation. The state is used up."""
    record, state._record = state._record, None
    if record is None:
        raise SecAggError("this state was used before")
    values = {
        field.name: {name: one.hex() for name, one in value.items()} if isinstance(value, Mapping) else value.hex()
        for field in fields(record)
        for value in (getattr(record, field.name),)
    }
    return json.dumps([type(record).__name__, values]).encode()


def restore(
    raw: bytes, name: str, identity: Ed25519PrivateKey, terms: Terms, expected: Callable[[Open], None]
) -> State:
    """The state that was dumped, of the client that the arguments describe as those of `begin` do."""
    kind, values = json.loads(raw)
    record = _STATES[kind](
        **{
            field: {key: bytes.fromhex(one) for key, one in value.items()}
            if isinstance(value, dict)
            else bytes.fromhex(value)
            for field, value in values.items()
        }
    )
    return State(record, Owner(name, identity, terms, expected))
