import torch
from hypothesis import given
from hypothesis import strategies as st

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
