"""The version that is asked for runs, and no other."""

import importlib
import inspect
from pathlib import Path

import pytest

from farfield.kernels import cross_entropy, dispatch, grouped, nf4, stacked
from farfield.kernels.dispatch import Implementation


def test_every_version_is_found_where_it_is() -> None:
    found = dispatch.kernels()
    for name, module in {
        "cross_entropy.summed_linear": cross_entropy,
        "grouped.low_rank": grouped,
        "nf4.dequantize": nf4,
        "stacked.truncated": stacked,
    }.items():
        last = name.rpartition(".")[2]
        assert found[name].fast is getattr(module, last)
        assert found[name].reference is getattr(module, f"reference_{last}")


def test_nothing_with_two_versions_is_left_out() -> None:
    """By the text of the files, not by what dispatch makes of them."""
    there = set()
    for file in Path(dispatch.__file__).parent.glob("*.py"):
        names = {
            line.split("(")[0].removeprefix("def ") for line in file.read_text().splitlines() if line[:4] == "def "
        }
        there |= {f"{file.stem}.{name}" for name in names if f"reference_{name}" in names}
    assert set(dispatch.kernels()) == there
    assert there >= {
        "clip.clipped_sums",
        "cross_entropy.summed_linear",
        "grouped.low_rank",
        "int8.dequantize",
        "low_rank.add_",
        "nf4.linear",
        "perturb.add_",
        "reversible.stack",
        "stacked.truncated",
    }


@pytest.mark.parametrize("name", sorted(dispatch.kernels()))
def test_both_versions_take_the_same_arguments(name: str) -> None:
    kernel = dispatch.kernels()[name]
    assert inspect.signature(kernel.reference).parameters.keys() == inspect.signature(kernel.fast).parameters.keys()


@pytest.mark.parametrize("name", sorted(dispatch.kernels()))
def test_the_choice_is_the_callers(name: str) -> None:
    module = importlib.import_module(f"farfield.kernels.{name.partition('.')[0]}")
    last = name.partition(".")[2]
    assert dispatch.choose(name, Implementation.FAST, "cpu") is getattr(module, last)
    assert dispatch.choose(name, Implementation("reference"), "cpu") is getattr(module, f"reference_{last}")


def test_what_does_not_run_there_is_refused_and_not_replaced() -> None:
    with pytest.raises(LookupError, match=r"'stacked\.truncated' runs on cpu, not on 'cuda'"):
        dispatch.choose("stacked.truncated", Implementation.FAST, "cuda")
    for name, device in (("perturb.add_", "cpu"), ("nf4.linear", "cuda")):
        with pytest.raises(LookupError, match=rf"'{name}' has no version for '{device}' in Triton"):
            dispatch.choose(name, Implementation.TRITON, device)
    with pytest.raises(LookupError, match=r"no kernel 'stacked\.svd'; there are: .*stacked\.truncated"):
        dispatch.choose("stacked.svd", Implementation.FAST, "cpu")
