"""All that a worker receives, written to a folder and read back.

FOLDER/parts.jsonl      one line for each part of an operand: which request, what product, seed or rows
FOLDER/residues.bin     the rows, one after the other
"""

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from blindtune.protocol.expansion import Seed
from blindtune.protocol.residues import Residues
from blindtune.server.wire import Request

__all__ = ["Received", "Recorder", "read_recording"]


class Recorder:
    """Watches a worker; records while it has a folder."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: tuple[TextIO, BinaryIO] | None = None
        self._requests: list[Request] = []

    def record_to(self, folder: Path | None) -> None:
        """Starts recording to a folder, or stops."""
        with self._lock:
            for file in self._files or ():
                file.close()
            self._files = None
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                self._files = open(folder / "parts.jsonl", "a"), open(folder / "residues.bin", "ab")

    def operand(self, request: Request, part: Residues | Seed) -> None:
        with self._lock:
            if self._files is None:
                return
            # Parts of one request come with the very same header; it is kept, so its identity is its own.
            known = [i for i, other in enumerate(self._requests) if other is request]
            number = known[0] if known else len(self._requests)
            if not known:
                self._requests.append(request)
            line = {
                "request": number,
                "product": request.product.label,
                "rows": request.rows,
                "columns": request.columns,
            }
            if isinstance(part, Seed):
                line |= {"key": part.key.hex(), "row_offset": part.row_offset}
            else:
                line |= {"bytes": part.nbytes}
                self._files[1].write(part.tobytes())
                self._files[1].flush()
            self._files[0].write(json.dumps(line) + "\n")
            self._files[0].flush()


@dataclass(frozen=True, eq=False)
class Received:
    """One request as a worker got it: a seed or the rows, never both."""

    product: str
    rows: int
    columns: int
    seed: Seed | None
    residues: Residues | None

    @property
    def operand(self) -> bytes:
        """What makes two requests the same."""
        if self.seed is not None:
            return self.seed.key + self.seed.row_offset.to_bytes(8, "little")
        assert self.residues is not None
        return self.residues.tobytes()


def read_recording(folder: Path) -> list[Received]:
    """The requests in the order in which they came."""
    lines = [json.loads(line) for line in (folder / "parts.jsonl").read_text().splitlines()]
    data = (folder / "residues.bin").read_bytes()
    parts: dict[int, list[bytes]] = {}
    heads = {}
    position = 0
    for line in lines:
        heads.setdefault(line["request"], line)
        if "bytes" in line:
            parts.setdefault(line["request"], []).append(data[position : position + line["bytes"]])
            position += line["bytes"]
    assert position == len(data)
    received = []
    for number, head in heads.items():
        seed = Seed(bytes.fromhex(head["key"]), head["row_offset"]) if "key" in head else None
        residues = None
        if seed is None:
            residues = np.frombuffer(b"".join(parts[number]), "<u4").reshape(-1, head["columns"])
        received.append(Received(head["product"], head["rows"], head["columns"], seed, residues))
    return received
