"""`edge-client doctor --plan`: what it prints, and what it says about limits that make no sense."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from farfield.edge_client import fitting, outlook
from farfield.edge_client.choice import Fit, Way
from farfield.edge_client.readable import parse_size
from farfield.protocols.errors import DeviceError

PLAN = Path(__file__).parents[2] / "examples" / "quickstart.toml"

TABLE = (
    Fit(Way(None, 4, 1, False, 16, False), 1_200_000_000, 0.5, False),
    Fit(Way(None, 4, 1, False, 16, True), 900_000_000, 0.7, True),
    Fit(Way(None, 2, 2, False, 16, True), 800_000_000, 0.7, True),
)


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GB", 4 * 10**9), ("800 MB", 8 * 10**8), ("1.5GiB", 3 * 2**29), ("2000", 2000), (" 1tb ", 10**12)],
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "lots", "0", "0GB", "-1GB", "1e9", "4 apples", "nan", "inf", "0.0000001B", "GB"])
def test_what_is_no_size_is_said_to_be_none(text: str) -> None:
    with pytest.raises(DeviceError) as caught:
        parse_size(text)
    assert str(caught.value) == f"{text!r} is not an amount of memory. Write it as 4GB, 800MB or 1.5GiB."


def test_the_table_says_what_fits_and_what_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int | None] = []

    def look_ahead(plan: object, folder: object, most: int | None, *_: object, **__: object) -> tuple[Fit, ...]:
        asked.append(most)
        return TABLE

    monkeypatch.setattr(fitting, "look_ahead", look_ahead)
    console = Console(width=120, highlight=False, markup=False)
    outlook.show(PLAN, "1GB", tmp_path, console)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "way to work memory seconds a step fits",
        "lora, batch 4 × 1 1.2 GB 0.5 no",
        "→ lora, batch 4 × 1, frugal 900.0 MB 0.7 yes",
        "lora, batch 2 × 2, frugal 800.0 MB 0.7 yes",
        "Taken would be lora, batch 4 × 1, frugal: the first that leaves 7% of 1.0 GB free.",
    ]
    outlook.show(PLAN, None, tmp_path, console)
    assert asked[0] == 10**9 and (asked[1] is None or asked[1] > 10**7)


def test_what_fits_nowhere_ends_with_the_least_need(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = tuple(Fit(one.way, one.memory, one.seconds, False) for one in TABLE)
    monkeypatch.setattr(fitting, "look_ahead", lambda *_, **__: nothing)
    with pytest.raises(DeviceError) as caught:
        outlook.show(PLAN, "10MB", tmp_path, Console())
    assert "at least 860.2 MB" in str(caught.value) and "batch 2 × 2, frugal" in str(caught.value)
    assert "no" in capsys.readouterr().out
