"""All that a worker receives, written to a folder and read back, by what ``serve --record`` writes."""

import threading
from dataclasses import dataclass
from pathlib import Path

from blindtune.client.audit.transcript import read_transcript
from blindtune.protocol.expansion import Seed
from blindtune.protocol.residues import Residues
from blindtune.server.transcript import TranscriptRecorder
from blindtune.server.wire import Request

__all__ = ["Received", "Recorder", "read_recording"]


class Recorder:
    """Watches a worker; records while it has a folder."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recorder: TranscriptRecorder | None = None

    def record_to(self, folder: Path | None) -> None:
        """Starts recording to a folder without a transcript, or stops."""
        with self._lock:
            if self._recorder is not None:
                self._recorder.close()
            self._recorder = None
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                self._recorder = TranscriptRecorder(folder, "", "")

    def operand(self, request: Request, part: Residues | Seed) -> None:
        with self._lock:
            if self._recorder is not None:
                self._recorder.operand(request, part)


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
    return [
        Received(x.product.label, x.rows, x.columns, x.seed, x.residues)
        for x in read_transcript(folder).operands
    ]
