"""What `data.path` names: a file or folder of the owner's, or a part of the standard library's prose."""

from __future__ import annotations

from pathlib import Path

import pytest

from farfield.edge_client.records import Text
from farfield.edge_client.sources import Part, data_source, records
from farfield.protocols.errors import DataError, PlanError
from farfield.protocols.sections import Data


def test_sources() -> None:
    assert data_source("/data/notes") == Path("/data/notes")
    assert data_source("builtin:stdlib/2/3") == Part(2, 3)
    assert str(Part(2, 3)) == "builtin:stdlib/2/3"
    for wrong in (
        "notes", "", "builtin:stdlib", "builtin:stdlib/0/3", "builtin:stdlib/4/3", "builtin:stdlib/1/3/",
        "builtin:x/1/1",
    ):  # fmt: skip
        with pytest.raises(DataError):
            data_source(wrong)


def test_a_part_is_texts_without_classes() -> None:
    found = list(records(Part(2, 2), Data(), "causal-lm", None))
    assert found and all(isinstance(record, Text) for record in found)
    with pytest.raises(PlanError, match="text without classes"):
        records(Part(1, 2), Data(), "sequence-classification", 2)


def test_a_file_is_read_with_the_columns_of_the_plan(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"note": "Kept."}\n')
    assert list(records(tmp_path, Data(text="note"), "causal-lm", None)) == [Text("Kept.")]
