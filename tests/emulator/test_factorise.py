"""Low-rank factors: the best of their rank for the inputs that a layer gets, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, deep, text
from hypothesis import given
from hypothesis import strategies as st

from farfield.emulator.architecture import Linear, describe
from farfield.emulator.assemble import assemble, tensors
from farfield.emulator.factorise import DAMPING, factorised, factors, rank_of
from farfield.emulator.layers import LowRankLinear
from farfield.emulator.layout import Layout
from farfield.emulator.split import split
from farfield.emulator.streams import run

PARTS = split(6, (1, 2))
LAYOUT = Layout(PARTS, (2, 3, 3))


def drawn(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and inputs [samples, columns] some directions of which are far larger than others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixed = torch.randn(columns, columns, generator=generator) * 3 ** -torch.arange(columns).float().clamp(max=4)
    return weight, torch.randn(5 * columns, columns, generator=generator) @ mixed.T


def error(weight: torch.Tensor, other: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs.double() @ (weight - other).double().T).square().sum())


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31), st.data())
def test_no_other_matrix_of_the_rank_is_nearer(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    weight, inputs = drawn(rows, columns, seed)
    rank = data.draw(st.integers(1, min(rows, columns)))
    moment = inputs.double().T @ inputs.double() / len(inputs)
    up, down = factors(weight, moment, rank)
    assert (up.shape, down.shape, up.dtype, down.dtype) == ((rows, rank), (rank, columns), torch.float32, torch.float32)
    # Eckart and Young in the space where the inputs are white: what is lost is the rest of the spectrum.
    root = torch.linalg.cholesky(moment + DAMPING * moment.diagonal().mean() * torch.eye(columns))
    least = torch.linalg.svdvals(weight.double() @ root)[rank:].square().sum() * len(inputs)
    reached = float(((weight - up @ down).double() @ root).square().sum()) * len(inputs)
    scale = float((weight.double() @ root).square().sum()) * len(inputs)
    # float32 keeps 24 bits of each factor, and a root amplifies by its condition, at most 1 / sqrt(DAMPING).
    assert reached <= float(least) * (1 + 1e-4) + scale * 1e-6
    generator = torch.Generator().manual_seed(seed + 1)
    for size in (1e-3, 1e-1):
        moved = (up + size * torch.randn(up.shape, generator=generator)) @ (
            down + size * torch.randn(down.shape, generator=generator)
        )
        assert (
            float(((weight - moved).double() @ root).square().sum()) * len(inputs)
            >= reached * (1 - 1e-4) - 1e-5 * scale
        )


def test_more_rank_is_nearer_and_full_rank_is_the_matrix() -> None:
    weight, inputs = drawn(7, 9, seed=1)
    moment = inputs.T @ inputs / len(inputs)
    products = [up @ down for up, down in (factors(weight, moment, rank) for rank in range(1, 8))]
    errors = [error(weight, one, inputs) for one in products]
    assert errors == sorted(errors, reverse=True)
    torch.testing.assert_close(products[-1], weight, rtol=0, atol=1e-4)


def test_what_the_inputs_never_do_does_not_matter() -> None:
    weight, _ = drawn(8, 8, seed=2)
    inputs = torch.zeros(64, 8)
    inputs[:, :3] = torch.randn(64, 3, generator=torch.Generator().manual_seed(5))
    up, down = factors(weight, inputs.T @ inputs / 64, 3)
    assert error(weight, up @ down, inputs) < 1e-4 * error(weight, torch.zeros(8, 8), inputs)
    left, values, right = torch.linalg.svd(weight)
    plain = left[:, :3] * values[:3] @ right[:3]
    assert error(weight, up @ down, inputs) < 1e-2 * error(weight, plain, inputs)


def test_a_layer_that_saw_nothing_is_cut_by_its_own_spectrum() -> None:
    weight, _ = drawn(6, 5, seed=3)
    up, down = factors(weight, torch.zeros(5, 5), 2)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(up @ down, left[:, :2] * values[:2] @ right[:2], rtol=0, atol=1e-5)


def test_the_moment_is_left_as_it_was() -> None:
    weight, inputs = drawn(4, 4, seed=4)
    moment = (inputs.T @ inputs).double()
    before = moment.clone()
    factors(weight, moment, 2)
    assert torch.equal(moment, before)


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 0.99))
def test_factors_have_no_more_than_their_share(rows: int, columns: int, share: float) -> None:
    rank = rank_of(Linear("", columns, rows, False, False), share)
    assert 1 <= rank <= min(rows, columns)
    assert rank == 1 or rank * (rows + columns) <= share * rows * columns
    assert (rank + 1) * (rows + columns) > share * rows * columns


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model_with_the_product_in_place_of_each_matrix(family: str) -> None:
    model = deep(family)
    emulator = assemble(model, LAYOUT)
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    low, layout = factorised(emulator, LAYOUT, 0.4, [text(family)])
    dense: Any = deep(family)
    linears = describe(model).within({2, 3}).linears
    path = FAMILIES[family].blocks
    assert layout.ranks == {one.path.removeprefix(f"{path}."): rank_of(one, 0.4) for one in linears}
    here = {2: 1, 3: 2}
    for linear in linears:
        number, _, inside = linear.path.removeprefix(f"{path}.").partition(".")
        layer: Any = low.get_submodule(f"{path}.{here[int(number)]}.{inside}")
        assert isinstance(layer, LowRankLinear)
        product = layer.up.weight @ layer.down.weight
        dense.get_submodule(linear.path).weight.copy_(product.T if linear.transposed else product)
        if linear.bias:
            assert torch.equal(layer.up.bias, dense.get_submodule(linear.path).bias)
    expected = run(assemble(dense, LAYOUT), text(family)).logits
    torch.testing.assert_close(run(low, text(family)).logits, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())
    blocks = describe(low).blocks
    assert blocks[2] is blocks[3]
    theirs = {tensor.data_ptr() for tensor in tensors(model).values()}
    kept = [tensor for name, tensor in tensors(low).items() if ".up." not in name and ".down." not in name]
    assert all(tensor.data_ptr() in theirs for tensor in kept), "what stays is not copied"


def test_padding_does_not_count() -> None:
    """What stands in the padding is no text: other padding gives the same factors."""
    batch = text("opt")
    other = dict(batch)
    other["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5)
    one, same = (tensors(factorised(assemble(deep("opt"), LAYOUT), LAYOUT, 0.4, [each])[0]) for each in (batch, other))
    assert all(torch.allclose(one[name], same[name], atol=1e-4) for name in one)


def test_outliers_do_not_drown_the_rest() -> None:
    """A stream with a few features a thousand times the others, as large models have it."""
    weight, _ = drawn(8, 64, seed=6)
    inputs = torch.randn(500, 64, generator=torch.Generator().manual_seed(7))
    inputs[:, 0] *= 1e4
    moment = inputs.double().T @ inputs.double() / 500
    up, down = factors(weight, moment, 7)
    assert torch.isfinite(up @ down).all()
