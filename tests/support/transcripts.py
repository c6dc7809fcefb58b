"""Transcripts on disk, as a worker writes them, of whatever operands a test wants."""

from collections.abc import Iterable
from pathlib import Path

from blindtune.client.audit.transcript import Operand
from blindtune.server.transcript import TranscriptRecorder, recording_folder
from blindtune.server.wire import Request

__all__ = ["write_transcript"]


def write_transcript(
    folder: Path, operands: Iterable[Operand], fingerprint: str = "", block: int = 1 << 20
) -> Path:
    """Writes operands with the worker's own recorder, rows in blocks."""
    recorder = TranscriptRecorder(recording_folder(folder), "a model", fingerprint)
    for operand in operands:
        request = Request(operand.product, operand.rows, operand.columns, 8, operand.parameters, operand.seed)
        if operand.seed is not None:
            recorder.operand(request, operand.seed)
        else:
            words = operand.words()
            for start in range(0, len(words), block):
                recorder.operand(request, words[start : start + block])
    recorder.close()
    return folder
