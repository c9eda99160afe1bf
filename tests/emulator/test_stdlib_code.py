"""The backbone's side of the standard library: which unit a file belongs to, and code without a word of prose."""

from __future__ import annotations

import ast
from pathlib import Path, PurePosixPath

import pytest

from farfield.emulator import stdlib

MODULE = '''#!/usr/bin/env python3
"""A module for nothing but the tests of this one.

    Indented, and kept so.
"""

x = 1  # a comment beside code


# A comment on lines
#     of its own.

def f():
    """Return the answer to what was asked of it."""
    return "# not a comment, but a string", 'ü'  # and a comment after it


class Described:
    "A docstring between other quotation marks."
    text = """no docstring"""
'''

CODE = '''x = 1

def f():

    return "# not a comment, but a string", 'ü'

class Described:

    text = """no docstring"""
'''


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A library of two client units and two others, with tests, data, and what is passed over."""
    for name in (
        "abc.py", "heapq.py", "json/__init__.py", "json/tests/a.py", "test/support.py", "test/test_abc.py",
        "test/test_json/test_a.py", "json/notes.txt", "notes.txt", "site-packages/a.py", "config-3.11/a.py",
        "abc/__pycache__/b.py",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Prose."""\nname = {name!r}  # more prose\n')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xfc'\n")
    return tmp_path


def names(found: list[stdlib.Source]) -> list[str]:
    return [str(source.path) for source in found]


def test_code_has_no_prose() -> None:
    assert stdlib.code(MODULE) == CODE
    ast.parse(CODE)
    assert stdlib.code('class Größe: "Beschrieben."\n') == "class Größe:\n"


def test_warnings_hide_no_file(tmp_path: Path) -> None:
    # Pytest makes an invalid escape's warning an error, and that a SyntaxError of the file.
    (tmp_path / "abc.py").write_text(r'"""A pattern: \d+ digits."""' + "\nx = '\\d'\n")
    assert names(list(stdlib.sources(tmp_path))) == ["abc.py"]
    assert list(stdlib.backbone_texts(tmp_path)) == ["x = '\\d'\n"]


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("json/decoder.py", "json"),
        ("uuid.py", "uuid"),
        ("_threading_local.py", "threading_local"),
        ("test/test_json/test_dump.py", "json"),
        ("test/test_minidom.py", "xml"),
        ("test/support/__init__.py", "test"),
        ("abc.py", "abc"),
    ],
)
def test_owner(path: str, unit: str) -> None:
    assert stdlib.owner(PurePosixPath(path)) == unit


def test_sources_are_all_readable_files(small: Path) -> None:
    found = list(stdlib.sources(small))
    assert names(found) == [
        "abc.py", "heapq.py", "json/__init__.py", "json/tests/a.py", "latin.py", "test/support.py", "test/test_abc.py",
        "test/test_json/test_a.py",
    ]  # fmt: skip
    assert [str(source.path) for source in found if source.is_test] == [
        "json/tests/a.py", "test/support.py", "test/test_abc.py", "test/test_json/test_a.py",
    ]  # fmt: skip
    assert found[-1].unit == "json"


def test_every_source_is_on_one_side(small: Path) -> None:
    clients, backbone = (list(stdlib.sources(small, of_clients=side)) for side in (True, False))
    assert names(clients) == ["heapq.py", "json/__init__.py", "json/tests/a.py", "test/test_json/test_a.py"]
    assert sorted(names(clients + backbone)) == names(list(stdlib.sources(small)))


def test_files_of_units_are_without_those_of_the_librarys_own_tests(small: Path) -> None:
    found = [str(path) for path, _ in stdlib.files(small, ("json", "heapq"))]
    assert found == ["heapq.py", "json/__init__.py", "json/tests/a.py"]


def test_the_backbone_reads_no_line_of_the_clients_and_no_prose(small: Path) -> None:
    assert list(stdlib.backbone_texts(small)) == [
        "name = 'abc.py'\n", "name = 'ü'\n", "name = 'test/support.py'\n", "name = 'test/test_abc.py'\n",
    ]  # fmt: skip
