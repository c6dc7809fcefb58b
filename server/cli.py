"""The command ``blindtune-worker``.

Every option has a twin in the environment, ``BLINDTUNE_WORKER_...``, shown by ``--help``.
"""

import json
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import torch
import typer

from blindtune.checkpoint import Checkpoint
from blindtune.protocol.errors import BlindtuneError, ConfigurationError
from blindtune.protocol.weights import model_fingerprint
from blindtune.server.daemon import RunningWorker, serve
from blindtune.server.limits import Limits
from blindtune.server.log import LogFormat, configure_logging
from blindtune.server.memory import usable_device
from blindtune.server.service import software_version
from blindtune.server.store import LayerStore, layer_fingerprints
from blindtune.server.transport import Endpoint, TlsFiles

__all__ = ["app", "main"]

_logger = logging.getLogger(__name__)

app = typer.Typer(
    name="blindtune-worker",
    help="Holds a model's frozen layers and multiplies masked matrices by them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    # Pretty tracebacks print local variables, among which operands would be.
    pretty_exceptions_enable=False,
)


def _twin(name: str) -> str:
    return f"BLINDTUNE_WORKER_{name}"


_Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a model on the hub.", envvar=_twin("REVISION")),
]
_Log = Annotated[
    LogFormat, typer.Option(help="How events are written to stderr.", envvar=_twin("LOG_FORMAT"))
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blindtune-worker {software_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command("serve")
def _serve(
    model: Annotated[
        str, typer.Option(help="Checkpoint folder, or a model on the hub.", envvar=_twin("MODEL"))
    ],
    listen: Annotated[
        str,
        typer.Option(help="HOST:PORT; port 0 takes any free one.", envvar=_twin("LISTEN")),
    ],
    revision: _Revision = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", envvar=_twin("DEVICE"))] = "cpu",
    tls_cert: Annotated[
        Path | None, typer.Option(help="The worker's certificate (PEM).", envvar=_twin("TLS_CERT"))
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="The certificate's key (PEM).", envvar=_twin("TLS_KEY"))
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(help="CA of the clients that are let in (PEM).", envvar=_twin("TLS_CLIENT_CA")),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plaintext, on loopback only.", envvar=_twin("INSECURE"))
    ] = False,
    max_rows: Annotated[
        int, typer.Option(help="Rows of one operand.", envvar=_twin("MAX_ROWS"))
    ] = Limits().max_rows,
    max_operand_bytes: Annotated[
        int, typer.Option(help="Bytes of one operand.", envvar=_twin("MAX_OPERAND_BYTES"))
    ] = Limits().max_operand_bytes,
    max_concurrent: Annotated[
        int, typer.Option(help="Requests at the same time.", envvar=_twin("MAX_CONCURRENT"))
    ] = Limits().max_concurrent,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of one product; all cores unless given.", envvar=_twin("THREADS")),
    ] = None,
    drain_seconds: Annotated[
        float,
        typer.Option(min=0, help="Time for running requests at shutdown.", envvar=_twin("DRAIN_SECONDS")),
    ] = 30.0,
    log_format: _Log = "json",
) -> None:
    """Load a model and serve it until SIGTERM or SIGINT.

    Once it serves, one line of JSON on stdout says where: {"event": "listening", "address": ...}.
    """
    configure_logging(log_format)
    endpoint = Endpoint.parse(listen, _tls_files(tls_cert, tls_key, tls_client_ca), insecure)
    if endpoint.tls:
        endpoint.tls.credentials()  # a wrong file shows now, and not after minutes of loading
    limits = Limits(max_rows, max_operand_bytes, max_concurrent)
    where = usable_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    store = LayerStore.load(Checkpoint.open(model, revision), where)
    stop = _stop_on_signals()
    worker = serve(store, endpoint, limits=limits)
    _announce(worker, store)
    stop.wait()
    _logger.info("draining", extra={"requests": worker.requests_inside, "seconds": drain_seconds})
    if not worker.stop(drain_seconds):
        _logger.warning("requests were cut off", extra={"seconds": drain_seconds})
    _logger.info("stopped")


@app.command("fingerprint")
def _fingerprint(
    model: Annotated[
        str, typer.Argument(help="Checkpoint folder, or a model on the hub.", envvar=_twin("MODEL"))
    ],
    revision: _Revision = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="List every layer as well.", envvar=_twin("LAYERS"))
    ] = False,
    log_format: _Log = "text",
) -> None:
    """Print the fingerprint of a model's frozen layers, to compare with a client's or a worker's."""
    configure_logging(log_format)
    fingerprints = layer_fingerprints(Checkpoint.open(model, revision))
    typer.echo(f"{model_fingerprint(fingerprints)}  {model}")
    if layers:
        for name, fingerprint in fingerprints.items():
            typer.echo(f"{fingerprint}  {name}")


def main() -> None:
    """Runs the command; an expected error becomes one line on stderr and exit code 1."""
    try:
        app()
    except BlindtuneError as error:
        typer.echo(f"blindtune-worker: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


def _tls_files(cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    if cert and key and client_ca:
        return TlsFiles(cert, key, client_ca)
    if cert or key or client_ca:
        raise ConfigurationError("--tls-cert, --tls-key and --tls-client-ca belong together: give all three")
    return None


def _stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set. More of them change nothing: supervisors often send two."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _announce(worker: RunningWorker, store: LayerStore) -> None:
    line = {
        "event": "listening",
        "address": worker.address,
        "port": worker.port,
        "model": store.model,
        "fingerprint": store.fingerprint,
    }
    print(json.dumps(line), flush=True)
    _logger.info("listening", extra={k: v for k, v in line.items() if k != "event"})
