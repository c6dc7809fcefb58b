"""What a worker received: recordings of ``blindtune-worker serve --record``, read and checked.

The format is described in `blindtune.server.transcript`: ``transcript.json``, ``parts.jsonl`` and
``operands.bin``. Whatever does not fit together is refused, since an audit of half a recording would say
too little.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from blindtune.errors import DataError
from blindtune.protocol.expansion import KEY_BYTES, Seed
from blindtune.protocol.lattice.parameters import DEGREE
from blindtune.protocol.parameters import PARAMETER_SETS, ParameterSet
from blindtune.protocol.products import Direction, Product, Span
from blindtune.protocol.residues import Residues, centre, subtract

__all__ = ["Operand", "Transcript", "read_transcript"]

HEADER, PARTS, DATA = "transcript.json", "parts.jsonl", "operands.bin"
_SEED_BYTES = KEY_BYTES + 8
_LARGEST_OPERAND = 1 << 31
_MOST_RANK = 8

_Count = Annotated[int, Field(ge=1, strict=True)]
_Index = Annotated[int, Field(ge=0, strict=True)]


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal["blindtune transcript"]
    version: Literal[2]
    model: str
    fingerprint: str


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    part: _Index
    request: _Index
    direction: Literal["forward", "backward"]
    spans: Annotated[list[tuple[str, _Index, _Count]], Field(min_length=1)]
    rows: _Count
    columns: _Count
    parameter_set: str
    kind: Literal["rows", "seed"]
    first_row: _Index
    part_rows: _Count
    offset: _Index
    bytes: _Count
    crc32: Annotated[str, Field(pattern="^[0-9a-f]{8}$")]

    @field_validator("parameter_set")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in PARAMETER_SETS:
            raise ValueError(f"there is no parameter set {name}, but {', '.join(PARAMETER_SETS)}")
        return name

    def parameters(self) -> ParameterSet:
        return PARAMETER_SETS[self.parameter_set]

    def product(self) -> Product:
        return Product(Direction[self.direction.upper()], tuple(Span(*span) for span in self.spans))


@dataclass(frozen=True, eq=False)
class Operand:
    """One request as a worker got it.

    Attributes:
        product: the matrix that it was to be multiplied by.
        rows, columns: shape that the request announced.
        parameters: the modulus of its words.
        residues: uint32 [rows, columns], or fewer rows if the client went away; None for a seed.
        seed: what the operand is expanded from, or None.
    """

    product: Product
    rows: int
    columns: int
    parameters: ParameterSet
    residues: Residues | None = field(default=None, repr=False)
    seed: Seed | None = field(default=None, repr=False)

    @property
    def arrived(self) -> int:
        """Rows that arrived; all of them for a seed."""
        return self.rows if self.residues is None else len(self.residues)

    def words(self) -> Residues:
        """uint32 [rows, columns]: what was multiplied."""
        return self._expanded if self.residues is None else self.residues

    @cached_property
    def _expanded(self) -> Residues:
        if self.seed is None:
            raise ValueError("an operand has rows or a seed")
        return self.seed.expand(self.rows, self.columns)

    def first(self, rows: int) -> "Operand":
        """Its first rows."""
        if rows >= self.arrived:
            return self
        return replace(self, rows=rows, residues=None if self.residues is None else self.residues[:rows])

    def centred(self) -> NDArray[np.float64]:
        """float64 [rows, columns]: the words as numbers around zero."""
        return centre(self.words(), self.parameters).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Transcript:
    """Operands in the order in which they arrived.

    Attributes:
        operands: all of them.
        fingerprint: of the model; empty where nobody recorded it.
    """

    operands: Sequence[Operand]
    fingerprint: str = ""

    @property
    def parameters(self) -> ParameterSet:
        """What all its operands are of.

        Raises:
            DataError: there are none, or some are of another parameter set.
        """
        names = sorted({x.parameters.name for x in self.operands})
        if not names:
            raise DataError("the transcript holds no operand: record a worker while a client uses it")
        if len(names) > 1:
            several = " and ".join(names)
            raise DataError(f"the transcript holds operands of {several}: record one client at a time")
        return PARAMETER_SETS[names[0]]

    @classmethod
    def of_training(cls, transcript: "Transcript") -> Self:
        """Without the hints of masking ``lattice``, whose seed is public.

        Only a worker that gets rows is asked for hints. Their key stands for several blocks of 256 rows.
        """
        if all(x.seed is not None for x in transcript.operands):
            return cls(transcript.operands, transcript.fingerprint)
        blocks: dict[bytes, list[tuple[int, int]]] = {}
        for x in transcript.operands:
            if x.seed is not None:
                blocks.setdefault(x.seed.key, []).append((x.rows, x.seed.row_offset))
        hints = {
            key
            for key, found in blocks.items()
            if all(rows == DEGREE and offset % DEGREE == 0 for rows, offset in found)
            and 0 < max(offset for _, offset in found) < _MOST_RANK * DEGREE
        }
        operands = [x for x in transcript.operands if x.seed is None or x.seed.key not in hints]
        return cls(operands, transcript.fingerprint)

    def without_retries(self) -> "Transcript":
        """Each operand once: an answer that got lost is asked for again, with the same bytes.

        That happens before anything else is asked of the same product. What comes back later is no retry.
        """
        kept: list[Operand] = []
        last: dict[Product, int] = {}
        for x in self.operands:
            place = last.get(x.product)
            if place is not None and _repeats(kept[place], x):
                # The first attempt may have been cut off after some rows.
                kept[place] = max(kept[place], x, key=lambda y: y.arrived)
                continue
            last[x.product] = len(kept)
            kept.append(x)
        return Transcript(kept, self.fingerprint)

    def of(self, product: Product) -> list[Operand]:
        """The operands of one product."""
        return [x for x in self.operands if x.product == product]

    def between(self, start: int, stop: int | None = None) -> "Transcript":
        """Some operands, by their place."""
        return Transcript(self.operands[start:stop], self.fingerprint)

    def combined_with(self, other: "Transcript") -> "Transcript":
        """What the last of two colluding operators would see: its operands less the other's masks."""
        if [(x.product, x.rows) for x in self.operands] != [(x.product, x.rows) for x in other.operands]:
            raise ValueError("the two transcripts are not of the same run")
        return Transcript(
            [
                replace(x, residues=subtract(x.words(), y.words(), x.parameters), seed=None)
                for x, y in zip(self.operands, other.operands, strict=True)
            ],
            self.fingerprint,
        )


