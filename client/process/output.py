"""Output whose reader may go away, as ``head`` does.

That is no reason to lose work, so nothing is raised: what follows goes nowhere, and `output_closed` says so.
"""

import os
import sys
import threading
from typing import TextIO

from rich.console import Console

__all__ = ["OutputConsole", "close_output", "output_closed"]

_closed = threading.Event()


class OutputConsole(Console):
    """A console that falls silent when its reader has gone."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        close_output(sys.stderr if self.stderr else sys.stdout)


def close_output(stream: TextIO) -> None:
    """Sends the rest nowhere, what is still in the stream's buffer included."""
    _closed.set()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def output_closed() -> bool:
    """Whether a reader of stdout or stderr has gone."""
    return _closed.is_set()
