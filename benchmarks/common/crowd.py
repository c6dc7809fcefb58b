"""Clients that ask one worker for verified products at the same time, for benchmarks.

Each has a connection, a token or certificate and secret vectors of its own, and is as patient as a run.
They work in a few processes, since one would be busy with itself.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig

from benchmarks.common.random_llama import write
from benchmarks.common.worker_processes import HONEST, WorkerProcess, reissued
from blindtune.checkpoint import Checkpoint
from blindtune.client.config.blind_config import Operator
from blindtune.client.operators.manifest import Expectations
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.operator import OperatorClient
from blindtune.client.operators.transport import GrpcTransport
from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates
from blindtune.errors import BlindtuneError
from blindtune.protocol.masks import Share
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, Product, Span
from blindtune.protocol.verification import CheckVectors, check_vectors, secret_vectors
from blindtune.protocol.weights import model_fingerprint
from blindtune.server.admission.tokens import add_token
from blindtune.server.store import layer_fingerprints

__all__ = ["HOST", "Access", "Appetite", "Client", "Question", "Told", "ask_all", "small_model", "worker"]

HOST = "127.0.0.1"
PATIENCE_SECONDS = 120.0
PROCESSES = 4
# Until each client has had so many answers, a worker compiles its kernels, and clients begin one by one.
WARMING_ANSWERS, MOST_WARMING_SECONDS = 2, 120.0


def small_model(folder: Path) -> Path:
    """A random Llama whose products of 64 rows take some milliseconds."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    return write(config, folder)


@dataclass(frozen=True)
class Appetite:
    """What a client asks for.

    Attributes:
        in_flight: requests at a time.
        rows: of an operand.
    """

    in_flight: int = 1
    rows: int = 64


@dataclass
class Told:
    """What a client saw.

    Attributes:
        appetite: what it asked for.
        waits: seconds of each verified product, of those that came while all clients were at work.
        sent, retries: requests, and those that were sent again.
        errors: of products that there were none of.
    """

    appetite: Appetite
    waits: list[float] = field(default_factory=list)
    sent: int = 0
    retries: int = 0
    errors: list[str] = field(default_factory=list)


class Question:
    """A product with the model's widest layer, and how it is verified."""

    def __init__(self, model: Path) -> None:
        checkpoint = Checkpoint.open(str(model))
        layer = next(x for x in checkpoint.layers if x.name.endswith("down_proj.weight"))
        with checkpoint.reader() as reader:
            integers = reader.read(layer).integers
        self.product = Product(Direction.FORWARD, (Span(layer.name, 0, layer.in_features),))
        self.outputs = layer.out_features
        s = secret_vectors(os.urandom(32), layer.name, Direction.FORWARD, layer.out_features, Q31)
        self.check = CheckVectors(s, check_vectors(integers, s, Direction.FORWARD, Q31), Q31)
        self.fingerprint = model_fingerprint(layer_fingerprints(checkpoint))

    def request(self, rows: int) -> WorkRequest:
        """One for fresh random residues."""
        words = np.random.default_rng().integers(
            0, Q31.modulus, (rows, self.product.contraction), dtype=np.uint32
        )
        return WorkRequest(self.fingerprint, Q31.name, self.product, Share(0, words), self.outputs)


