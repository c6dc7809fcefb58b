"""All that a worker receives, written to a folder: what its operator could keep of a client for ever.

    DIR/transcript.json     format, version, modulus, model and fingerprint
    DIR/parts.jsonl         one line for each part of an operand, in the order of arrival
    DIR/operands.bin        the parts themselves, one after the other

A part is a block of an operand's rows (residues, little-endian 32-bit words) or a seed (its key of 32
bytes, then its row offset in 8 bytes, little-endian). Each line of ``parts.jsonl`` is an object:

    part                    its place in this file, from 0
    request                 parts of one operand have the same number
    direction, spans        the product: "forward" or "backward", and [layer, start, stop] for each span
    rows, columns           shape of the whole operand
    kind                    "rows" or "seed"
    first_row, part_rows    which of the operand's rows these are; all of them for a seed
    offset, bytes, crc32    where they lie in ``operands.bin``, and their CRC-32 in hexadecimal

Bytes are written before the line that describes them. Nothing here can be executed or refers to
another file. `blindtune.client.audit.transcript` reads it.
"""

import json
import os
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from blindtune.protocol.errors import ConfigurationError
from blindtune.protocol.expansion import Seed
from blindtune.protocol.parameters import MODULUS
from blindtune.protocol.residues import Residues
from blindtune.server.wire import Request

__all__ = ["TranscriptRecorder", "recording_folder"]

FORMAT, VERSION = "blindtune transcript", 1


@dataclass
class _Begun:
    """A request of which parts have arrived. Keeping the header keeps its identity its own."""

    request: Request
    number: int
    rows: int = 0


def recording_folder(path: Path) -> Path:
    """Creates a folder that only its owner can read.

    Raises:
        ConfigurationError: it holds something already, or can't be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        occupied = any(path.iterdir())
    except OSError as error:
        raise ConfigurationError(
            f"cannot record to {path}: {error.strerror}: choose another folder"
        ) from error
    if occupied:
        raise ConfigurationError(f"cannot record to {path}: it is not empty: choose a new folder")
    return path


class TranscriptRecorder:
    """An observer that writes down every operand. A worker keeps nothing unless it is given one.

    If a part cannot be written (the disk is full, say), its request fails: a transcript has no gaps.

    Args:
        folder: an existing, empty folder.
        model, fingerprint: of what the worker serves.
    """

    def __init__(self, folder: Path, model: str, fingerprint: str) -> None:
        header = {
            "format": FORMAT,
            "version": VERSION,
            "modulus": MODULUS,
            "model": model,
            "fingerprint": fingerprint,
        }
        with _private(folder / "transcript.json") as file:
            file.write(json.dumps(header).encode() + b"\n")
        self._lines: TextIO = os.fdopen(_open(folder / "parts.jsonl"), "w", encoding="utf-8")
        self._data: BinaryIO = _private(folder / "operands.bin")
        self._lock = threading.Lock()
        self._begun: dict[int, _Begun] = {}
        self._requests = 0
        self._parts = 0
        self._offset = 0

    def operand(self, request: Request, part: Residues | Seed) -> None:
        if isinstance(part, Seed):
            kind, rows = "seed", request.rows
            content = part.key + part.row_offset.to_bytes(8, "little")
        else:
            kind, rows = "rows", len(part)
            content = part.astype("<u4", copy=False).tobytes()
        with self._lock:
            begun = self._begun.get(id(request))
            if begun is None:
                begun = self._begun[id(request)] = _Begun(request, self._requests)
                self._requests += 1
            line = {
                "part": self._parts,
                "request": begun.number,
                "direction": request.product.direction.name.lower(),
                "spans": [[span.layer, span.start, span.stop] for span in request.product.spans],
                "rows": request.rows,
                "columns": request.columns,
                "kind": kind,
                "first_row": begun.rows,
                "part_rows": rows,
                "offset": self._offset,
                "bytes": len(content),
                "crc32": f"{zlib.crc32(content):08x}",
            }
            self._data.write(content)
            self._data.flush()
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
            self._parts += 1
            self._offset += len(content)
            begun.rows += rows
            if begun.rows >= request.rows:
                del self._begun[id(request)]

    def close(self) -> None:
        """Ends the transcript; later parts are refused."""
        with self._lock:
            self._lines.close()
            self._data.close()


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _private(path: Path) -> BinaryIO:
    return os.fdopen(_open(path), "wb")
