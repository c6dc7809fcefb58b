"""What a worker costs that accepts requests and never answers, next to a replica that does.

    python -m benchmarks.resilience.silent_worker [--products 40] [--rows 64 1024] [--pause 1]
        [--acknowledges]

One operator with two workers on loopback, the silent one first, and a client that asks for one verified
product after the other, with a pause between them as for a step's own work. With ``--acknowledges`` both say
so in their manifests, and the silent one acknowledges each request before it falls silent. It prints a line
of JSON for each number of rows.
"""

import argparse
import json
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import torch

from blindtune.client.config.blind_config import Operator
from blindtune.client.operators.manifest import Expectations
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.operator import OperatorClient
from blindtune.client.operators.transport import GrpcTransport
from blindtune.proto import worker_pb2
from blindtune.protocol.masks import Share
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, Product, Span
from blindtune.protocol.verification import CheckVectors, check_vectors, secret_vectors
from blindtune.protocol.weights import IntegerLayer
from blindtune.server.daemon import serve
from blindtune.server.store import LayerStore
from blindtune.server.transport import Endpoint

INPUTS, OUTPUTS = 1024, 1024


class SilentServer(grpc.GenericRpcHandler):
    """Has a manifest, takes requests, and never answers one."""

    def __init__(self, manifest: worker_pb2.Manifest, acknowledges: bool) -> None:
        self._manifest, self._acknowledges = manifest, acknowledges
        self._server = grpc.server(ThreadPoolExecutor(16))
        self._server.add_generic_rpc_handlers([self])
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method.endswith("/GetManifest"):
            return grpc.unary_unary_rpc_method_handler(lambda *_: self._manifest.SerializeToString())
        return grpc.stream_stream_rpc_method_handler(self._say_nothing)

    def _say_nothing(self, requests: Any, context: grpc.ServicerContext) -> Any:
        if self._acknowledges:
            context.send_initial_metadata(())
        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait()
        yield from ()

    def stop(self) -> None:
        self._server.stop(None)


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--products", type=int, default=40)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--pause", type=float, default=1.0)
    parser.add_argument("--request-timeout", type=float, default=20.0)
    parser.add_argument("--acknowledges", action="store_true")
    arguments = parser.parse_args()
    integers = torch.randint(-127, 128, (OUTPUTS, INPUTS), dtype=torch.int8)
    layer = IntegerLayer(integers, np.ones(OUTPUTS, np.float32))
    good = serve(
        LayerStore.from_layers(iter([("layer", layer)]), model="none"), Endpoint("127.0.0.1", 0, None)
    )
    for rows in arguments.rows:
        print(json.dumps(measure(arguments, good.address, layer, rows)), flush=True)
    good.stop()


def measure(arguments: argparse.Namespace, good: str, layer: IntegerLayer, rows: int) -> dict[str, Any]:
    """Seconds for each product, with a new client."""
    store = LayerStore.from_layers(iter([("layer", layer)]), model="none")
    manifest = GrpcTransport(Operator("alpha", [good]), good, insecure=True).manifest(10)
    if arguments.acknowledges:
        manifest.acknowledges = True
    silent = SilentServer(manifest, arguments.acknowledges)
    addresses = [silent.address, good]
    client = OperatorClient(
        0,
        "alpha",
        [(x, GrpcTransport(Operator("alpha", [x]), x, insecure=True)) for x in addresses],
        Expectations("none", store.fingerprint, Q31.name, {}),
        60.0,
        arguments.request_timeout,
    )
    client.connect()
    product = Product(Direction.FORWARD, (Span("layer", 0, INPUTS),))
    s = secret_vectors(bytes(32), "layer", Direction.FORWARD, OUTPUTS, Q31)
    check = CheckVectors(s, check_vectors(layer.integers, s, Direction.FORWARD, Q31), Q31)
    generator = np.random.default_rng(0)
    seconds = []
    for _ in range(arguments.products):
        time.sleep(arguments.pause)
        words = generator.integers(0, Q31.modulus, (rows, INPUTS), dtype=np.uint32)
        request = WorkRequest(store.fingerprint, Q31.name, product, Share(0, words), OUTPUTS)
        started = time.monotonic()
        client.start(request, check).result()
        seconds.append(time.monotonic() - started)
    found = client.statistics
    client.close()
    silent.stop()
    return {
        "rows": rows,
        "products": len(seconds),
        "total_s": round(sum(seconds), 2),
        "median_s": round(statistics.median(seconds), 3),
        "slowest_s": [round(x, 2) for x in sorted(seconds)[::-1][:6]],
        "requests": found.requests,
        "hedges": getattr(found, "hedges", 0),
        "failures": {kind.name.lower(): count for kind, count in found.failures.items()},
        "set_aside": len(getattr(found, "set_aside", ())),
    }


if __name__ == "__main__":
    main()
