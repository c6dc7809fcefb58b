"""Does the memory of a process hold certain bytes? Asked from outside, while it runs."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["NEEDLE_BYTES", "found_in_memory"]

NEEDLE_BYTES = 16
_PIECE = 64 << 20


@njit(cache=True)
def _hits(data, firsts, filter_, hits):  # type: ignore[no-untyped-def]
    """Marks which of ``firsts``, 8-byte words, occur at any offset."""
    word = np.uint64(0)
    for i in range(data.shape[0]):
        word = (word >> np.uint64(8)) | (np.uint64(data[i]) << np.uint64(56))
        if filter_[word & np.uint64(0xFFFF)]:
            for k in range(firsts.shape[0]):
                if firsts[k] == word:
                    hits[k] = True


def found_in_memory(pid: int, needles: Mapping[str, bytes]) -> set[str]:
    """Which needles, of `NEEDLE_BYTES` each, lie in a process's own memory or the data that it maps.

    Raises:
        PermissionError: this process may not look into that one.
    """
    names = list(needles)
    firsts = np.array([int.from_bytes(needles[name][:8], "little") for name in names], np.uint64)
    filter_ = np.zeros(1 << 16, np.bool_)
    filter_[(firsts & np.uint64(0xFFFF)).astype(np.int64)] = True
    found: set[str] = set()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for start, stop in _regions(pid):
            for piece_start in range(start, stop, _PIECE):
                # Pieces overlap, so that no needle is cut in two.
                length = min(_PIECE + NEEDLE_BYTES, stop - piece_start)
                try:
                    memory.seek(piece_start)
                    piece = memory.read(length)
                except (OSError, ValueError, OverflowError):
                    continue  # unmapped since, or a region of the kernel's
                hits = np.zeros(len(names), np.bool_)
                data: NDArray[np.uint8] = np.frombuffer(piece, np.uint8)
                _hits(data, firsts, filter_, hits)
                found |= {names[k] for k in np.flatnonzero(hits) if needles[names[k]] in piece}
    return found


def _regions(pid: int) -> list[tuple[int, int]]:
    """Readable memory, without the code of libraries."""
    regions = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, rights, _, _, _, *path = line.split(maxsplit=5)
        if "r" not in rights or "x" in rights or (path and (".so" in path[0] or path[0].startswith("[v"))):
            continue
        start, stop = (int(x, 16) for x in span.split("-"))
        regions.append((start, stop))
    return regions
