"""How the clients' copies of a method become one: what travels, when, and whether the mean means what it seems to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .method import TuningMethod


@dataclass(frozen=True, slots=True)
class Sharing:
    """What a federation must know of a method before it averages.

    Patterns are searched for in the names of trained parameters.

    Attributes:
        exact: what the method adds to the model (a change of its weights, or virtual tokens) is linear in what is
            trained in one round. So the mean of the clients' parameters makes the mean of what they added, from the
            sum of their updates alone; and noise on that sum reaches the model as it is, not multiplied with itself.
        local: parameters that each client keeps at home; no client and no coordinator ever gets another's.
        resting: patterns that take turns, round by round; what the round's one matches is not trained in it.
    """

    exact: bool
    local: str | None = None
    resting: tuple[str, ...] = ()

    def is_local(self, name: str) -> bool:
        """Whether the trained parameter `name` stays with its client."""
        return self.local is not None and re.search(self.local, name) is not None

    def trained_in(self, name: str, number: int) -> bool:
        """Whether the trained parameter `name` is trained in round `number`, from 1; else it rests."""
        if not self.resting:
            return True
        return re.search(self.resting[(number - 1) % len(self.resting)], name) is None


def advice(method: TuningMethod) -> str | None:
    """What to say to whoever averages with a method whose mean is not exact, in one sentence or two; None if it is."""
    if method.sharing.exact:
        return None
    return (
        f"the mean is not exact: {method.kind!r} multiplies what it trains, the product of the clients' means is not "
        "the mean of their products, and noise added for privacy is multiplied too. Exact are 'lora' with "
        "freeze_a = true or alternate = true, and 'fed-sb'."
    )