class Client:
    """A client with a connection of its own."""

    def __init__(self, question: Question, address: str, files: dict[str, Path], appetite: Appetite) -> None:
        operator = Operator("alpha", [address], **files)
        self.told = Told(appetite)
        # When each answer came, and how long it took.
        self.answers: list[tuple[float, float]] = []
        self._question = question
        self._client = OperatorClient(
            0,
            "alpha",
            [(address, GrpcTransport(operator, address, insecure=False))],
            Expectations("model", question.fingerprint, Q31.name, {}),
            retry_seconds=PATIENCE_SECONDS,
            request_timeout=PATIENCE_SECONDS,
            # As many as it wants, whatever a client of ours would do.
            executor=lambda _: ThreadPoolExecutor(appetite.in_flight),
        )
        self._client.connect()

    def work(self, time_is_over: Callable[[], bool]) -> None:
        """Asks without a pause, in as many threads as it has requests in flight."""
        request = self._question.request(self.told.appetite.rows)

        def ask() -> None:
            while not time_is_over():
                asked = time.monotonic()
                try:
                    self._client.multiply(request, self._question.check)
                except BlindtuneError as error:
                    self.told.errors.append(str(error))
                    continue
                answered = time.monotonic()
                self.answers.append((answered, answered - asked))

        threads = [threading.Thread(target=ask) for _ in range(self.told.appetite.in_flight)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = self._client.statistics
        self.told.sent, self.told.retries = found.requests, found.retries
        self._client.close()

    def tell(self, begin: float, end: float) -> Told:
        """What it saw between two moments."""
        self.told.waits = [wait for answered, wait in self.answers if begin <= answered <= end]
        return self.told


def crowd(model: Path, address: str, clients: list[tuple[dict[str, Path], Appetite]], pipe: Any) -> None:
    """Some of the clients, in a process of their own."""
    question = Question(model)
    working = [Client(question, address, *each) for each in clients]
    pipe.send("ready")
    pipe.recv()
    end = inf
    threads = [
        threading.Thread(target=client.work, args=(lambda: time.monotonic() >= end,)) for client in working
    ]
    for thread in threads:
        thread.start()
    patient_until = time.monotonic() + MOST_WARMING_SECONDS
    while time.monotonic() < patient_until and any(len(x.answers) < WARMING_ANSWERS for x in working):
        time.sleep(0.1)
    pipe.send("warm")
    begin, end = pipe.recv()
    for thread in threads:
        thread.join()
    pipe.send([client.tell(begin, end) for client in working])


def ask_all(
    model: Path, address: str, clients: list[tuple[dict[str, Path], Appetite]], seconds: float
) -> list[Told]:
    """Lets all clients work at the same time; what they saw, in their order, once all had begun."""
    context = multiprocessing.get_context("spawn")
    count = min(PROCESSES, len(clients))
    crowds = []
    for i in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(target=crowd, args=(model, address, clients[i::count], theirs))
        process.start()
        crowds.append((process, ours))
    for _, pipe in crowds:
        assert pipe.recv() == "ready"
    for _, pipe in crowds:
        pipe.send("go")
    for _, pipe in crowds:
        assert pipe.recv() == "warm"
    begin = time.monotonic()
    found: list[Told | None] = [None] * len(clients)
    for _, pipe in crowds:
        pipe.send((begin, begin + seconds))
    for i, (process, pipe) in enumerate(crowds):
        found[i::count] = pipe.recv()
        process.join()
    return [told for told in found if told is not None]


class Access:
    """A worker's files, and those of each client."""

    def __init__(self, folder: Path, clients: int, with_certificates: bool) -> None:
        self.certificates: OperatorCertificates = issue_operator_certificates(folder, "alpha", [HOST])
        ca = self.certificates.ca
        self.clients: list[dict[str, Path]] = []
        for i in range(clients):
            if with_certificates:
                files = {"cert": folder / f"{i}.pem", "key": folder / f"{i}-key.pem"}
                contents = reissued(self.certificates.client, ca, self.certificates.ca_key)
            else:
                files = {"token": folder / f"{i}.token"}
                contents = (add_token(folder / "tokens", f"client-{i}").encode(),)
            for path, content in zip(files.values(), contents, strict=True):
                path.touch(0o600)
                path.write_bytes(content)
            self.clients.append({"ca": ca} | files)
        lets_in = ["--tls-client-ca", str(ca)] if with_certificates else ["--tokens", str(folder / "tokens")]
        files_of_worker = [str(self.certificates.worker), "--tls-key", str(self.certificates.worker_key)]
        self.options = ["--tls-cert", *files_of_worker, *lets_in]


@contextmanager
def worker(
    model: Path, access: Access, folder: Path, options: Sequence[str], code: Path | None
) -> Iterator[tuple[WorkerProcess, list[str]]]:
    """A worker of this version or another, and, in the end, how it ended."""
    process = WorkerProcess(
        HONEST, ["--model", str(model), *access.options, *options], HOST, folder / "worker.log"
    )
    if code is not None:
        # In front of this version, wherever this is started from.
        process.environment.update(PYTHONPATH=str(code), PYTHONSAFEPATH="1")
    process.start()
    ended: list[str] = []
    try:
        process.wait_until_listening()
        yield process, ended
        begun = time.monotonic()
        code_of_exit = process.drain()
        ended.append(f"{code_of_exit} after {time.monotonic() - begun:.1f} s")
    finally:
        process.kill()
