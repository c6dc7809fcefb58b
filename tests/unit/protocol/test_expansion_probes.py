"""The check of a device's expansion: it accepts a right one, and notices ways in which one can be wrong."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from chacha20_reference import library_stream

from blindtune.protocol.multiplication import exactness
from blindtune.protocol.multiplication.exactness import exact_method
from blindtune.protocol.multiplication.expansion_probes import probes
from blindtune.protocol.multiplication.methods import FloatProduct, Method
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import Q31

WORD = 0x7FFFFFFF


def words(
    rows: SeededRows, stream: int, row_of: Callable[[int, int], int] = lambda a, b: a + b
) -> np.ndarray:
    """The words of a stream for all elements, top bits cleared, from a library's cipher.

    Args:
        rows: which elements.
        stream: which stream.
        row_of: the row of the seed's matrix, from the first one and how many follow it.
    """
    width = rows.first_column + rows.columns
    found = []
    for k in range(rows.rows):
        row = row_of(rows.seed.row_offset, k)
        nonce = stream.to_bytes(4, "little") + row.to_bytes(8, "little")
        found.append(library_stream(rows.seed.key, 0, nonce, width)[rows.first_column :] & WORD)
    return np.stack(found)


def drawn(
    rows: SeededRows, bound: int = Q31.modulus, streams: tuple[int, ...] = (0, 1, 2), **how: object
) -> np.ndarray:
    """For each element the first word below a bound, or the last one drawn."""
    found = words(rows, streams[0], **how)  # type: ignore[arg-type]
    for stream in streams[1:]:
        found = np.where(found >= bound, words(rows, stream, **how), found)  # type: ignore[arg-type]
    return found.astype(np.uint32)


def low_word_carries_nowhere(first: int, k: int) -> int:
    return (first >> 32 << 32) | ((first + k) & 0xFFFFFFFF)


WRONG: dict[str, Callable[[SeededRows], np.ndarray]] = {
    "takes any word": lambda rows: drawn(rows, streams=(0,)),
    "draws again only once": lambda rows: drawn(rows, streams=(0, 1)),
    "skips a stream": lambda rows: drawn(rows, streams=(0, 2, 3)),
    "draws the same stream again": lambda rows: drawn(rows, streams=(0, 1, 1)),
    "takes q": lambda rows: drawn(rows, bound=Q31.modulus + 1),
    "rejects q - 1": lambda rows: drawn(rows, bound=Q31.modulus - 1),
    "forgets the high word of the row": lambda rows: drawn(rows, row_of=lambda a, b: (a + b) & 0xFFFFFFFF),
    "forgets the carry": lambda rows: drawn(rows, row_of=low_word_carries_nowhere),
    "repeats the first row": lambda rows: drawn(rows, row_of=lambda a, b: a),
    "forgets the first column": lambda rows: drawn(SeededRows(rows.seed, *rows.shape)),
    "leaves out all but the first columns": lambda rows: np.where(
        np.arange(rows.columns) < 1024, drawn(rows), 0
    ),
    "leaves out all but the first rows": lambda rows: np.where(
        np.arange(rows.rows)[:, None] < 8, drawn(rows), 0
    ),
    "leaves out what lies in one block more": lambda rows: np.where(
        np.arange(rows.columns) + rows.first_column % 16 < -(-rows.columns // 512) * 512, drawn(rows), 0
    ),
    "begins at the block of the first column": lambda rows: drawn(
        SeededRows(rows.seed, *rows.shape, rows.first_column // 16 * 16)
    ),
}


class Device(FloatProduct):
    """A method with an expansion of its own."""

    def __init__(self, expansion: Callable[[SeededRows], np.ndarray]) -> None:
        super().__init__(Q31, torch.device("cpu"))
        self.expand = lambda rows: self.prepare(expansion(rows))


def chosen(monkeypatch: pytest.MonkeyPatch, method: Method) -> tuple[Method, list[str]]:
    said: list[str] = []
    monkeypatch.setattr(exactness, "int8_methods", lambda parameters, device: [method])
    return exact_method([7], Q31, "cpu", said.append), said


def test_a_right_expansion_is_kept_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    method = Device(drawn)
    found, said = chosen(monkeypatch, method)
    assert found is method and method.expand is not None and not said


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_expansion_is_left_to_the_host_and_the_product_is_kept(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Device(WRONG[how])
    found, said = chosen(monkeypatch, method)
    assert found is method and method.expand is None
    assert len(said) == 1 and "differs from the host's" in said[0] and "the host expands" in said[0]


def test_an_expansion_that_does_not_run_is_left_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    class CompilationError(Exception):
        pass

    def expansion(rows: SeededRows) -> np.ndarray:
        raise CompilationError("no such instruction")

    found, said = chosen(monkeypatch, Device(expansion))
    assert found.expand is None
    assert len(said) == 1 and "no such instruction" in said[0] and "the host expands" in said[0]


def test_a_lack_of_memory_is_no_wrong_expansion(monkeypatch: pytest.MonkeyPatch) -> None:
    def expansion(rows: SeededRows) -> np.ndarray:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        chosen(monkeypatch, Device(expansion))


def test_the_probes_hold_the_rare_words_that_they_are_for() -> None:
    first = [words(rows, 0) for rows in probes(Q31)]
    assert [int((w >= Q31.modulus).sum()) > 0 for w in first] == [
        *(True, True, True, False, True, True),
        *(False, False),
    ]
    assert any((w == Q31.modulus).any() for w in first)
    assert any((w == Q31.modulus - 1).any() for w in first)
    again = [
        np.where(w >= Q31.modulus, words(rows, 1), 0) for w, rows in zip(first, probes(Q31), strict=True)
    ]
    assert [bool((w >= Q31.modulus).any()) for w in again] == [True, True] + 6 * [False]
