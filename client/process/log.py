"""Warnings and errors as JSON, a line on stderr for each, for machines that collect logs.

The fields are those of the worker's log: event, level, logger, timestamp, and exception where there is one.
Tracebacks are printed without the values of local variables, among which private data would be.
"""

import logging
import sys
from types import TracebackType

import structlog

__all__ = ["configure_logging", "json_formatter"]

_logger = logging.getLogger(__name__)


def json_formatter() -> logging.Formatter:
    """Makes a line of JSON of a log record."""
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.ExtraAdder(),
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
    )


def configure_logging() -> None:
    """Sends the warnings and errors of this process to stderr as JSON, an error that ends it included."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(json_formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _log_the_end


def _log_the_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _logger.critical("an error that nobody foresaw", exc_info=(kind, error, trace))
