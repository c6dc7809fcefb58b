"""A run's figures for Prometheus: a page on loopback, a file for node_exporter, or both."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, write_to_textfile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blindtune.client.metrics import Collector
from blindtune.client.rounds.multiplier import PrivateMultiplier
from blindtune.common.listening import host_and_port, is_loopback
from blindtune.common.metrics_page import MetricsPage
from blindtune.errors import ConfigurationError

__all__ = ["Monitor", "monitoring"]

_logger = logging.getLogger(__name__)
_SECONDS = 10


class Monitor(TrainerCallback):
    """Shows the figures of a run's multiplier until it is closed.

    Args:
        listen: ``HOST:PORT`` on loopback of the page ``/metrics``; none if None.
        file: written at each log event and at the end, whole or not at all; none if None. node_exporter
            reads files that end in ``.prom``.

    Attributes:
        address: where the page is.

    Raises:
        ConfigurationError: the page would be open to other machines, its address is taken, or the file can't
            be written.
    """

    def __init__(self, listen: str | None = None, file: Path | None = None) -> None:
        self._registry = CollectorRegistry()
        self._file = file
        self._warned = False
        self._page: MetricsPage | None = None
        self.address: str | None = None
        if file is not None:
            try:
                write_to_textfile(str(file), self._registry)
            except OSError as error:
                raise ConfigurationError(
                    f"--metrics-file {file}: cannot write it: {error.strerror}"
                ) from None
        if listen is not None:
            self._page = _open(listen)
            self.address = self._page.address
            self._page.show(self._registry)

    def watch(self, multiplier: PrivateMultiplier) -> None:
        """Shows this multiplier's figures from now on."""
        self._registry.register(Collector(multiplier))
        self.write()

    def write(self) -> None:
        """Writes the file. A file that can't be written is no reason to lose a run: one warning says so."""
        if self._file is None:
            return
        try:
            write_to_textfile(str(self._file), self._registry)
        except OSError as error:
            if not self._warned:
                _logger.warning("cannot write the metrics to %s: %s", self._file, error.strerror)
            self._warned = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        # The losses that are logged are left where they are.
        self.write()

    def close(self) -> None:
        """Writes the file a last time and takes the page down."""
        self.write()
        if self._page is not None:
            self._page.close()
            self._page = None


def _open(listen: str) -> MetricsPage:
    if not is_loopback(host_and_port(listen)[0]):
        raise ConfigurationError(
            f"--metrics-listen {listen} can be reached from other machines, or leads nowhere: choose "
            "127.0.0.1, or --metrics-file"
        )
    return MetricsPage.open(listen)


@contextlib.contextmanager
def monitoring(listen: str | None, file: Path | None) -> Iterator[Monitor | None]:
    """A monitor for as long as the block runs, where one is wanted."""
    if listen is None and file is None:
        yield None
        return
    monitor = Monitor(listen, file)
    try:
        yield monitor
    finally:
        monitor.close()
