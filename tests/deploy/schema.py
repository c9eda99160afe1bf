"""The part of JSON Schema that values.schema.json uses; a keyword that is not known here is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
_SILENT = {"$schema", "if", "then", "properties", "additionalProperties"}


def problems(value: Any, schema: Mapping[str, Any], where: str = "values") -> Iterator[str]:
    """What is wrong with a value, one line each. Raises KeyError for a keyword that is not known here."""
    for keyword, wanted in schema.items():
        if keyword not in _SILENT and not _holds(keyword, wanted, value):
            yield f"{where}: {value!r} is against {keyword} = {wanted!r}"
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        for name, one in value.items():
            if name in known:
                yield from problems(one, known[name], f"{where}.{name}")
            elif others is False:
                yield f"{where}: {name!r} is not known"
            elif isinstance(others, dict):
                yield from problems(one, others, f"{where}.{name}")
    if isinstance(value, list) and "items" in schema:
        for index, one in enumerate(value):
            yield from problems(one, schema["items"], f"{where}[{index}]")
    if "if" in schema and not list(problems(value, schema["if"], where)):
        yield from problems(value, schema["then"], where)


def _holds(keyword: str, wanted: Any, value: Any) -> bool:
    match keyword:
        case "type":
            right = isinstance(value, _TYPES[wanted])
            return right and (wanted == "boolean" or not isinstance(value, bool))
        case "required":
            return not isinstance(value, dict) or set(wanted) <= set(value)
        case "enum":
            return value in wanted
        case "const":
            return bool(value == wanted)
        case "pattern":
            return not isinstance(value, str) or re.search(wanted, value) is not None
        case "minLength":
            return not isinstance(value, str) or len(value) >= wanted
        case "minimum":
            return not isinstance(value, int) or value >= wanted
        case "maximum":
            return not isinstance(value, int) or value <= wanted
        case "items":
            return True
    raise KeyError(keyword)
