"""One structured line on stderr for each event, as JSON or as text.

Fields are metadata: shapes, sizes, addresses, times. Tracebacks are printed without the values of
local variables, among which operands would be.
"""

import logging
import sys
from typing import Literal

import structlog

__all__ = ["LogFormat", "configure_logging"]

LogFormat = Literal["json", "text"]


def configure_logging(log_format: LogFormat) -> None:
    """Sends the log of this process to stderr, from INFO on."""
    renderer: structlog.typing.Processor
    if log_format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            exception_formatter=structlog.dev.plain_traceback,
            sort_keys=False,
        )
    before: list[structlog.typing.Processor] = [
        structlog.stdlib.ExtraAdder(),
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    after: list[structlog.typing.Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if log_format == "json":
        after.append(structlog.processors.format_exc_info)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=before, processors=[*after, renderer])
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("blindtune").setLevel(logging.INFO)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_quotes_nobody)


def _quotes_nobody(record: logging.LogRecord) -> bool:
    """Keeps out what gRPC says of metadata that is no text: it quotes them, a token with a wrong byte say."""
    return not str(record.msg).startswith("Invalid encoding")
