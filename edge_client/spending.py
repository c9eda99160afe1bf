"""What runs have spent of the privacy of this machine's data: its own ledger, and the limit that its owner set.

A coordinator keeps a ledger, too, but its word is not needed here: ε follows from the Plan, and is computed again. All
runs count together whatever population their Plans name, for the data are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from farfield.protocols.errors import ConsentError, PrivacyError
from farfield.protocols.plan import Plan
from farfield.protocols.privacy.ledger import Budget, Entry, Ledger
from farfield.protocols.privacy.mechanism import Mechanism, mechanism

from .consent import Consent

OWN: Final = "own"
"""The one population of the ledger."""


class Spending:
    """One edge client's ledger, opened when the first run that promises privacy comes."""

    def __init__(self, path: Path, consent: Consent) -> None:
        self._path = path
        self._budget = None if consent.max_epsilon is None else Budget(consent.max_epsilon, consent.delta)
        self._ledger: Ledger | None = None

    def check(self, plan: Plan, run: str, rounds: Iterable[int]) -> None:
        """Return if the owner's limit has room for those of the `rounds` of `run` that were not written down yet.

        Raises:
            ConsentError: it has not; nothing is spent.
            PrivacyError: the ledger is damaged.
        """
        made = mechanism(plan)
        if made is None or self._budget is None:
            return
        ledger = self._opened()
        paid = {entry.round for entry in ledger.entries if (entry.run, entry.plan) == (run, plan.digest)}
        self._afford(ledger, made, len(set(rounds) - paid), self._budget)

    def spend(self, plan: Plan, run: str, number: int) -> None:
        """Write down what round `number` spends; it is on the disk when this returns, and only then may it be sent.

        Raises:
            ConsentError: the owner's limit does not allow it; nothing is spent.
            PrivacyError: the ledger is damaged, or cannot be written.
        """
        made = mechanism(plan)
        if made is None:
            return
        ledger = self._opened()
        if self._budget is not None:
            self._afford(ledger, made, 1, self._budget)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        note = f"population {plan.privacy.population}"
        ledger.spend(Entry(now, OWN, run, number, plan.digest, made, note), self._budget)

    @staticmethod
    def _afford(ledger: Ledger, made: Mechanism, rounds: int, budget: Budget) -> None:
        try:
            ledger.forecast(OWN, made, rounds, budget)
        except PrivacyError as error:
            where = f"consent.max_epsilon = {budget.epsilon:g}"
            raise ConsentError(f"on this machine's data {error.what}", where=where) from None

    def _opened(self) -> Ledger:
        if self._ledger is None:
            self._ledger = Ledger(self._path)
        self._ledger.refresh()
        return self._ledger
