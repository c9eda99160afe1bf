"""Every error that Farfield raises for a cause outside its own code.

    FarfieldError
    ├── PlanError            the Plan, or a Plan that does not fit the run
    ├── BackboneError        a model folder that cannot be used
    ├── TuningError          a tuning method that does not fit the model
    ├── EmulatorError        an emulator that cannot be made, or does not fit its Plan or its backbone
    ├── DataError            a client's data
    ├── RunError             a run folder: missing, of another Plan, or on a full disk
    ├── AuditError           an audit that cannot be made or gone on with, or a report that does not hold
    ├── HomeError            the folder of a coordinator or an edge client, or the settings in it
    ├── DeviceError          the memory of this machine, which is too small for what is asked
    ├── StorageError         the coordinator's database, or a name that it does not know
    ├── ServiceError         a service that cannot start, or that refuses
    │   └── Unreachable          one that does not answer now; worth another try
    ├── BundleError          a bundle that cannot be made, fetched or verified
    ├── TrustError           a certificate, signature or seal that does not hold
    │   └── EnrolmentError       a token or a node that is not admitted
    ├── ConsentError         what the owner of the data does not allow
    ├── PrivacyError         a privacy budget that would be exceeded, or a ledger that is damaged
    └── WireError            bytes from outside
        ├── MalformedMessage     not a message, or one that contradicts itself
        ├── MessageTooLarge      over a limit; raised before anything of that size is allocated
        ├── SecAggError          a secure aggregation that must not go on
        └── UnknownVersion       a newer or older peer

A message says what was wrong, where, what was expected and what to do. The command line prints it as it is and exits
with status 2; everything else that escapes is a defect of Farfield.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FarfieldError(Exception):
    """Something that the user, a peer or the machine has to put right.

    Args:
        what: what is wrong, as a clause: "the folder holds pickle weights only".
        where: the file, key, line, node or round it was found in.
        hint: what was expected, or what to do about it, as a sentence.
    """

    def __init__(self, what: str, *, where: object = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, str(where), hint
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}. {self.hint}" if self.hint else text


class PlanError(FarfieldError):
    """The Plan, or a Plan that does not fit the run."""


class BackboneError(FarfieldError):
    """A model folder that cannot be used."""


class TuningError(FarfieldError):
    """A tuning method that does not fit the model."""


class EmulatorError(FarfieldError):
    """An emulator cannot be made, or does not fit its Plan or its backbone."""


class DataError(FarfieldError):
    """A client's data is missing, empty or malformed."""


class RunError(FarfieldError):
    """A run folder is missing, belongs to another Plan, or lies on a full disk."""


class AuditError(FarfieldError):
    """An audit that cannot be made or gone on with, or a report that cannot be read or does not hold."""


class HomeError(FarfieldError):
    """The folder of a coordinator or an edge client is missing, unsafe, or has settings that are wrong."""


class DeviceError(FarfieldError):
    """This machine, or what is allowed of it, is too small for what is asked."""


class StorageError(FarfieldError):
    """The coordinator's database cannot be used, or does not know the name that was given."""


class ServiceError(FarfieldError):
    """A service cannot start, or refuses what it is asked."""


class Unreachable(ServiceError):
    """A service does not answer now; it is worth another try."""


class BundleError(FarfieldError):
    """A bundle cannot be made, fetched or verified."""


class TrustError(FarfieldError):
    """A certificate, signature or seal does not hold."""


class EnrolmentError(TrustError):
    """A token or a node is not admitted."""


class ConsentError(FarfieldError):
    """The owner of the data does not allow what is asked."""


class PrivacyError(FarfieldError):
    """A privacy budget would be exceeded, or a ledger is damaged."""


class WireError(FarfieldError):
    """Bytes from outside that are not what they should be."""


class MalformedMessage(WireError):
    """Bytes that are no message, or a message that contradicts itself."""


class MessageTooLarge(WireError):
    """A message or a part of one is over a limit."""


class SecAggError(WireError):
    """A secure aggregation must not go on: a message from elsewhere, a peer that cheats, or too few peers."""


class UnknownVersion(WireError):
    """The peer speaks another version of the wire format."""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """ "Did you mean 'rank'?", or the known names when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(names)}."
