"""How often planted records were trained on in the audited run: what was never seen cannot have leaked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from farfield.edge_client.data import encode
from farfield.edge_client.records import Record

from .candidates import visits
from .subject import Subject


def rounds_of(subject: Subject, client: str) -> list[int]:
    """The numbers of the rounds of the audited run that the client's updates are in."""
    course = subject.course
    return [number for number in range(1, course.rounds + 1) if client in course.members(number)]


def times_trained(subject: Subject, client: str, records: Sequence[Record]) -> list[float]:
    """How often the client has trained on each record, all its copies together; half of one counts as half a time.

    With DP-SGD it is how often it is to be expected (`candidates.visits`). A record that was not planted has 0, unless
    the client's own data hold it word for word.
    """
    settings, task = subject.plan.data, subject.plan.model.task
    train = subject.members[client].data().train
    each = visits(subject.plan, client, len(train), rounds_of(subject, client))
    stream = np.concatenate([np.asarray(example.input_ids) for example in train])
    seen = np.repeat(each, [len(example.input_ids) for example in train])
    found = []
    for record in records:
        whole = encode(record, subject.bench.tokenizer, settings, task, "planted").input_ids
        ids = np.asarray(whole if settings.packing else whole[: settings.max_length])
        if len(ids) > len(stream):
            found.append(0.0)
            continue
        begins = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(stream, len(ids)) == ids).all(axis=1))
        found.append(float(sum(seen[at : at + len(ids)].mean() for at in begins)))
    return found
