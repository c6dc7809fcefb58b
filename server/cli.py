"""The command ``blindtune-worker``.

Every option has a twin in the environment, ``BLINDTUNE_WORKER_...``, shown by ``--help``: see `options`.
"""

import faulthandler
import gc
import json
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import prometheus_client
import typer

from blindtune.common.core_dumps import forbid_core_dumps
from blindtune.common.metrics_page import MetricsPage
from blindtune.errors import BlindtuneError, ConfigurationError
from blindtune.server.admission.limits import Limits
from blindtune.server.admission.tokens import Tokens, add_token
from blindtune.server.log import LogFormat, configure_logging
from blindtune.server.metrics_page import open_page
from blindtune.server.options import GivenLimits, with_twins
from blindtune.server.probe import ProbeTls, probe
from blindtune.server.transport import Endpoint, TlsFiles
from blindtune.server.version import software_version

if TYPE_CHECKING:
    from blindtune.server.daemon import RunningWorker
    from blindtune.server.store import LayerStore

__all__ = ["app", "main"]

_logger = logging.getLogger(__name__)
# To end threads and close the socket, the page and the files, once requests have had their time.
_CLOSING_SECONDS = 5.0

app = typer.Typer(
    name="blindtune-worker",
    help="Holds a model's frozen layers and multiplies masked matrices by them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    # Pretty tracebacks print local variables, among which operands would be.
    pretty_exceptions_enable=False,
)


_Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a model on the hub."),
]
_Insecure = Annotated[bool, typer.Option("--insecure", help="Plaintext, on loopback only.")]
_Quantization = Annotated[
    str,
    typer.Option(help="How weights become integers, as clients configure it: int8, nf4 or nf4-double."),
]
_Log = Annotated[LogFormat, typer.Option(help="How events are written to stderr.")]


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
@with_twins()
def _serve(
    *,
    model: Annotated[str, typer.Option(help="Checkpoint folder, or a model on the hub.")],
    listen: Annotated[
        str,
        typer.Option(help="HOST:PORT; port 0 takes any free one."),
    ],
    revision: _Revision = None,
    quantization: _Quantization = "int8",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    tls_cert: Annotated[Path | None, typer.Option(help="The worker's certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key (PEM).")] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(help="CA of the clients that are let in (PEM)."),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(help="File of the clients' tokens, instead of a client CA."),
    ] = None,
    insecure: _Insecure = False,
    limits: GivenLimits,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of one product; all cores unless given."),
    ] = None,
    drain_seconds: Annotated[
        float,
        typer.Option(min=0, help="Time for running requests at shutdown."),
    ] = 30.0,
    metrics_listen: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of /metrics for Prometheus: plain HTTP on loopback, else with the TLS files."
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="For audits only: write down all that clients send, in a new folder."),
    ] = None,
    log_format: _Log = "json",
) -> None:
    """Load a model and serve it until SIGTERM or SIGINT.

    Once it serves, one line of JSON on stdout says where: {"event": "listening", "address": ...}.
    A message of the protocol has at most 4 MiB, which is no option: both sides must agree on it.
    """
    configure_logging(log_format)
    endpoint = Endpoint.parse(listen, _tls_files(tls_cert, tls_key, tls_client_ca, tokens), insecure, tokens)
    bounds = Limits(**limits)
    _require_usable(endpoint)
    # Who reads the figures shows a certificate: tokens are for the service alone.
    page = open_page(metrics_listen, None if tokens else endpoint.tls) if metrics_listen else None

    # Imported this late, so that a mistake shows at once and the other commands are quick.
    import torch

    from blindtune.checkpoint import Checkpoint
    from blindtune.protocol.weights import scheme_named
    from blindtune.server.daemon import serve
    from blindtune.server.memory import usable_device
    from blindtune.server.rows import workspace_bytes
    from blindtune.server.store import LayerStore
    from blindtune.server.transcript import TranscriptRecorder

    scheme = scheme_named(quantization, "--quantization")
    folder = None if record is None else _recording_loudly(record)
    where = usable_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = Checkpoint.open(model, revision, scheme)
    store = LayerStore.load(checkpoint, where, workspace=workspace_bytes(checkpoint.layers, bounds))
    stop = _stop_on_signals()
    recorder = None
    if folder is not None:
        recorder = TranscriptRecorder(folder, store.model, store.fingerprint)
    worker = serve(store, endpoint, limits=bounds, observer=recorder)
    if page is not None:
        page.show(worker.metrics.registry)
    _announce(worker, store, page)
    stop.wait()
    # A thread that waits for a device or a disk that hangs can't be ended, and would keep the process.
    faulthandler.dump_traceback_later(drain_seconds + _CLOSING_SECONDS, exit=True)
    _logger.info("draining", extra={"requests": worker.requests_inside, "seconds": drain_seconds})
    if not worker.stop(drain_seconds):
        _logger.warning("requests were cut off", extra={"seconds": drain_seconds})
    if page is not None:
        page.close()
    if recorder is not None:
        recorder.close()
    worker.join()
    # What is left is the interpreter's own end, which on a busy machine may take longer than that.
    faulthandler.cancel_dump_traceback_later()
    # It would go through half a million objects of libraries several times, to free what the system frees.
    gc.freeze()
    _logger.info("stopped")


