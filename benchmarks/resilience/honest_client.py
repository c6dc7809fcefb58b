"""A client that keeps asking one worker for verified products, as a process of its own.

    python -m benchmarks.resilience.honest_client SETTINGS.json

Settings: ``address``, ``ca``, ``cert`` and ``key`` or ``token``, ``model`` (checkpoint folder), ``pause``
(seconds between requests). It prints a line of JSON for each request, with the monotonic time of its begin
and its seconds, and now and then opens a new connection. It stops when its input closes.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from blindtune.checkpoint import Checkpoint
from blindtune.client.config.blind_config import Operator
from blindtune.client.operators.manifest import Expectations
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.operator import OperatorClient
from blindtune.client.operators.transport import GrpcTransport
from blindtune.errors import BlindtuneError
from blindtune.protocol.masks import Share
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, Product, Span
from blindtune.protocol.verification import CheckVectors, check_vectors, secret_vectors
from blindtune.protocol.weights import model_fingerprint
from blindtune.server.store import layer_fingerprints

ROWS = 32
PATIENCE_SECONDS = 60.0
CONNECTION_SECONDS = 2.0


class HonestClient:
    """Asks for the product of fresh random residues with one layer, and verifies it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        checkpoint = Checkpoint.open(settings["model"])
        layer = next(x for x in checkpoint.layers if x.name.endswith("down_proj.weight"))
        with checkpoint.reader() as reader:
            integers = reader.read(layer).integers
        self._product = Product(Direction.FORWARD, (Span(layer.name, 0, layer.in_features),))
        self._outputs = layer.out_features
        secret = np.random.default_rng().bytes(32)
        s = secret_vectors(secret, layer.name, Direction.FORWARD, layer.out_features, Q31)
        self._check = CheckVectors(s, check_vectors(integers, s, Direction.FORWARD, Q31), Q31)
        self._fingerprint = model_fingerprint(layer_fingerprints(checkpoint))
        self._generator = np.random.default_rng()
        self._connect()

    def _connect(self) -> None:
        """A new client, which opens a connection with its first request."""
        settings = self._settings
        names = ("ca", "cert", "key", "token")
        operator = Operator("alpha", [settings["address"]], **{x: settings.get(x) for x in names})
        self._client = OperatorClient(
            0,
            "alpha",
            [(settings["address"], GrpcTransport(operator, settings["address"], insecure=False))],
            Expectations("model", self._fingerprint, Q31.name, {}),
            retry_seconds=PATIENCE_SECONDS,
            request_timeout=PATIENCE_SECONDS,
        )
        self._connected = time.monotonic()

    def ask(self) -> dict[str, Any]:
        """One request; what is told of it."""
        fresh = time.monotonic() > self._connected + CONNECTION_SECONDS
        if fresh:
            self._client.close()
            self._connect()
        words = self._generator.integers(0, Q31.modulus, (ROWS, self._product.contraction), dtype=np.uint32)
        request = WorkRequest(self._fingerprint, Q31.name, self._product, Share(0, words), self._outputs)
        before = self._client.statistics.retries
        begun, error = time.monotonic(), ""
        try:
            self._client.multiply(request, self._check)
        except BlindtuneError as failure:
            error = str(failure)
        seconds = time.monotonic() - begun
        retries = self._client.statistics.retries - before
        return {"at": begun, "seconds": seconds, "retries": retries, "connects": fresh, "error": error}


def main(settings: dict[str, Any]) -> None:
    """Asks until the input closes."""
    stop = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        stop.set()

    client = HonestClient(settings)
    threading.Thread(target=wait_for_the_end, daemon=True).start()
    while not stop.wait(settings["pause"]):
        print(json.dumps(client.ask()), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
