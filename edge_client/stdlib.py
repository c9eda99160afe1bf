"""Python's own standard library as a data set: code for the backbone, prose for the clients.

Everything that Farfield ships runs without a download, so its demonstration reads the one corpus that every user has: the
library of the interpreter that runs it. The corpus is cut twice.

* By *unit* (a top-level package or module): the units in `CLIENT_UNITS`, and the test files that belong to them, are the
  clients'. All others are the backbone's.
* By *kind of text*: the backbone is trained on code with its docstrings and comments removed; the clients hold those
  docstrings and comments. So the clients have something that the backbone has still to learn.

`examples/pretrain_backbone.py` uses the backbone's side and measures on the clients' side.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
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

MIN_PROSE_CHARS = 40
"""Shorter docstrings and comments ("# XXX", "Return self.") say nothing that can be learnt."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file of the library: the unit that owns it, its path below the library's folder, and its text."""

    unit: str
    path: PurePosixPath
    text: str

    @property
    def is_test(self) -> bool:
        return bool({"test", "tests"} & set(self.path.parts[:-1]))


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


def sources(folder: Path | None = None) -> Iterator[Source]:
    """Every readable Python file of the standard library in path order."""
    root = folder or Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        path = PurePosixPath(file.relative_to(root).as_posix())
        if _SKIPPED & set(path.parts) or path.parts[0].startswith(("config-", "lib-dynload")):
            continue
        text = _readable(file)
        if text is not None:
            yield Source(owner(path), path, text)


def _readable(file: Path) -> str | None:
    """The file's text, or None for the few that are deliberately no valid Python (data of the library's own tests)."""
    try:
        with tokenize.open(file) as stream:
            text = stream.read()
        ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None
    return text


def _docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                yield first.value


def code(text: str) -> str:
    """`text` with docstrings and comments removed, otherwise as it was written (runs of blank lines become one)."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    for node in _docstrings(ast.parse(text)):
        end = node.end_lineno or node.lineno
        tail = lines[end - 1].encode()[node.end_col_offset :].decode()
        lines[node.lineno - 1] = lines[node.lineno - 1].encode()[: node.col_offset].decode().rstrip() + tail
        lines[node.lineno : end] = [""] * (end - node.lineno)
    return re.sub(r"\n\s*\n+", "\n\n", "\n".join(line.rstrip() for line in lines)).strip() + "\n"


def prose(text: str) -> list[str]:
    """The docstrings and comment blocks of `text` in the order they stand in, each as one string."""
    found: list[tuple[int, str]] = [
        (node.lineno, inspect.cleandoc(str(node.value))) for node in _docstrings(ast.parse(text))
    ]
    block: list[str] = []
    previous = -1
    start = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        row = token.start[0]
        if row != previous + 1 and block:
            found.append((start, "\n".join(block)))
            block = []
        start = start if block else row
        block.append(token.string.lstrip("#!:").strip())
        previous = row
    if block:
        found.append((start, "\n".join(block)))
    return [piece.strip() for _, piece in sorted(found) if len(piece.strip()) >= MIN_PROSE_CHARS]
