"""The trials of the attack `inversion`: updates of texts that are known, read, and held against what was in them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from farfield.edge_client.data import TokenExample
from farfield.emulator.bench import Bench
from farfield.emulator.inversion import Inversion, mean
from farfield.emulator.matching import matched
from farfield.emulator.prefixes import sequence
from farfield.protocols.plan import Plan
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import State

from .inversion_scores import Presence, Values, at_half, precision, rouge
from .inversion_texts import Public, Text, begun, opening, some
from .subject import Subject

Row = dict[str, Any]
"""What came of some victims: JSON-ready values, counts and shares only."""

KNOWN: Final = 2
"""Public texts that the attacker trains on to learn from, at each setting."""

VICTIMS: Final = 4

OWN: Final = 3
"""Clients whose own updates are attacked in a round."""

NULLS: Final = 19
"""Updates in random order and with random signs: with one real one among them, being the best has probability 1/20."""

TRIES: Final = 40
"""Texts of which the gradient is compared, where an update does not show its tokens by itself."""


def one_step(plan: Plan) -> Mapping[str, Mapping[str, Any]]:
    """Sections that make a Plan one bare gradient: one step of SGD on all examples at once, and no protection."""
    nothing = {"target_epsilon": None, "noise_multiplier": None, "sampling_rate": None, "participations": None}
    # No Plan goes without a bound where sums are masked, so it is one that nothing reaches.
    free = {"momentum": 0.0, "weight_decay": 0.0, "proximal_mu": 0.0, "max_grad_norm": 1e9}
    once = {"steps": 1, "epochs": None, "schedule": "constant", "warmup_steps": 0}
    # In parts of 8, whose gradients are added up: a thousand tokens' activations at once are gigabytes.
    plain = {"optimizer": "sgd", "learning_rate": 1.0, "batch_size": 8, "gradient_accumulation": 512}
    return {
        "training": {**free, **once, **plain},
        "privacy": {"kind": "none", "noise": "central", "clipping": "fixed", **nothing},
    }


@dataclass(frozen=True)
class Reader:
    """An attacker who knows the model, the adapter that training began with, and public text.

    Attributes:
        subject: at the bench of the model that is attacked.
        start: the adapter.
    """

    subject: Subject
    public: Public
    start: State
    inversion: Inversion

    @classmethod
    def at(cls, subject: Subject, public: Public, start: State) -> Reader:
        subject.bench.load(subject.bench.part(start))
        return cls(subject, public, start, Inversion(subject.bench.tuned, subject.plan.data.max_length))

    def gradient(self, text: Text) -> State:
        """One bare gradient of it."""
        plan = self.subject.variant(**one_step(self.subject.plan))
        return dict(self.subject.update(text.examples, self.start, plan=plan).update)

    def planned(self, text: Text) -> State:
        """What a client that has nothing else would send, trained and protected as the Plan says."""
        return dict(self.subject.update(text.examples, self.start, client="public").update)

    def clues(self, update: State) -> Values:
        """float64[vocabulary, 3]: of tokens read, of tokens predicted, and how common they are in public text."""
        nothing = np.zeros(self.inversion.vocabulary)
        read = self.inversion.read(update)
        found = [read[clue].numpy() if clue in read else nothing for clue in ("read", "predicted")]
        common = self.public.frequency
        return np.stack([*found, (common - common.mean()) / max(float(common.std()), 1e-12)], axis=1)

    def learnt(self, updates: Sequence[State], texts: Sequence[Text]) -> Presence:
        """What tells a token, from public texts and their updates."""
        present = [one.present(self.inversion.vocabulary) for one in texts]
        return Presence.learnt([self.clues(one) for one in updates], present)

    def judged(self, presence: Presence, update: State, tokens: frozenset[int]) -> Row:
        """What the attack gets right of one update, and what guessing the commonest tokens does."""
        present = Text((), tokens).present(self.inversion.vocabulary)
        chances = presence.chances(self.clues(update))
        sure, recall = at_half(chances, present)
        return {
            "distinct": len(tokens),
            "span": self.inversion.span(update),
            "clues": sorted(self.inversion.read(update)),
            "precision": precision(chances, present),
            "chance": precision(self.public.frequency, present),
            "precision_at_half": sure,
            "recall_at_half": recall,
        }

    def words(self, distinct: int, number: int) -> Text | None:
        """A public text of so many distinct tokens."""
        seed = derive(self.subject.seed, "inversion", "public", distinct, number)
        return begun(self.public.windows, distinct, seed)


def swept(
    reader: Reader,
    distinct: int,
    clients: int = 1,
    victims: int = VICTIMS,
    update: Callable[[Text], State] | None = None,
) -> list[Row]:
    """One bare gradient of texts with so many distinct tokens; or the mean of as many as there are `clients`.

    Args:
        update: what is attacked in the place of a bare gradient.

    Empty where no client, or public text, has so many.
    """
    subject = reader.subject
    known = [[reader.words(distinct, number * clients + one) for one in range(clients)] for number in range(KNOWN)]
    names = sorted(subject.clients)
    chosen = []
    for number in range(victims):
        seed = derive(subject.seed, "inversion", "victim", distinct, number)
        group = [names[(number + one) % len(names)] for one in range(clients)]
        chosen.append([begun(subject.clients[name]().train, distinct, derive(seed, name)) for name in group])
    groups = [[text for text in group if text is not None] for group in (*known, *chosen)]
    if any(len(group) < clients for group in groups):
        return []
    make = update or reader.gradient
    made = [(mean([make(text) for text in group]), _joined(group)) for group in groups]
    learnt = reader.learnt(*zip(*made[:KNOWN], strict=True))
    return [reader.judged(learnt, update, text.tokens) for update, text in made[KNOWN:]]


def _joined(texts: Sequence[Text]) -> Text:
    return Text.of([example for one in texts for example in one.examples])


def at_rank(subject: Subject, public: Public, rank: int, distinct: int) -> list[Row]:
    """`swept` with the method at another rank, begun with an adapter that public text has taken some steps."""
    keys: dict[str, Any] = {"rank": rank}
    if getattr(subject.plan.tuning, "alpha", None) is not None:
        keys["alpha"] = 2 * rank
    plan = subject.variant(tuning=keys)
    bench = Bench(plan, subject.folder)
    other = replace(subject, plan=plan, bench=bench, initial=bench.adapter())
    return swept(Reader.at(other, public, warmed(other, public)), distinct)


def warmed(subject: Subject, public: Public) -> State:
    """The initial adapter after five steps of the Plan's optimiser on public text, unprotected."""
    steps = {"steps": 5, "epochs": None, "batch_size": min(4, subject.plan.training.batch_size)}
    plan = subject.variant(training=steps, privacy=one_step(subject.plan)["privacy"])
    windows = list(some(public.windows, 20, derive(subject.seed, "inversion", "warm")))
    update = subject.update(windows, subject.initial, plan=plan).update
    return {name: value + update[name] for name, value in subject.initial.items()}


