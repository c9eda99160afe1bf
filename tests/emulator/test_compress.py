"""Which blocks remain: each strategy keeps those that it says it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, deep, text
from transformers import PreTrainedModel

from farfield.emulator.architecture import describe
from farfield.emulator.compress import SELECTIONS, clusters, gradient, influence, tuned_gradient, uniform
from farfield.emulator.search import stated
from farfield.emulator.split import Split, split
from farfield.protocols.errors import EmulatorError
from farfield.protocols.sections import Emulator

PARTS = split(6, (1, 1))


@pytest.mark.parametrize("depth", range(1, 13))
def test_uniform_is_the_papers_rule(depth: int) -> None:
    parts = split(depth + 3, (2, 1))
    nothing: Any = None
    for keep in range(2, depth + 1):
        chosen = uniform(nothing, parts, keep, [])
        assert chosen == tuple(2 + round(number * (depth - 1) / (keep - 1)) for number in range(keep))
        assert (chosen[0], chosen[-1], len(set(chosen))) == (parts.middle[0], parts.middle[-1], keep)
    (only,) = uniform(nothing, parts, 1, [])
    assert only in parts.middle


def idle(block: torch.nn.Module) -> None:
    """Make the block add nothing to the stream: the matrices that write to it are zero."""
    for name, parameter in block.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.zero_()


def with_idle(*numbers: int) -> PreTrainedModel:
    model = deep("llama")
    for number in numbers:
        idle(describe(model).blocks[number])
    return model


@pytest.mark.parametrize("select", [influence, gradient])
@pytest.mark.parametrize("numbers", [(1, 2), (3,), (2, 4)])
def test_blocks_that_do_nothing_go_first(select: Any, numbers: tuple[int, ...]) -> None:
    kept = select(with_idle(*numbers), PARTS, 4 - len(numbers), [text("llama")])
    assert kept == tuple(number for number in PARTS.middle if number not in numbers)


@pytest.mark.parametrize("select", [influence, gradient])
def test_the_only_block_that_does_something_stays(select: Any) -> None:
    assert select(with_idle(1, 2, 4), PARTS, 1, [text("llama")]) == (3,)


def test_clusters_are_neighbours_and_cover_the_middle() -> None:
    model = deep("llama", 10)
    parts = split(10, (1, 2))
    for keep in range(1, 8):
        chosen = clusters(model, parts, keep, [text("llama")])
        assert len(chosen) == len(parts.middle), "the depth stays"
        assert list(chosen) == sorted(chosen)
        assert len(set(chosen)) == keep
        for number in set(chosen):
            places = [parts.middle[place] for place, one in enumerate(chosen) if one == number]
            assert places == list(range(places[0], places[-1] + 1))
            assert number in places, "the one that stands for a cluster is of it"


def test_blocks_that_leave_the_stream_alike_are_of_one_cluster() -> None:
    assert clusters(with_idle(2, 4), PARTS, 2, [text("llama")]) in {(2, 2, 4, 4), (1, 1, 3, 3)}


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "llama-classifier", "vit"])
def test_every_strategy_works_on_every_kind_of_model(select: str, family: str) -> None:
    model = deep(family)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    for keep in (1, 2, 4):
        chosen = SELECTIONS[select](model, PARTS, keep, [text(family)] * 2)
        assert len(set(chosen)) == keep
        assert list(chosen) == sorted(chosen)
        assert set(chosen) <= set(PARTS.middle)
        assert len(chosen) == (4 if select == "clusters" else keep)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("select", SELECTIONS)
def test_a_middle_of_one_block(select: str) -> None:
    model = deep("llama", 3)
    assert SELECTIONS[select](model, split(3, (1, 1)), 1, [text("llama")]) == (1,)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_tuned_blocks(family: str) -> None:
    model = deep(family)
    blocks = describe(model).blocks
    found = tuned_gradient(model, PARTS.outer, [text(family)])
    assert found.shape == (sum(one.numel() for number in PARTS.outer for one in blocks[number].parameters()),)
    assert found.any()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "keep", "expected"),
    [
        (Emulator(), None, 2),
        (Emulator(), 3, 3),
        (Emulator(blocks=4), None, 4),
        (Emulator(blocks=3), 3, 3),
        (Emulator(low_rank=0.5), None, 4),
        (Emulator(quantization="nf4"), None, 4),
    ],
)
def test_how_many_remain(settings: Emulator, keep: int | None, expected: int) -> None:
    assert stated(settings, PARTS, keep).blocks == expected


def test_more_blocks_than_there_are_are_refused() -> None:
    for settings, keep in ((Emulator(blocks=5), None), (Emulator(), 5)):
        with pytest.raises(EmulatorError, match="5 blocks are to remain, and the middle has 4"):
            stated(settings, Split(6, 1, 1), keep)
