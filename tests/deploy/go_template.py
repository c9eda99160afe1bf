"""The part of Helm's template language that the chart uses, and nothing beyond it: what is not known here is an error.

Known: `{{ … }}` with `-` on either side, `if`/`else`/`end`, `range`/`end`, fields, "text", pipelines, and the functions
`quote`, `default`, `toYaml`, `nindent`. Unlike Helm, a field that is not there is an error and not an empty string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

_ACTION = re.compile(r"\{\{(-?)\s*(.*?)\s*(-?)\}\}", re.S)
_FIELD = re.compile(r"\.(?:[A-Za-z]\w*(?:\.[A-Za-z]\w*)*)?")


class TemplateError(Exception):
    """A template that this does not understand, or that names what is not there."""


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    action: bool


def render(template: str, context: Mapping[str, Any]) -> str:
    """The template's text, with `context` as `.`; raises TemplateError."""
    tokens = list(_tokens(template))
    text, rest = _block(tokens, context, active=True)
    if rest:
        raise TemplateError(f"{rest[0].text!r} closes nothing")
    return text


def fields(template: str, prefix: str) -> set[str]:
    """Every field below `prefix` that the template names: "a.b" for `.Values.a.b` when the prefix is "Values"."""
    actions = " ".join(match[2] for match in _ACTION.finditer(template))
    return set(re.findall(rf"(?<![\w.])\.{prefix}\.([\w.]+)", actions))


def _tokens(template: str) -> Iterator[_Token]:
    position, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[position : match.start()]
        text = text.lstrip() if trim else text
        yield _Token(text.rstrip() if match[1] else text, action=False)
        yield _Token(match[2], action=True)
        position, trim = match.end(), bool(match[3])
    text = template[position:]
    yield _Token(text.lstrip() if trim else text, action=False)


def _block(tokens: list[_Token], dot: Any, *, active: bool) -> tuple[str, list[_Token]]:
    """The text up to an `else` or `end` that belongs to the caller, and the tokens from there on."""
    written: list[str] = []
    while tokens:
        token, tokens = tokens[0], tokens[1:]
        if not token.action:
            written.append(token.text)
        elif token.text in ("else", "end"):
            return "".join(written), [token, *tokens]
        elif token.text.startswith("if "):
            holds = active and _truth(_pipeline(token.text[3:], dot))
            text, tokens = _block(tokens, dot, active=holds)
            other = ""
            if tokens and tokens[0].text == "else":
                other, tokens = _block(tokens[1:], dot, active=active and not holds)
            tokens = _ended(tokens)
            written.append(text if holds else other)
        elif token.text.startswith("range "):
            items = _pipeline(token.text[6:], dot) if active else []
            if not isinstance(items, list):
                raise TemplateError(f"{token.text!r}: not a list")
            after: list[_Token] = []
            for item in items:
                text, after = _block(tokens, item, active=True)
                written.append(text)
            tokens = _ended(after if items else _block(tokens, dot, active=False)[1])
        elif active:
            written.append(_printed(_pipeline(token.text, dot)))
    return "".join(written) if active else "", tokens


def _ended(tokens: list[_Token]) -> list[_Token]:
    if not tokens or tokens[0].text != "end":
        raise TemplateError("an `if` or `range` without its `end`")
    return tokens[1:]


def _pipeline(text: str, dot: Any) -> Any:
    first, *stages = (stage.strip() for stage in text.split("|"))
    name, *arguments = first.split()
    value = _call(name, [_operand(one, dot) for one in arguments]) if arguments else _operand(name, dot)
    for stage in stages:
        name, *arguments = stage.split()
        value = _call(name, [*(_operand(one, dot) for one in arguments), value])
    return value


def _operand(text: str, dot: Any) -> Any:
    if re.fullmatch(r'"[^"\\]*"|\d+', text):
        return json.loads(text)
    if not _FIELD.fullmatch(text):
        raise TemplateError(f"{text!r} is not known here")
    value = dot
    for name in filter(None, text.split(".")):
        if not isinstance(value, Mapping) or name not in value:
            raise TemplateError(f"there is no {text}")
        value = value[name]
    return value


def _call(name: str, arguments: list[Any]) -> Any:
    match name, arguments:
        case "quote", [value]:
            return json.dumps(_printed(value), ensure_ascii=False)
        case "default", [otherwise, value]:
            return value if _truth(value) else otherwise
        case "toYaml", [value]:
            return yaml.safe_dump(value, default_flow_style=False, allow_unicode=True).removesuffix("\n...\n").rstrip()
        case "nindent", [int(width), str(value)]:
            return "\n" + "\n".join(" " * width + line if line else line for line in value.split("\n"))
    raise TemplateError(f"{name!r} with {len(arguments)} arguments is not known here")


def _truth(value: Any) -> bool:
    return bool(value)  # Go's templates: false, 0, nil, and whatever is empty


def _printed(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str() | int():
            return str(value)
    raise TemplateError(f"{type(value).__name__} cannot be printed as it is; use toYaml or quote")
