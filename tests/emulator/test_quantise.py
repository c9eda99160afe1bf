"""The stand-in in 4 bits: what it computes is what the 4 bits say, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, deep, text

from farfield.emulator.architecture import describe
from farfield.emulator.assemble import assemble, tensors
from farfield.emulator.factorise import factorised
from farfield.emulator.layers import Nf4Linear
from farfield.emulator.layout import Layout
from farfield.emulator.quantise import dequantised, quantised
from farfield.emulator.split import split
from farfield.emulator.streams import run
from farfield.kernels import nf4

PARTS = split(6, (1, 2))
LAYOUT = Layout(PARTS, (2, 3, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model_with_rounded_matrices(family: str) -> None:
    model = deep(family)
    small, layout = quantised(assemble(model, LAYOUT), LAYOUT)
    assert layout.quantization == "nf4"
    rounded: Any = deep(family)
    for linear in describe(model).within({2, 3}).linears:
        weight = rounded.get_submodule(linear.path).weight
        matrix = weight.T if linear.transposed else weight
        packed, scales = nf4.quantize(matrix)
        back = nf4.reference_dequantize(packed, scales, linear.out_features, linear.in_features, torch.float32)
        weight.copy_(back.T if linear.transposed else back)
    expected = run(assemble(rounded, LAYOUT), text(family)).logits
    torch.testing.assert_close(run(small, text(family)).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(expected, run(assemble(model, LAYOUT), text(family)).logits)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta", "vit"])
def test_every_matrix_of_the_stand_in_is_in_four_bits_and_no_other(family: str, low_rank: bool) -> None:
    model = deep(family)
    emulator, layout = assemble(model, LAYOUT), LAYOUT
    if low_rank:
        emulator, layout = factorised(emulator, layout, 0.5, [text(family)])
    small, layout = quantised(emulator, layout)
    for number, block in enumerate(describe(small).blocks):
        kinds = [
            isinstance(one, Nf4Linear) for one in block.modules() if hasattr(one, "in_features") or hasattr(one, "nx")
        ]
        assert all(kinds) if number in layout.inner else not any(kinds)
        assert kinds
    assert not any(
        parameter.dim() > 1 for number in layout.inner for parameter in describe(small).blocks[number].parameters()
    )
    blocks = describe(small).blocks
    assert blocks[2] is blocks[3]


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta", "vit"])
def test_unpacked_again_it_computes_the_same_and_can_be_trained(family: str, low_rank: bool) -> None:
    emulator, layout = assemble(deep(family), LAYOUT), LAYOUT
    if low_rank:
        emulator, layout = factorised(emulator, layout, 0.5, [text(family)])
    small, packed = quantised(emulator, layout)
    open_again, back = dequantised(small, packed)
    assert back == layout
    torch.testing.assert_close(
        run(open_again, text(family)).logits, run(small, text(family)).logits, rtol=1e-5, atol=1e-5
    )
    assert tensors(open_again).keys() == tensors(emulator).keys()
    again, _ = quantised(open_again, back)
    ours, theirs = tensors(again), tensors(small)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name.endswith(".scales"))


def test_the_gradient_goes_through_the_stand_in() -> None:
    model = deep("llama")
    small, _ = quantised(assemble(model, LAYOUT), LAYOUT)
    first: Any = describe(small).blocks[0]
    first.requires_grad_(True)
    run(small, text("llama")).logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in first.parameters())
