"""What the fuzz tests share: how many examples they run, how valid bytes are spoiled, what a refusal is.

BLINDTUNE_FUZZ_EXAMPLES=5000 runs so many examples of each property, other ones every time. Without it
they are few, and the same in every run.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from blindtune.errors import BlindtuneError

__all__ = ["JSON", "dumped", "examples", "refused_or_fine", "require_plain", "spoiled", "spoiled_json"]

_DEEP = os.environ.get("BLINDTUNE_FUZZ_EXAMPLES")
# What a terminal would obey; a message may have several lines.
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_INTERESTING = (
    b"\0",
    b"\xff" * 10,  # a varint that goes on for too long
    b"\x80",
    b"\x1b[2J",
    b"\xed\xa0\x80",  # half of a surrogate pair, in bytes
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\\ud800",
    b"../",
    b"1" * 5000,
    b"1e999",
    b"NaN",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"&a [*a]",
    b"!!python/object:os.system ",
    "\u202e".encode(),
)


def examples(everyday: int) -> settings:
    """Settings of a property that runs so many examples every day."""
    return settings(
        max_examples=int(_DEEP) if _DEEP else everyday,
        derandomize=_DEEP is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def spoiled(draw: st.DrawFn, valid: st.SearchStrategy[bytes]) -> bytes:
    """Valid bytes with up to four faults: bits flipped, parts cut out, repeated, overwritten, inserted."""
    data = bytearray(draw(valid))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([1, 2, 4, 8, 64, len(data)]))
        match draw(st.sampled_from(["flip", "cut", "truncate", "repeat", "overwrite", "insert"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + length]
            case "truncate":
                del data[at:]
            case "repeat":
                data[at:at] = data[at : at + length]
            case "overwrite":
                new = draw(st.binary(max_size=8))
                data[at : at + len(new)] = new
            case _:
                data[at:at] = draw(st.sampled_from(_INTERESTING) | st.binary(max_size=16))
    return bytes(data)


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


_ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", " ", "\0", "a\nb", "\x1b[2J", "../../etc/passwd", "/etc/passwd", "."),
    *("\u202e", "é", "x" * 5000, "1", "true", "auto", "int8", [], {}, [[]], [0], [None], ["a", "a"]),
    *({"a": 1}, {"": None}, {"__class__": "x"}, _nested(50)),
]
JSON = st.sampled_from(_ODD).map(deepcopy) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
"""Values that JSON can hold, odd ones above all; each drawn value is the caller's to change."""


@st.composite
def spoiled_json(draw: st.DrawFn, valid: Any) -> Any:
    """A JSON value in which up to three parts have other values, are missing, or are new."""
    content = deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        node = content
        while isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key: Any = draw(st.sampled_from(keys))
            inner = node[key]
            if isinstance(inner, dict | list) and inner and draw(st.integers(0, 3)):
                node = inner
                continue
            match draw(st.sampled_from(["replace", "replace", "replace", "delete", "add"])):
                case "replace":
                    node[key] = draw(JSON)
                case "delete":
                    del node[key]
                case _ if isinstance(node, dict):
                    node[draw(st.text(max_size=8))] = draw(JSON)
                case _:
                    node.insert(key, draw(JSON))
            break
    return content


def dumped(content: Any) -> bytes:
    """JSON in a file; what can't be encoded is escaped."""
    return json.dumps(content).encode()


def require_plain(message: str, most: int = 4000) -> None:
    """A message that can be shown: not endless, and nothing in it that a terminal would obey."""
    assert len(message) <= most, len(message)
    found = _CONTROL.search(message)
    assert found is None, (found, message)


@contextmanager
def refused_or_fine(path: Path | str | None = None, most: int = 4000) -> Iterator[None]:
    """The block works, or raises one clear error of ours that names ``path``."""
    try:
        yield
    except BlindtuneError as error:
        message = str(error)
        require_plain(message, most)
        assert path is None or str(path) in message, message
