"""What a run spends of its population's privacy, in the ledger of whoever conducts it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from farfield.protocols.errors import PrivacyError
from farfield.protocols.plan import Plan
from farfield.protocols.privacy.accounting import Spent
from farfield.protocols.privacy.ledger import Budget, Entry, Ledger
from farfield.protocols.privacy.mechanism import ExampleMechanism, mechanism
from farfield.protocols.turns import turn

LEDGER: Final = "ledger.jsonl"
"""The ledger's name in a coordinator's home, and in the folder of a simulated run."""


class RunAccounts:
    """One run's account in a ledger. Made only for Plans that promise privacy."""

    def __init__(
        self, plan: Plan, run: str, ledger: Ledger, budget: Budget | None, clock: Callable[[], datetime]
    ) -> None:
        self._plan, self._run, self._ledger, self._budget, self._clock = plan, run, ledger, budget, clock
        made = mechanism(plan)
        if made is None:
            raise PrivacyError("this Plan promises no privacy, so there is nothing to account for")
        self._mechanism = made

    def begin(self, done: int) -> Spent | None:
        """What will have been spent when the rounds after `done` are done too; None where nothing limits it.

        Raises:
            PrivacyError: that is more than the budget, so the run must not begin.
        """
        if self._budget is None:
            return None
        self._ledger.refresh()
        # Of the clients who take turns, those have most rounds before them who have the first of what is left.
        left = range(done + 1, self._plan.training.rounds + 1)
        rounds = max(Counter(turn(self._plan, number) for number in left).values(), default=0)
        return self._ledger.forecast(self._plan.privacy.population, self._mechanism, rounds, self._budget)

    def spend(self, number: int) -> None:
        """Write down what round `number` spends; it is on the disk when this returns.

        Raises:
            PrivacyError: the budget does not allow it, or the ledger is damaged; nothing was spent.
        """
        by_whom = "the clients" if self._adds_no_noise else "the coordinator"
        self._ledger.spend(
            Entry(
                time=self._clock().isoformat(timespec="seconds"),
                population=self._plan.privacy.population,
                run=self._run,
                round=number,
                plan=self._plan.digest,
                mechanism=self._mechanism,
                note=f"noise added by {by_whom}",
                turn=turn(self._plan, number),
            ),
            self._budget,
        )

    @property
    def _adds_no_noise(self) -> bool:
        return isinstance(self._mechanism, ExampleMechanism) or self._mechanism.noise == "distributed"


def accounts(plan: Plan, run: str, folder: Path, budget: Budget | None = None) -> RunAccounts | None:
    """The account of a run in the ledger of `folder`; None where the Plan promises no privacy.

    Raises:
        PrivacyError: the ledger is damaged.
    """
    if plan.privacy.kind == "none":
        return None
    return RunAccounts(plan, run, Ledger(folder / LEDGER), budget, lambda: datetime.now(UTC))
