from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from farfield.edge_client import data
from farfield.kernels import cross_entropy

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def drawn(shape: tuple[int, ...], classes: int, seed: int, ignored: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(*shape, classes, generator=generator)
    labels = torch.randint(classes, shape, generator=generator)
    return logits, labels.masked_fill(torch.rand(shape, generator=generator) < ignored, cross_entropy.IGNORED)


def reference(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, range]:
    """Loss and hits position by position, in float64; where two logits are the largest, either may be the guess."""
    loss, sure, possible = 0.0, 0, 0
    for scores, label in zip(logits.flatten(0, -2).double(), labels.flatten().tolist(), strict=True):
        if label != cross_entropy.IGNORED:
            loss -= float(torch.log_softmax(scores, dim=0)[label])
            if scores[label] == scores.max():
                possible += 1
                sure += int((scores == scores.max()).sum()) == 1
    return loss, range(sure, possible + 1)


@given(SHAPES, st.integers(2, 9), st.integers(0, 2**31), st.floats(0, 1), st.sampled_from(["float32", "bfloat16"]))
def test_equals_a_loop_over_positions(
    shape: tuple[int, ...], classes: int, seed: int, ignored: float, dtype: str
) -> None:
    logits, labels = drawn(shape, classes, seed, ignored)
    logits = logits.to(getattr(torch, dtype))
    loss, hits = reference(logits, labels)
    ours = cross_entropy.summed(logits, labels)
    assert ours.dtype == torch.float32
    assert ours.shape == ()
    # At most 64 terms, each of a few tens and rounded at 2^-24 a handful of times; the same for bfloat16 logits, which
    # float32 holds exactly. A softmax in bfloat16 would be off by 2^-9 of each term, a hundred times the tolerance.
    assert abs(float(ours) - loss) <= 64 * 32 * 2**-24 * 4
    assert cross_entropy.hits(logits, labels) in hits


def test_gradients_are_those_of_the_reference_and_stay_in_the_logits_format() -> None:
    logits, labels = drawn((3, 4), 6, seed=1, ignored=0.4)
    for dtype, tolerance in ((torch.float32, 2**-22), (torch.bfloat16, 2**-8)):
        leaf = logits.detach().clone().to(dtype).requires_grad_()
        cross_entropy.summed(leaf, labels).backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        chosen = (labels != cross_entropy.IGNORED)[..., None]
        one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), 6)
        expected = torch.where(chosen, torch.softmax(leaf.detach().double(), dim=-1) - one_hot, 0.0)
        # Values are within ±1, so half a unit in the last place is the rounding of each.
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=0, atol=tolerance)


def test_nothing_to_predict_is_zero() -> None:
    logits, labels = torch.randn(2, 3, 5, requires_grad=True), torch.full((2, 3), cross_entropy.IGNORED)
    loss = cross_entropy.summed(logits, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    assert cross_entropy.hits(logits, labels) == 0


def test_data_and_kernel_agree_on_what_is_not_predicted() -> None:
    assert data.IGNORED == cross_entropy.IGNORED


@given(SHAPES, st.integers(2, 9), st.integers(1, 5), st.integers(0, 2**31), st.floats(0, 1), st.booleans())
def test_of_hidden_states_equals_all_logits_at_once(
    shape: tuple[int, ...], classes: int, width: int, seed: int, ignored: float, biased: bool
) -> None:
    _, labels = drawn(shape, classes, seed, ignored)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(classes, generator=generator, dtype=torch.float64) if biased else None
    leaves = [hidden.float().requires_grad_() for _ in range(2)]
    whole = cross_entropy.reference_summed_linear(
        leaves[0], weight.float(), None if bias is None else bias.float(), labels
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CHUNK", 3 * classes)  # three positions at a time
        parts = cross_entropy.summed_linear(leaves[1], weight.float(), None if bias is None else bias.float(), labels)
        value, hits = cross_entropy.summed_and_hits(
            leaves[1], weight.float(), None if bias is None else bias.float(), labels
        )
    (3 * whole).backward()  # type: ignore[no-untyped-call]
    (3 * parts).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(value, parts.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-4, atol=1e-4)
    logits = torch.nn.functional.linear(leaves[1].detach(), weight.float(), None if bias is None else bias.float())
    assert hits == cross_entropy.hits(logits, labels)


def test_of_hidden_states_keeps_the_number_format_and_never_has_all_logits() -> None:
    hidden = torch.randn(40, 8).bfloat16().requires_grad_()
    weight, labels = torch.randn(1000, 8).bfloat16(), torch.randint(1000, (40,))
    largest = 0

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.data_ptr() != weight.data_ptr():
                largest = max(largest, result.numel())
            return result

    with pytest.MonkeyPatch.context() as patch, Watch():  # type: ignore[no-untyped-call]
        patch.setattr(cross_entropy, "CHUNK", 4000)
        loss = cross_entropy.summed_linear(hidden, weight, None, labels)
        loss.backward()  # type: ignore[no-untyped-call]
    assert largest == 4000
    assert loss.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    expected = cross_entropy.reference_summed_linear(hidden.detach().float(), weight.float(), None, labels)
    # Logits of a few units are rounded at 2⁻⁹ of themselves, forty times.
    assert abs(float(loss.detach() - expected)) < 40 * 4 * 2**-8
