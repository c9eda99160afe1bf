"""What the resident process last did, as it stands in `state.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class State:
    """What the resident process last did, for `edge-client status`.

    Attributes:
        pid, instance: the process, and the random name it attends under.
        since: when `connected` became what it is.
        run, round, activity: what it works on; run and round are None when it waits.
        last_error: the last thing that went wrong, for a person.
        fleet_id: by which the SuperLink knows the last connection, if there was one.
    """

    pid: int
    instance: str
    connected: bool
    since: datetime
    run: str | None
    round: int | None
    activity: str
    last_error: str | None
    updated: datetime
    fleet_id: int | None = None

    def document(self) -> dict[str, Any]:
        """As values of JSON."""
        return asdict(self) | {"since": self.since.isoformat(), "updated": self.updated.isoformat()}

    @classmethod
    def parse(cls, text: str) -> Self:
        """The state whose `document` stands in `text`. Raises ValueError, TypeError or KeyError."""
        found = json.loads(text)
        times = {name: datetime.fromisoformat(found[name]) for name in ("since", "updated")}
        return cls(**{one.name: times.get(one.name, found[one.name]) for one in fields(cls)})
