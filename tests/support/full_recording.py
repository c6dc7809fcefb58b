"""Records to disks of all sizes, from nearly nothing to enough, and reads back what they took.

    unshare --user --map-root-user --mount python full_recording.py FOLDER

In a mount namespace of its own it mounts a file system of its own at FOLDER, again and again, each time a
page larger, and prints a line of JSON for each.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from blindtune.client.audit.transcript import read_transcript
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, Product, Span
from blindtune.server.admission.refusals import CannotRecord
from blindtune.server.transcript import TranscriptRecorder, recording_folder
from blindtune.server.wire import Request

PAGE = os.sysconf("SC_PAGESIZE")
PARTS = 24
PRODUCT = Product(Direction.FORWARD, (Span("query", 0, 8),))


def _attempt(folder: Path) -> dict[str, object]:
    # Three quarters of a page, so that both files come to need a page at all sorts of times.
    words = np.arange(PARTS * PAGE * 3 // 16, dtype=np.uint32).reshape(PARTS, -1, 8)
    recorder = TranscriptRecorder(recording_folder(folder), "", "")
    taken = []
    for part in words:
        try:
            recorder.operand(Request(PRODUCT, len(part), 8, 8, Q31, None), part)
            taken.append(True)
        except CannotRecord:
            taken.append(False)
    recorder.close()
    found = read_transcript(folder).operands
    exact = all(np.array_equal(x.words(), y) for x, y in zip(found, words, strict=False))
    return {"taken": taken, "found": len(found), "exact": exact}


def main(folder: Path) -> None:
    """Tries one page after the other until everything fits."""
    size, fits = PAGE, False
    while not fits:
        options = f"size={size},nr_inodes=16"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
        outcome = _attempt(folder / "recording")
        subprocess.run(["umount", folder], check=True)
        print(json.dumps(outcome), flush=True)
        size, fits = size + PAGE, outcome["found"] == PARTS


if __name__ == "__main__":
    main(Path(sys.argv[1]))
