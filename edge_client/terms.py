"""The owner's terms for a secure aggregation: how many have to take part, and who may."""

from __future__ import annotations

from datetime import datetime

from farfield.protocols.errors import ConsentError
from farfield.protocols.roster import open_roster
from farfield.protocols.secagg import Terms

from .consent import Consent


def terms(consent: Consent, roster: bytes, now: datetime) -> Terms:
    """What `consent` asks of an aggregation in a run whose charter carries `roster`.

    Args:
        roster: empty where the charter has none. It counts only where the owner named a consortium's key.
        now: with a time zone, by the owner's own clock: the coordinator's could keep a roster from expiring.

    Raises:
        ConsentError: the owner asks for a roster, and there is none.
        TrustError: the roster is not one of that consortium's, or has expired.
    """
    peers = None
    if consent.roster_key:
        if not roster:
            raise ConsentError(
                "the run comes without a consortium's roster, and the owner of this data asks for one",
                where=f"consent.roster_key = {consent.roster_key!r}",
                hint="The coordinator installs one with `coordinator roster install`.",
            )
        peers = open_roster(roster, bytes.fromhex(consent.roster_key), now).members
    return Terms(consent.min_cohort, consent.min_sum, peers)