def in_order(reader: Reader, length: int) -> list[Row]:
    """One bare gradient of single texts of so many tokens: how much of them, and of their order, is found.

    By the span checks of the first two blocks; where the update gives no clue, by matching it.
    """
    subject, rows = reader.subject, list[Row]()
    subject.say("recovering short texts in their order", 0, VICTIMS)
    for number, name in enumerate(sorted(subject.clients)[:VICTIMS]):
        seed = derive(subject.seed, "inversion", "order", name)
        example = opening(subject.clients[name]().train, length, seed)
        if example is None:
            continue
        truth, update = list(example.input_ids), reader.gradient(Text.of([example]))
        common = [int(token) for token in np.argsort(-reader.public.frequency, kind="stable")]
        guess = _ordered(reader, update, length)
        means = "span"
        if not guess and not reader.inversion.read(update):
            means = "matching"

            def answer(tokens: list[int]) -> State:
                ids = array("i", tokens)
                return reader.gradient(Text.of([TokenExample(ids, ids)]))

            guess, _ = matched(update, answer, common[:length], common, TRIES, seed)
        row = {"length": length, "means": means, "span": reader.inversion.span(update)}
        for name_, value in zip(("rouge_1", "rouge_2", "rouge_l"), rouge(guess, truth), strict=True):
            row[name_] = value
        row["chance"] = rouge(common[: len(set(truth))], truth)[0]
        rows.append(row)
        subject.say("recovering short texts in their order", number + 1, VICTIMS)
    return rows


def _ordered(reader: Reader, update: State, length: int) -> list[int]:
    read, span = reader.inversion.read(update), reader.inversion.span(update)
    if "read" not in read or not span:
        return []
    tokens = read["read"].topk(min(span, reader.inversion.vocabulary)).indices.tolist()
    reader.subject.bench.load(reader.subject.bench.part(reader.start))
    return sequence(reader.subject.bench.tuned, update, tokens, 2 * length)


