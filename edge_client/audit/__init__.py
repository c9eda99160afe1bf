"""Attacks on one's own federation: what an attacker learns from what a Plan lets out, measured.

One attack, one registration. Attacks are made where data is, on this machine, and know nothing of who asked:
`coordinator audit` gives them a whole simulated federation, `edge-client audit` one client's own update.

protocol.py    does what protects updates hold?   with staged, lies, forgeries, trial
mechanism.py   is the noise what it should be?    with noisy
inversion.py   words from updates                 with inversion_texts, _trials, _scores, _words
canaries.py    was this record in the run?        with canary_records, _clients, _bounds, _results, _words
exposure.py    is a secret given away?            with planted_secrets, exposure_results, _words
membership.py  was this example trained on?       with candidates, shadows, losses, membership_scores, _results, _words
backdoor.py    a trigger by one client            with poison
emulator.py    what an emulator gives away

And what they stand on:

attack.py      what an attack is, and the registry
subject.py     what is attacked: a Plan, its clients, federations of them; alone.py where there is nobody else
trained_on.py  how often planted records were trained on
notes.py       what was found so far
conduct.py     one audit from the first attack to the last
folder.py      its folder, its key, its report
console.py     what it prints
"""

from __future__ import annotations

import importlib
import pkgutil

from .attack import Attack, register, registered
from .subject import Act, Course, Federation, Member, Owner, Planted, Planting, Subject

__all__ = [
    "Act",
    "Attack",
    "Course",
    "Federation",
    "Member",
    "Owner",
    "Planted",
    "Planting",
    "Subject",
    "register",
    "registered",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
