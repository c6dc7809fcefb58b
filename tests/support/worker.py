"""A worker for tests, in a process of its own: the daemon's server, recording and lying on demand.

It serves one or more checkpoints, each at a port of its own, and obeys what arrives over a pipe. It ends
when the pipe closes, so that it never outlives the tests.
"""

import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers.models.bert import modeling_bert
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from blindtune.checkpoint import Checkpoint
from blindtune.protocol.multiplication.exactness import exact_method
from blindtune.protocol.parameters import Q31
from blindtune.protocol.weights import SCHEMES
from blindtune.server.admission.limits import Limits
from blindtune.server.daemon import RunningWorker, serve
from blindtune.server.log import configure_logging
from blindtune.server.store import LayerStore
from blindtune.server.transport import Endpoint, TlsFiles
from support.lies import Rogue
from support.recording import Recorder

__all__ = ["WorkerSpec", "run_worker"]

# Imported and compiled once in the process that workers are forked from.
_WARM = (modeling_bert, modeling_gpt2, modeling_llama, modeling_qwen3)
if os.environ.get("BLINDTUNE_TEST_WORKERS"):
    torch.set_num_threads(1)
    exact_method([32], Q31)


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker serves, and where.

    Attributes:
        models: checkpoint folders by name.
        host: where it listens.
        quantization: name of the scheme.
        port: where it serves the first model; free ports are taken for all others, and for 0.
        certificates: an operator's folder; plaintext if None.
        log: file for its log.
        limits: on requests.
    """

    models: Mapping[str, Path]
    host: str
    certificates: Path | None
    log: Path
    limits: Limits = field(default_factory=Limits)
    quantization: str = "int8"
    port: int = 0


def run_worker(spec: WorkerSpec, pipe: Connection) -> None:
    """Serves until it is told to stop or the pipe closes.

    Sends the addresses of all models, then answers each command:

        ("lie", model, lie, at, times)   -> None
        ("told", model)                  -> how many wrong answers it gave
        ("record", folder or None)       -> None
        ("stop",)                        -> None, and ends
    """
    log = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, sys.stderr.fileno())
    sys.stderr = os.fdopen(sys.stderr.fileno(), "w", buffering=1)
    configure_logging("json")
    torch.set_num_threads(1)
    rogues: dict[str, Rogue] = {}
    running: dict[str, RunningWorker] = {}
    recorder = Recorder()
    for index, (name, folder) in enumerate(spec.models.items()):
        port = 0 if index else spec.port
        store = LayerStore.load(Checkpoint.open(folder, scheme=SCHEMES[spec.quantization]))
        rogues[name] = Rogue(store.multiplier())
        running[name] = serve(
            store,
            Endpoint.parse(f"{spec.host}:{port}", _tls(spec.certificates), spec.certificates is None),
            limits=spec.limits,
            multiplier=rogues[name],
            observer=recorder,
        )
    pipe.send({name: worker.address for name, worker in running.items()})
    try:
        _obey(pipe, rogues, recorder)
    except EOFError:
        pass
    # A request that hangs by order does not keep the process.
    stops = [threading.Thread(target=worker.stop, args=(0,)) for worker in running.values()]
    for stop in stops:
        stop.start()
    for stop in stops:
        stop.join(5)
    os._exit(0)


def _obey(pipe: Connection, rogues: Mapping[str, Rogue], recorder: Recorder) -> None:
    while True:
        command, *arguments = pipe.recv()
        reply = None
        if command == "lie":
            model, lie, at, times = arguments
            rogues[model].plan(lie, at, times)
        elif command == "told":
            reply = rogues[arguments[0]].told
        elif command == "record":
            recorder.record_to(arguments[0])
        pipe.send(reply)
        if command == "stop":
            return


def _tls(folder: Path | None) -> TlsFiles | None:
    return folder and TlsFiles(folder / "worker.pem", folder / "worker-key.pem", folder / "ca.pem")
