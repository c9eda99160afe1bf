"""The search under a budget: sizes are known before anything is made, and what gives the middle away comes last."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from farfield.emulator import search as searching
from farfield.emulator.architecture import describe
from farfield.emulator.assemble import assemble
from farfield.emulator.compress import SELECTIONS, tuned_gradient
from farfield.emulator.layout import Layout
from farfield.emulator.search import Candidate, Choice, Material, compressed, fidelity, finished, middle_bytes, search
from farfield.emulator.split import Split
from farfield.protocols.errors import EmulatorError


def material(family: str = "llama", dtype: torch.dtype = torch.float32) -> Material:
    model: Any = families.deep(family)
    return Material(model.to(dtype), Split(6, 1, 1), [families.text(family)])


@pytest.mark.parametrize(
    ("family", "dtype", "selects"),
    [
        ("llama", torch.float32, ("uniform", "clusters")),
        ("gpt2", torch.float32, ("uniform",)),
        ("bert", torch.bfloat16, ("uniform",)),
    ],
)
def test_the_size_is_known_before_it_is_made(family: str, dtype: torch.dtype, selects: tuple[str, ...]) -> None:
    made_of = material(family, dtype)
    for select, blocks, share, quantization in itertools.product(selects, (1, 3), (None, 0.25), ("none", "nf4")):
        choice = Choice(select, blocks, share, quantization)  # type: ignore[arg-type]
        emulator, layout = finished(*compressed(made_of, choice), choice)
        assert searching._size(made_of, choice) == middle_bytes(emulator, layout.inner), choice


def test_what_was_measured_is_kept_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_of, kept = material(), tmp_path / "search.json"
    told: list[tuple[Candidate, int, int]] = []
    budget = middle_bytes(made_of.model, (1, 2))
    first = search(made_of, budget, kept, lambda *one: told.append(one))
    assert [done for _, done, _ in told] == list(range(1, len(first) + 1))
    assert {count for _, _, count in told} == {len(first)}
    assert len({one.choice for one in first}) == len(first)
    assert all(one.size <= budget for one in first)
    # The last one measured is taken away, and made again; nothing else is.
    rows = json.loads(kept.read_text())
    kept.write_text(json.dumps(rows[:-1]))
    made: list[Choice] = []
    original = searching.compressed

    def counted(of: Material, choice: Choice) -> Any:
        made.append(choice)
        return original(of, choice)

    monkeypatch.setattr(searching, "compressed", counted)
    again = search(made_of, budget, kept, lambda *_: None)
    assert [choice.blocks for choice in made] == [rows[-1]["choice"]["blocks"]]
    assert again == first
    assert json.loads(kept.read_text()) == rows


def test_all_ways_to_select_are_compared_and_then_combined(tmp_path: Path) -> None:
    made_of = material()
    found = search(made_of, middle_bytes(made_of.model, (1, 2)), tmp_path / "search.json", lambda *_: None)
    plain = [one.choice for one in found if (one.choice.low_rank, one.choice.quantization) == (None, "none")]
    assert {(one.select, one.blocks) for one in plain} == {(select, n) for select in SELECTIONS for n in (2, 1)}
    best = next(one.choice.select for one in found if one.choice in plain)
    others = [one.choice for one in found if one.choice not in plain]
    assert {one.select for one in others} == {best}
    assert {(one.low_rank, one.quantization) for one in others} == {
        *((share, "none") for share in searching.SHARES),
        *((share, "nf4") for share in (None, *searching.SHARES)),
    }


@pytest.mark.parametrize("times", [0.4, pytest.param(1.0, marks=pytest.mark.slow)])
def test_what_gives_the_middle_away_comes_last(times: float, tmp_path: Path) -> None:
    made_of = material()
    budget = int(times * middle_bytes(made_of.model, made_of.split.middle))
    found = search(made_of, budget, tmp_path / "search.json", lambda *_: None)
    disclosing = [one.discloses for one in found]
    assert any(disclosing), "4 bits of all blocks fit into two fifths of the middle"
    assert disclosing == sorted(disclosing)
    assert not found[0].discloses
    best = max(found, key=lambda one: one.fidelity.agreement)
    assert best.discloses, "whoever holds all of the middle agrees best"
    for group in (False, True):
        scores = [one.fidelity.agreement for one in found if one.discloses is group]
        assert scores == sorted(scores, reverse=True)


def test_where_nothing_else_fits_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "SHARES", ())
    one_block = Material(families.deep("llama", 3), Split(3, 1, 1), [families.text("llama")])
    found = search(one_block, 10**9, tmp_path / "search.json", lambda *_: None)
    assert {one.choice.quantization for one in found} == {"none", "nf4"}
    assert found[0].discloses


def test_how_much_of_the_middle_a_choice_holds() -> None:
    assert Choice("uniform", 2).disclosed(4) == 0.5
    assert Choice("clusters", 4, None, "nf4").disclosed(4) == 1
    assert Choice("uniform", 4, 0.75).disclosed(4) == 0


def test_a_budget_for_nothing_is_refused(tmp_path: Path) -> None:
    made_of = material()
    smallest = searching._size(made_of, Choice("uniform", 1, 0.25, "nf4"))
    with pytest.raises(EmulatorError, match=f"The smallest takes {smallest:,}"):
        search(made_of, smallest - 1, tmp_path / "search.json", lambda *_: None)
    (only,) = search(made_of, smallest, tmp_path / "search.json", lambda *_: None)
    assert (only.size, only.choice.blocks) == (smallest, 1)


def test_fidelity_of_the_backbone_itself_and_of_something_else() -> None:
    made_of = material()
    whole = tuned_gradient(made_of.model, made_of.split.outer, made_of.calibration)
    layout = Layout(made_of.split, tuple(made_of.split.middle))
    same = fidelity(made_of, assemble(made_of.model, layout), layout, whole)
    assert same.hidden == 0
    assert same.agreement == pytest.approx(1, abs=1e-6)
    fewer = replace(layout, middle=(2,))
    other = fidelity(made_of, assemble(made_of.model, fewer), fewer, whole)
    assert other.hidden > 0.01
    assert other.agreement < 0.99
    assert same.loss is not None and other.loss is not None


def test_a_classifier_has_no_loss_of_public_text() -> None:
    made_of = material("bert")
    whole = tuned_gradient(made_of.model, made_of.split.outer, made_of.calibration)
    layout = Layout(made_of.split, (2,))
    assert describe(made_of.model).head
    assert fidelity(made_of, assemble(made_of.model, layout), layout, whole).loss is None
