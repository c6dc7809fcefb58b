"""All that a worker receives, written to a folder: what its operator could keep of a client for ever.

    DIR/transcript.json     format, version, model and fingerprint
    DIR/parts.jsonl         one line for each part of an operand, in the order of arrival
    DIR/operands.bin        the parts themselves, one after the other

A part is a block of an operand's rows (residues, little-endian 32-bit words) or a seed (its key of 32
bytes, then its row offset in 8 bytes, little-endian). Each line of ``parts.jsonl`` is an object:

    part                    its place in this file, from 0
    request                 parts of one operand have the same number
    direction, spans        the product: "forward" or "backward", and [layer, start, stop] for each span
    rows, columns           shape of the whole operand
    parameter_set           its name: "q31" or "q24"
    kind                    "rows" or "seed"
    first_row, part_rows    which of the operand's rows these are; all of them for a seed
    offset, bytes, crc32    where they lie in ``operands.bin``, and their CRC-32 in hexadecimal

Bytes are written before the line that describes them. When a part cannot be written, the recording ends with
the part before it. Nothing here can be executed or refers to another file.
`blindtune.client.audit.transcript` reads it.
"""

import contextlib
import json
import logging
import os
import threading
import weakref
import zlib
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from blindtune.errors import ConfigurationError
from blindtune.protocol.expansion import Seed
from blindtune.protocol.residues import Residues
from blindtune.server.admission.refusals import CannotRecord
from blindtune.server.wire import Request

__all__ = ["TranscriptRecorder", "recording_folder"]

FORMAT, VERSION = "blindtune transcript", 2

_logger = logging.getLogger(__name__)
_REFUSED = "this worker cannot record, and serves nothing that it does not record: ask another one"


@dataclass
class _Begun:
    """A request of which parts have arrived."""

    number: int
    rows: int = 0


def recording_folder(path: Path) -> Path:
    """A folder that only its owner can read: a new one, or one that is there and empty.

    Raises:
        ConfigurationError: it holds something already, or can't be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        occupied = any(path.iterdir())
        if not occupied:
            path.chmod(0o700)
    except OSError as error:
        raise ConfigurationError(
            f"cannot record to {path}: {error.strerror}: choose another folder"
        ) from error
    if occupied:
        raise ConfigurationError(f"cannot record to {path}: it is not empty: choose a new folder")
    return path


class TranscriptRecorder:
    """An observer that writes down every operand. A worker keeps nothing unless it is given one.

    If a part cannot be written (the disk is full, say), its request is refused and so are all later ones:
    a transcript may end early, and has no gaps.

    Args:
        folder: an existing, empty folder.
        model, fingerprint: of what the worker serves.

    Raises:
        ConfigurationError: the files can't be made.
    """

    def __init__(self, folder: Path, model: str, fingerprint: str) -> None:
        header = {
            "format": FORMAT,
            "version": VERSION,
            "model": model,
            "fingerprint": fingerprint,
        }
        with contextlib.ExitStack() as opened:
            try:
                with _private(folder / "transcript.json") as file:
                    _write(file, json.dumps(header).encode() + b"\n")
                self._lines = opened.enter_context(_private(folder / "parts.jsonl"))
                self._data = opened.enter_context(_private(folder / "operands.bin"))
            except OSError as error:
                raise ConfigurationError(
                    f"cannot record to {folder}: {error.strerror}: choose another folder"
                ) from error
            opened.pop_all()
        self._folder = folder
        self._lock = threading.Lock()
        # By identity: two requests may have equal headers. A request that is over takes its entry along.
        self._begun: dict[int, _Begun] = {}
        self._requests = 0
        self._parts = 0
        self._lines_end = 0
        self._offset = 0
        self._ended = False

    def operand(self, request: Request, part: Residues | Seed) -> None:
        """Writes down one part.

        Raises:
            CannotRecord: it can't be written, an earlier one could not, or the transcript is closed.
        """
        if isinstance(part, Seed):
            kind, rows = "seed", request.rows
            content = part.key + part.row_offset.to_bytes(8, "little")
        else:
            kind, rows = "rows", len(part)
            content = part.astype("<u4", copy=False).tobytes()
        with self._lock:
            if self._ended:
                raise CannotRecord(_REFUSED)
            begun = self._begin(request)
            line = {
                "part": self._parts,
                "request": begun.number,
                "direction": request.product.direction.name.lower(),
                "spans": [[span.layer, span.start, span.stop] for span in request.product.spans],
                "rows": request.rows,
                "columns": request.columns,
                "parameter_set": request.parameters.name,
                "kind": kind,
                "first_row": begun.rows,
                "part_rows": rows,
                "offset": self._offset,
                "bytes": len(content),
                "crc32": f"{zlib.crc32(content):08x}",
            }
            described = json.dumps(line).encode() + b"\n"
            try:
                _write(self._data, content)
                _write(self._lines, described)
            except OSError as error:
                self._end_early(error)
                raise CannotRecord(_REFUSED) from error
            self._parts += 1
            self._lines_end += len(described)
            self._offset += len(content)
            begun.rows += rows
            if begun.rows >= request.rows:
                del self._begun[id(request)]

    def close(self) -> None:
        """Ends the transcript; later parts are refused."""
        with self._lock:
            self._ended = True
            self._begun.clear()
            for file in (self._lines, self._data):
                try:
                    file.close()
                except OSError as error:
                    # A network's file system may say only now that there was no room.
                    self._log("the recording may be damaged", error)

    def _begin(self, request: Request) -> _Begun:
        begun = self._begun.get(id(request))
        if begun is None:
            begun = self._begun[id(request)] = _Begun(self._requests)
            self._requests += 1
            # Runs before another request can get the same identity, and needs no lock.
            weakref.finalize(request, self._begun.pop, id(request), None).atexit = False
        return begun

    def _end_early(self, error: OSError) -> None:
        """Leaves a transcript of the parts before the one that could not be written."""
        self._ended = True
        self._log("recording has ended, and all requests are refused from now on", error)
        for file, end in ((self._lines, self._lines_end), (self._data, self._offset)):
            try:
                file.truncate(end)
            except OSError as worse:
                # Whoever reads the transcript finds bytes that nothing describes, and refuses it.
                self._log("the recording is damaged", worse)

    def _log(self, message: str, error: OSError) -> None:
        extra = {"folder": str(self._folder), "reason": error.strerror, "parts": self._parts}
        _logger.error(message, extra=extra)


def _private(path: Path) -> FileIO:
    """A new file without a buffer, so that what was not written is not tried again later."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0)


def _write(file: FileIO, content: bytes) -> None:
    """All of it: a disk that has room for a part of it takes that part, and says so only the next time."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
