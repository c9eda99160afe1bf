"""The attack `inversion`: what it names of texts, where there is something to be named, and where there is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import audits
import numpy as np
import pytest

from farfield.edge_client.audit import Subject, registered
from farfield.edge_client.audit.inversion_scores import Presence, at_half, interval, precision, rouge
from farfield.edge_client.audit.inversion_texts import begun, public
from farfield.edge_client.audit.inversion_trials import Reader, in_order, swept, warmed
from farfield.edge_client.data import TokenExample
from farfield.protocols.audit.finding import Finding


def made(folder: Path, **sections: dict[str, Any]) -> tuple[Subject, Finding]:
    subject = audits.subject(folder, 4, 12, 1, **sections)
    return subject, registered()["inversion"].run(subject)


def test_rouge_counts_words_pairs_and_order() -> None:
    assert rouge([1, 2, 3, 4], [1, 2, 3, 4]) == (1, 1, 1)
    assert rouge([4, 3, 2, 1], [1, 2, 3, 4]) == (1, 0, 0.25)
    assert rouge([1, 2, 9], [1, 2, 3, 4]) == pytest.approx((4 / 7, 2 / 5, 4 / 7))
    assert rouge([], [1, 2]) == (0, 0, 0)


def test_precision_and_recall_of_tokens() -> None:
    present = np.array([1.0, 0, 1, 0, 0])
    assert precision(np.array([3.0, 1, 2, 0, 0]), present) == 1
    assert precision(np.array([0.0, 3, 2, 1, 0]), present) == 0.5
    assert at_half(np.array([0.9, 0.8, 0.1, 0.1, 0.1]), present) == (0.5, 0.5)
    assert at_half(np.zeros(5), present) == (None, 0)
    assert interval([1.0]) is None
    band = interval([0.4, 0.6, 0.5])
    assert band is not None and band.low is not None and band.high is not None
    assert band.low < 0.5 < band.high


def test_weights_go_to_the_clue_that_tells() -> None:
    drawn = np.random.default_rng(1)
    present = (drawn.random(500) < 0.2).astype(float)
    clues = np.stack([present * 2 + drawn.normal(size=500), drawn.normal(size=500)], axis=1)
    learnt = Presence.learnt([clues], [present])
    assert learnt.weights[0] > 1
    assert abs(learnt.weights[1]) < 0.3 * learnt.weights[0]
    assert precision(learnt.chances(clues), present) > precision(clues[:, 1], present) + 0.3


def test_a_text_is_cut_where_the_tokens_are_as_many_as_asked(tmp_path: Path) -> None:
    subject = audits.subject(tmp_path)
    examples = next(iter(subject.clients.values()))().train
    text = begun(examples, 12, 3)
    assert text is not None
    assert len(text.tokens) in (12, 13)
    assert text == begun(examples, 12, 3)
    assert begun(examples, 10_000, 3) is None


def test_a_bare_gradient_gives_short_texts_away_in_their_order(tmp_path: Path) -> None:
    subject = audits.subject(tmp_path, tuning={"kind": "lora", "rank": 8})
    text = public(subject)
    reader = Reader.at(subject, text, warmed(subject, text))
    rows = swept(reader, 12)
    assert np.mean([row["precision"] for row in rows]) > 0.8 > 3 * np.mean([row["chance"] for row in rows])
    order = in_order(reader, 8)
    assert {row["means"] for row in order} == {"span"}
    assert np.mean([row["rouge_l"] for row in order]) > 0.7


def test_it_finds_what_an_unprotected_update_holds(tmp_path: Path) -> None:
    once = {"rounds": 2, "steps": 1, "batch_size": 1, "learning_rate": 1.0, "optimizer": "sgd"}
    subject, found = made(
        tmp_path,
        tuning={"kind": "lora", "rank": 8},
        training=once,
        protection={"kind": "sealed"},
    )
    assert found.verdict == "leak", found.found
    headline = found.figures[0]
    assert headline.headline and headline.value is not None and headline.chance is not None
    assert headline.value > headline.chance
    assert {plot.title for plot in found.plots} >= {"Tokens from one bare gradient"}
    # Counts and shares only: nothing that was in a text.
    words = json.dumps(found.model_dump(mode="json"))
    assert "stars" not in words and "moon" not in words
    again = registered()["inversion"].run(subject)
    assert again.data == found.data


@pytest.mark.usefixtures("repeatable_noise")
def test_it_is_at_chance_and_says_so_where_noise_drowns_everything(tmp_path: Path) -> None:
    privacy = {"kind": "example", "noise_multiplier": 1e4, "sampling_rate": 0.5, "clipping_norm": 1e-3}
    _, found = made(
        tmp_path,
        tuning={"kind": "lora", "rank": 8},
        data={"packing": False, "truncate": True},
        privacy=privacy,
        protection={"kind": "sealed"},
    )
    assert found.verdict == "no leak found"
    assert any("not beyond chance" in sentence for sentence in found.found)
    assert found.figures[0].chance is not None


def test_a_sum_of_clients_is_attacked_where_sums_are_all_that_is_seen(tmp_path: Path) -> None:
    _, found = made(tmp_path, protection={"kind": "secagg"})
    assert any("sums of up to 4 clients" in sentence for sentence in found.tried)
    assert {plot.title for plot in found.plots} <= {
        "Tokens from one bare gradient",
        "Tokens from a sum of bare gradients",
        "Tokens by the rank of the method",
    }


def test_a_client_can_attack_its_own_update(tmp_path: Path) -> None:
    whole = audits.subject(tmp_path)
    name = sorted(whole.clients)[0]
    alone = Subject(
        plan=whole.plan,
        folder=whole.folder,
        bench=whole.bench,
        initial=whole.initial,
        seed=1,
        clients={name: whole.clients[name]},
        prepare=whole.prepare,
        federation=None,
        notes=whole.notes.within("alone"),
        say=audits.quiet,
    )
    found = registered()["inversion"].run(alone)
    assert any("your own whole update" in sentence for sentence in found.tried)
    assert found.figures


def test_a_method_without_a_side_that_tells_is_matched(tmp_path: Path) -> None:
    subject, found = made(tmp_path, tuning={"kind": "prompt-tuning", "rank": None, "tokens": 4})
    assert subject.notes.values("inversion/single", dict)["clues"] == []
    assert any("no side that tells" in sentence for sentence in found.tried)
    assert found.verdict == "no leak found"
    assert any("blind" in sentence for sentence in found.found)


def test_classifiers_are_left_out(tmp_path: Path) -> None:
    subject = audits.subject(tmp_path)
    attack = registered()["inversion"]
    assert attack.unfit(subject) is None
    model = subject.plan.model.model_copy(update={"task": "sequence-classification", "labels": 2})
    other = replace(subject, plan=subject.plan.model_copy(update={"model": model}))
    assert "classes" in (attack.unfit(other) or "")


@pytest.mark.slow
def test_of_64_tokens_at_rank_16_nearly_all_are_named_on_the_builtin_backbone(tmp_path: Path) -> None:
    from farfield.coordinator import plans
    from farfield.coordinator.simulation import sources
    from farfield.edge_client import data, records
    from farfield.edge_client.audit.notes import Notes
    from farfield.emulator import backbone
    from farfield.emulator.bench import Bench

    file = tmp_path / "plan.toml"
    example = Path(__file__).parents[2] / "examples" / "quickstart.toml"
    file.write_text(example.read_text().replace("rank = 8", "rank = 16").replace("alpha = 16", "alpha = 32"))
    plan = plans.load(file)
    folder = backbone.resolve(plan.model.backbone, tmp_path)
    bench = Bench(plan, folder)
    own = {one.name: one.texts for one in sources(8, None)}

    def prepare(name: str, planted: object = ()) -> data.ClientData:
        found = [records.Text(text) for text in own[name]]
        return data.prepare(found, bench.tokenizer, plan.data, plan.model.task, 1, name)

    clients = {name: (lambda name=name: prepare(name)) for name in own}
    subject = Subject(
        plan, folder, bench, bench.adapter(), 1, clients, prepare, None, Notes(tmp_path / "notes"), audits.quiet
    )
    text = public(subject)
    reader = Reader.at(subject, text, warmed(subject, text))
    rows = swept(reader, 64, victims=8)
    assert np.mean([row["precision"] for row in rows]) >= 0.95
    assert all(isinstance(one, TokenExample) for one in text.windows)
