"""What pydantic found wrong with a document that a person wrote, as one sentence about one key."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pydantic import ValidationError

from .errors import did_you_mean


def complaint(
    error: ValidationError, known: Callable[[list[str]], Iterable[str]], *, whole: str = "document", missing: str = ""
) -> tuple[str, str]:
    """The first complaint: what is wrong, and what to do about it, for an error's `what` and `hint`.

    Args:
        known: the keys that the section at a path has; for an unknown one, the nearest is named.
        whole: what the document is called.
        missing: what to do about a key that is missing.
    """
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path) or whole
    match first["type"]:
        case "extra_forbidden":
            return f"unknown key '{key}'", did_you_mean(path[-1], known(path[:-1]))
        case "missing":
            return f"'{key}' is missing", missing
        case "value_error":
            wrong = str(first["ctx"]["error"])
            return f"{key}: {wrong}" if path else wrong, ""
        case "literal_error":
            return f"{key} = {first['input']!r} is not one of {first['ctx']['expected']}", ""
        case _:
            return f"{key} = {first['input']!r}: {first['msg']}", ""
