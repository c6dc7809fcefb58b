"""Where messages go: people read stderr, programs read JSON on stdout."""

import json
import sys
from typing import Any

from rich.console import Console

__all__ = ["emit", "fail", "messages", "results"]

messages = Console(stderr=True)
results = Console()
_state = {"json": False}


def emit(event: str, **fields: Any) -> None:
    """One line of JSON on stdout, for programs that asked for it with ``--json``."""
    _state["json"] = True
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def fail(message: str, code: int) -> None:
    """Says what went wrong on stderr, and on stdout too where events of this command went there."""
    messages.print(f"blindtune: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    if _state["json"]:
        emit("error", code=code, message=message)