@dataclass(frozen=True, slots=True)
class Seen:
    """An update as the attacker of this Plan sees it, and what it was made of.

    Attributes:
        members: how many clients' updates are in it.
    """

    start: int
    update: Callable[[], State | None]
    tokens: frozenset[int]
    members: int


def seen(subject: Subject) -> list[Seen]:
    """The updates that are attacked as the Plan lets them out: sums where it hides their parts, else single ones."""
    course = subject.course
    rounds = sorted({1, course.rounds})
    if subject.federation is not None and subject.plan.protection.kind != "secagg":
        names = sorted(subject.clients)[:OWN]
        found = []
        for number in rounds:
            for name in names:
                train = subject.members[name].data().train
                made = _own(subject, name, number)
                found.append(Seen(number - 1, made, Text.of(train).tokens, 1))
        return found
    return [
        Seen(number - 1, lambda number=number: course.aggregate(number), _tokens(subject, number), len(members))  # type: ignore[misc]
        for number in rounds
        if (members := course.members(number))
    ]


def _own(subject: Subject, name: str, number: int) -> Callable[[], State]:
    def make() -> State:
        train, start = subject.members[name].data().train, subject.course.adapter(number - 1)
        return dict(subject.update(train, start, client=name).update)

    return lambda: subject.notes.state(f"inversion/own-{number}-{name}", make)


def _tokens(subject: Subject, number: int) -> frozenset[int]:
    found: set[int] = set()
    for name in subject.course.members(number):
        found |= Text.of(subject.members[name].data().train).tokens
    return frozenset(found)


def as_planned(subject: Subject, public: Public, found: Sequence[Seen]) -> list[Row]:
    """What the attack gets out of the updates as the Plan lets them out, and out of ones that hold nothing.

    The attacker has learnt from public texts that it has trained on as the Plan does, as long as its clients' are.
    """
    rows: list[Row] = []
    for start in sorted({one.start for one in found}):
        here = [(one, update) for one in found if one.start == start and (update := one.update()) is not None]
        if not here:
            continue
        reader = Reader.at(subject, public, subject.course.adapter(start))
        # Where nothing tells, guesses go by how common tokens are, and neither training nor scrambling changes them.
        telling = any(reader.inversion.read(update) for _, update in here)
        presence = _learnt_as_planned(reader, start, here[0][0].members, None if telling else here[0][1])
        for number, (one, update) in enumerate(here):
            subject.say("attacking updates as the Plan lets them out", number, len(here))
            row = reader.judged(presence, update, one.tokens)
            present = Text((), one.tokens).present(reader.inversion.vocabulary)
            seeds = [derive(subject.seed, "inversion", "null", one.start, number, null) for null in range(NULLS)]
            nulls = [precision(presence.chances(reader.clues(_scrambled(update, seed))), present) for seed in seeds]
            rows.append({**row, "round": start + 1, "members": one.members, "nulls": nulls})
    return rows


def _learnt_as_planned(reader: Reader, start: int, members: int, update: State | None) -> Presence:
    """From public texts, trained on as the Plan says; or with this `update` in the place of all of theirs."""
    subject, count = reader.subject, min(members, 2)
    sizes = [len(subject.clients[name]().train) for name in sorted(subject.clients)]
    size = sorted(sizes)[len(sizes) // 2]
    updates, texts = list[State](), list[Text]()
    for number in range(KNOWN):
        parts, made = list[Text](), list[State]()
        for one in range(count):
            seed = derive(subject.seed, "inversion", "planned", start, number, one)
            part = Text.of(list(some(reader.public.windows, size, seed)))
            parts.append(part)
            if update is not None:
                made.append(update)
                continue
            subject.say("training on public text as the Plan does", number * count + one, KNOWN * count)
            name = f"inversion/public-{start}-{number}-{one}"
            made.append(subject.notes.state(name, lambda part=part: reader.planned(part)))  # type: ignore[misc]
        updates.append(mean(made))
        texts.append(_joined(parts))
    return reader.learnt(updates, texts)


def _scrambled(update: State, seed: int) -> State:
    """The same values in random places and with random signs: an update that holds nothing."""
    drawn = np.random.default_rng(seed)
    mixed = {}
    for name in sorted(update):
        values = drawn.permutation(update[name].reshape(-1)) * drawn.choice(
            np.array([-1, 1], np.float32), update[name].size
        )
        mixed[name] = values.reshape(update[name].shape).astype(np.float32)
    return mixed