def _repeats(one: Operand, other: Operand) -> bool:
    """Whether two requests of a product are one and the same, perhaps cut off."""
    if one.rows != other.rows or (one.seed is None) != (other.seed is None):
        return False
    if one.residues is None or other.residues is None:
        return one.seed == other.seed
    rows = min(len(one.residues), len(other.residues))
    return np.array_equal(one.residues[:rows], other.residues[:rows])


def read_transcript(folder: Path) -> Transcript:
    """Reads a recording and checks all of it.

    Raises:
        DataError: a file is missing, damaged or of another version; the message says where.
    """
    try:
        header = _Header.model_validate_json((folder / HEADER).read_bytes())
        lines = (folder / PARTS).read_bytes().split(b"\n")
        size = (folder / DATA).stat().st_size
    except OSError as error:
        raise DataError(f"{folder} is no transcript of a worker: {error}") from error
    except ValidationError as error:
        raise DataError(f"{folder / HEADER}: {_first(error)}; this version reads version 2") from None
    if lines[-1]:
        raise DataError(f"{folder / PARTS}, line {len(lines)}, is cut off: stop the worker before reading")
    parts = [_part(folder / PARTS, number, line) for number, line in enumerate(lines[:-1], 1)]
    data: NDArray[np.uint8] = np.empty(0, np.uint8)
    if size:
        data = np.memmap(folder / DATA, np.uint8, "r")
    return Transcript(list(_operands(folder, parts, data)), header.fingerprint)


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"


def _part(path: Path, number: int, line: bytes) -> _Part:
    try:
        part = _Part.model_validate(json.loads(line))
        product = part.product()
    except ValidationError as error:
        raise DataError(f"{path}, line {number}: {_first(error)}") from None
    except ValueError as error:  # json.JSONDecodeError is one too
        raise DataError(f"{path}, line {number}: {error}") from None
    expected = part.part_rows * part.columns * 4 if part.kind == "rows" else _SEED_BYTES
    problem = None
    if part.part != number - 1:
        problem = f"it is part {part.part}, and {number - 1} is due: lines are missing"
    elif product.contraction != part.columns:
        problem = f"the spans have {product.contraction} columns and the operand {part.columns}"
    elif part.bytes != expected:
        problem = f"it describes {expected} bytes and has {part.bytes}"
    elif part.rows * part.columns * 4 > _LARGEST_OPERAND:
        problem = f"an operand of {part.rows} x {part.columns} is larger than any worker takes"
    elif part.first_row + part.part_rows > part.rows:
        problem = f"its rows end at {part.first_row + part.part_rows} of {part.rows}"
    if problem:
        raise DataError(f"{path}, line {number}: {problem}")
    return part


def _operands(folder: Path, parts: Sequence[_Part], data: NDArray[np.uint8]) -> Iterator[Operand]:
    requests: dict[int, list[tuple[_Part, NDArray[np.uint8]]]] = {}
    end = 0
    for number, part in enumerate(parts, 1):
        where = f"{folder / PARTS}, line {number}"
        if part.offset != end or part.offset + part.bytes > len(data):
            raise DataError(f"{where}: its bytes are not in {folder / DATA}, which has {len(data)}")
        end += part.bytes
        content = data[part.offset : end]
        if zlib.crc32(content.data) != int(part.crc32, 16):
            raise DataError(f"{where}: its bytes in {folder / DATA}, from {part.offset}, were changed")
        before = requests.setdefault(part.request, [])
        rows = sum(x.part_rows for x, _ in before)
        about = (part.product(), part.rows, part.kind, part.parameter_set)
        same = all((x.product(), x.rows, x.kind, x.parameter_set) == about for x, _ in before)
        if part.first_row != rows or not same:
            raise DataError(f"{where}: it does not go on with request {part.request}")
        before.append((part, content))
    if end != len(data):
        raise DataError(f"{folder / DATA} has {len(data)} bytes, and {PARTS} describes {end}")
    for number, blocks in requests.items():
        yield _operand(folder, number, blocks)


def _operand(folder: Path, number: int, blocks: Sequence[tuple[_Part, NDArray[np.uint8]]]) -> Operand:
    first, content = blocks[0]
    parameters = first.parameters()
    if first.kind == "seed":
        key, offset = content[:KEY_BYTES].tobytes(), content[KEY_BYTES:].tobytes()
        try:
            seed = Seed(key, parameters, int.from_bytes(offset, "little"))
        except ValueError as error:
            raise DataError(f"{folder / DATA}: request {number}: {error}") from None
        return Operand(first.product(), first.rows, first.columns, parameters, seed=seed)
    arrays = [x.view("<u4").reshape(part.part_rows, part.columns) for part, x in blocks]
    residues = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    if residues.max() >= parameters.modulus:
        raise DataError(f"{folder / DATA}: request {number} holds a word that is no residue")
    return Operand(first.product(), first.rows, first.columns, parameters, residues)
