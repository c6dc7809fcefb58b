"""Canonical JSON: one sequence of bytes for each value, so that it can be hashed and signed.

The values are those of which Python's ``json`` writes what RFC 8785 asks for: objects whose names are ASCII,
lists, texts, booleans, null, and whole numbers that every JSON reader keeps exactly. Floating-point numbers
are refused, since their digits are where implementations differ; a record holds them as texts. The package
``rfc8785`` writes them, and reads nothing: what is left for it to do here is one call of ``json``.
"""

import json
from typing import Any

__all__ = ["LARGEST", "canonical", "parse_canonical"]

LARGEST = 2**53 - 1
"""The largest whole number that a reader with floating-point numbers keeps."""


def canonical(value: Any) -> bytes:
    """A value's canonical form, in UTF-8.

    Raises:
        ValueError: it holds something else than is said above.
    """
    _require_plain(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()  # half of a surrogate pair is a UnicodeEncodeError, which is a ValueError


def parse_canonical(content: bytes) -> Any:
    """The value of a canonical form.

    Raises:
        ValueError: this is no JSON, or not the canonical form of what it says.
    """
    try:
        value = json.loads(content.decode())
        written = canonical(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if written != content:
        raise ValueError("not in canonical form")
    return value


def _require_plain(value: Any) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str) or not name.isascii():
                raise ValueError("the names of an object should be ASCII texts")
            _require_plain(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _require_plain(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > LARGEST:
            raise ValueError("a whole number is too large")
    elif value is not None and not isinstance(value, str | bool):
        raise ValueError(f"no canonical form for a {type(value).__name__}")
