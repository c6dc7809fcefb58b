"""Where messages go: people read stderr, programs read JSON on stdout."""

import json
import logging
import sys
from typing import Any

from blindtune.client.process.finite import finite
from blindtune.client.process.output import OutputConsole, close_output

__all__ = ["emit", "fail", "log_as_json", "messages", "promise_events", "results"]

_logger = logging.getLogger(__name__)
_state = {"json": False, "json_log": False}


messages = OutputConsole(stderr=True)
results = OutputConsole()


def promise_events(json: bool) -> None:
    """From now on an error is an event too, if someone asked for events: it may be the first one."""
    _state["json"] = _state["json"] or json


def emit(event: str, **fields: Any) -> None:
    """One line of JSON on stdout, for programs that asked for it with ``--json``."""
    _state["json"] = True
    try:
        sys.stdout.write(json.dumps(finite({"event": event, **fields}), allow_nan=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        close_output(sys.stdout)


def log_as_json() -> None:
    """From now on warnings and errors are lines of JSON on stderr, the one that ends the command included."""
    from blindtune.client.process.log import configure_logging

    _state["json_log"] = True
    configure_logging()


def fail(message: str, code: int) -> None:
    """Says what went wrong on stderr, and on stdout too where events of this command went there."""
    if _state["json_log"]:
        _logger.error(message, extra={"code": int(code)})
    else:
        messages.print(f"blindtune: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    if _state["json"]:
        emit("error", code=code, message=message)