@app.command("fingerprint")
@with_twins()
def _fingerprint(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or a model on the hub.")],
    revision: _Revision = None,
    quantization: _Quantization = "int8",
    layers: Annotated[bool, typer.Option("--layers", help="List every layer as well.")] = False,
    log_format: _Log = "text",
) -> None:
    """Print the fingerprint of a model's frozen layers, to compare with a client's or a worker's."""
    from blindtune.checkpoint import Checkpoint
    from blindtune.protocol.weights import model_fingerprint, scheme_named
    from blindtune.server.store import layer_fingerprints

    configure_logging(log_format)
    scheme = scheme_named(quantization, "--quantization")
    fingerprints = layer_fingerprints(Checkpoint.open(model, revision, scheme))
    typer.echo(f"{model_fingerprint(fingerprints)}  {model}")
    if layers:
        for name, fingerprint in fingerprints.items():
            typer.echo(f"{fingerprint}  {name}")


@app.command("token")
@with_twins(name="TOKEN_NAME")
def _token(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    tokens: Annotated[Path, typer.Option(help="File of the clients' tokens.")],
) -> None:
    """Make a token for a client: its hash goes to the file, and the token, this once, to stdout."""
    typer.echo(add_token(tokens, name))


@app.command("health")
@with_twins("HEALTH_", insecure="INSECURE")
def _health(
    address: Annotated[str, typer.Option(help="HOST:PORT of the worker.")],
    tls_ca: Annotated[
        Path | None,
        typer.Option(help="CA of the worker's certificate (PEM)."),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(help="A client's certificate (PEM), if the worker asks for them."),
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="That certificate's key (PEM).")] = None,
    tls_name: Annotated[
        str | None,
        typer.Option(help="Host that the worker's certificate is for, if it isn't for the address."),
    ] = None,
    insecure: _Insecure = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for an answer.")] = 5.0,
) -> None:
    """End with 0 if a worker serves, and else with 1 and the reason: for health checks of containers."""
    if (tls_cert or tls_key or tls_name) and not tls_ca:
        raise ConfigurationError("--tls-cert, --tls-key and --tls-name need --tls-ca")
    tls = ProbeTls(tls_ca, tls_cert, tls_key, tls_name) if tls_ca else None
    probe(address, tls, insecure, seconds)
    typer.echo("SERVING")


def main() -> None:
    """Runs the command; an expected error becomes one line on stderr and exit code 1."""
    forbid_core_dumps()
    # The time at which each series began would double their number.
    prometheus_client.disable_created_metrics()
    try:
        app()
    except BlindtuneError as error:
        typer.echo(f"blindtune-worker: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


def _tls_files(
    cert: Path | None, key: Path | None, client_ca: Path | None, tokens: Path | None
) -> TlsFiles | None:
    if cert and key and (client_ca or tokens):
        return TlsFiles(cert, key, client_ca)
    if cert or key or client_ca:
        raise ConfigurationError(
            "--tls-cert, --tls-key and --tls-client-ca (or --tokens) belong together: give all three"
        )
    return None


def _require_usable(endpoint: Endpoint) -> None:
    """What is wrong with the files or the address shows now, and not after minutes of loading."""
    if endpoint.tls is not None:
        endpoint.tls.credentials()
    if endpoint.tokens is not None and not len(Tokens(endpoint.tokens)):
        _logger.warning(
            "there are no tokens, so nobody is let in: make one with blindtune-worker token",
            extra={"file": str(endpoint.tokens)},
        )
    endpoint.require_free()


def _recording_loudly(path: Path) -> Path:
    """A folder to record to, and a warning that nobody who starts or watches this worker overlooks."""
    from blindtune.server.transcript import recording_folder

    folder = recording_folder(path)
    warning = "this worker keeps a copy of everything that its clients send"
    typer.echo(f"blindtune-worker: WARNING: {warning}, in {folder}. It is meant for audits.", err=True)
    _logger.warning("recording", extra={"folder": str(folder), "warning": warning})
    return folder


def _stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set. More of them change nothing: supervisors often send two."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _announce(worker: "RunningWorker", store: "LayerStore", page: MetricsPage | None) -> None:
    line = {
        "event": "listening",
        "address": worker.address,
        "port": worker.port,
        "model": store.model,
        "fingerprint": store.fingerprint,
    }
    if page is not None:
        line["metrics"] = f"{page.scheme}://{page.address}/metrics"
    print(json.dumps(line), flush=True)
    _logger.info("listening", extra={k: v for k, v in line.items() if k != "event"})
