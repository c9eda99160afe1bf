"""Python's own standard library as text that every user has: its units, whose they are, and its code without prose.

Everything that Farfield ships runs without a download, so its demonstration reads the one corpus that every user has:
the library of the interpreter that runs it. The corpus is cut twice.

* By *unit* (a top-level package or module): the units in `CLIENT_UNITS`, and the test files that belong to them, are
  the clients'. All others are the backbone's.
* By *kind of text*: the backbone is trained on code with its docstrings and comments removed; the clients hold those
  docstrings and comments. So the clients have something that the backbone has still to learn.

The backbone's side is read here (`backbone_texts`); `farfield.edge_client.stdlib` has the clients' prose.
"""

from __future__ import annotations

import ast
import io
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CLIENT_UNITS: tuple[str, ...] = (
    "concurrent", "configparser", "difflib", "doctest", "ftplib", "heapq", "html", "imaplib", "json", "multiprocessing",
    "optparse", "pdb", "smtplib", "socketserver", "textwrap", "threading", "turtle", "urllib", "uuid", "xml", "xmlrpc",
)  # fmt: skip
"""Units that every Python installation has, chosen for much prose. The backbone has never seen a line of them."""

_TEST_OWNERS = {
    "docxmlrpc": "xmlrpc", "dom": "xml", "expat": "xml", "fork1": "threading", "minidom": "xml", "pulldom": "xml",
    "pyexpat": "xml", "robotparser": "urllib", "sax": "xml", "thread": "threading",
}  # fmt: skip
"""Test files whose name does not begin with the unit they exercise."""

_SKIPPED = frozenset({"site-packages", "__pycache__", "pydoc_data", "encodings", "lib2to3", "idlelib", "turtledemo"})
"""Installed packages, generated tables, and packages that several distributions leave out."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file of the library: the unit that owns it, its path below the library's folder, and its text."""

    unit: str
    path: PurePosixPath
    text: str

    @property
    def is_test(self) -> bool:
        return is_test(self.path)


def is_test(path: PurePosixPath) -> bool:
    """Whether `path` lies in a folder of tests."""
    return bool({"test", "tests"} & set(path.parts[:-1]))


def owner(path: PurePosixPath) -> str:
    """The unit that `path` (relative to the library's folder) belongs to; a test file belongs to what it tests."""
    head = path.parts[0].removesuffix(".py")
    if head != "test":
        return head.lstrip("_") or head
    name = (path.parts[1] if len(path.parts) > 1 else "test").removesuffix(".py").lstrip("_").removeprefix("test_")
    for prefix, unit in _TEST_OWNERS.items():
        if name.startswith(prefix):
            return unit
    return max((unit for unit in CLIENT_UNITS if name.startswith(unit)), key=len, default="test")


def files(folder: Path | None = None, units: Collection[str] | None = None) -> Iterator[tuple[PurePosixPath, Path]]:
    """Every Python file of the library below `folder` in path order: its path relative to the library, and the file.

    With `units`, only what lies in those packages and modules themselves: not their tests in the library's own `test`.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    for entry in sorted(root.iterdir()):
        if entry.name.startswith(("config-", "lib-dynload")) or entry.name in _SKIPPED:
            continue
        if units is not None and owner(PurePosixPath(entry.name)) not in units:
            continue
        for file in sorted(entry.rglob("*.py")) if entry.is_dir() else [entry]:
            path = PurePosixPath(file.relative_to(root).as_posix())
            if file.suffix == ".py" and not _SKIPPED & set(path.parts):
                yield path, file


def sources(folder: Path | None = None, *, of_clients: bool | None = None, tests: bool = True) -> Iterator[Source]:
    """Every readable Python file of the standard library in path order; or those of one side of the split alone."""
    for path, file in files(folder):
        unit = owner(path)
        if of_clients in (None, unit in CLIENT_UNITS) and (tests or not is_test(path)) and (found := read(file)):
            yield Source(unit, path, found[0])


def backbone_texts(folder: Path | None = None) -> Iterator[str]:
    """What `builtin:tiny-llama-py` is trained on: the code of all units that no client holds, one text per file.

    Docstrings and comments are removed; tests are code like any other. Some 19 million characters of CPython 3.11,
    which take about half a minute.
    """
    for path, file in files(folder):
        if owner(path) not in CLIENT_UNITS and (found := read(file)):
            yield _code(*found)


def read(file: Path) -> tuple[str, ast.Module] | None:
    """The file's text and syntax tree, or None for the few that are deliberately no valid Python (data of the library's
    own tests).
    """
    try:
        with tokenize.open(file) as stream:
            text = stream.read()
        return text, parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None


def parse(text: str) -> ast.Module:
    """`ast.parse` without its warnings, which would be errors, and make a file unreadable, under `python -W error`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """The docstring of the module, of each class and of each function in `tree`, where there is one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield first.value


def code(text: str) -> str:
    """`text` with docstrings and comments removed, otherwise as it was written (runs of blank lines become one)."""
    return _code(text, parse(text))


def _code(text: str, tree: ast.Module) -> str:
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    for node in docstrings(tree):
        end = node.end_lineno or node.lineno
        tail = lines[end - 1].encode()[node.end_col_offset :].decode()
        lines[node.lineno - 1] = lines[node.lineno - 1].encode()[: node.col_offset].decode().rstrip() + tail
        lines[node.lineno : end] = [""] * (end - node.lineno)
    return re.sub(r"\n\s*\n+", "\n\n", "\n".join(line.rstrip() for line in lines)).strip() + "\n"
