"""How close does the transport come to what grpcio moves at all?

    python -m benchmarks.network.transport [--columns 2048] [--rows 1024] [--link tls] [--seconds 4]
        [--json FILE]

Ours is `GrpcTransport.multiply` against a worker in a process of its own, whose multiplier does no
arithmetic, so that only the transport counts: each end's framing, copies and refusal of what is no residue.
Beside it stand two stream-stream methods of bare grpcio, with bytes in and bytes out and nothing looked at,
in a process of their own, that move as many bytes each way in as large messages: one answers each message
as it arrives, the other once it has them all, as a worker must with the rows that it multiplies at once. A
third one does the least that a worker and its client can do in Python: a header first, rows copied out of and
into messages at both ends, and words that are no residues refused. What it falls short of bare grpcio by is
the price of that, and what ours falls short of it by is the price of all else.

All take turns, and the figures are medians. Each turn begins with a call that does not count, since the bare
process serves three ways and would otherwise be in the processor's caches more often than the worker.
Core-seconds are those of both ends. All processes keep freed memory as clients and workers do.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import torch

from benchmarks.common.measuring import in_turns, machine, print_table, write_json
from blindtune.client.config.blind_config import Operator
from blindtune.client.operators import messages
from blindtune.client.operators.buffers import Buffers
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.transport import GrpcTransport
from blindtune.client.tls.certs import issue_operator_certificates
from blindtune.proto import MAX_MESSAGE_BYTES, worker_pb2
from blindtune.proto.rows import REQUEST_ROWS
from blindtune.protocol.kernels.allocator import keep_freed_memory
from blindtune.protocol.masks import Share
from blindtune.protocol.parameters import Q31, ParameterSet
from blindtune.protocol.products import Direction, Product, Span
from blindtune.protocol.residues import Residues, require_residues
from blindtune.protocol.weights import IntegerLayer
from blindtune.server.admission.limits import Limits
from blindtune.server.daemon import KEPT_BYTES, serve
from blindtune.server.rows import response_messages
from blindtune.server.store import LayerStore
from blindtune.server.transport import Endpoint, TlsFiles

ROWS = (64, 256, 1024, 4096)
COLUMNS = (2048, 8192)
# A square layer so wide takes seconds to draw; the benchmark never multiplies by it.
LAYER = 8
WAYS = ("each at once", "all together", "least", "ours")
_FIRST_BLOCK, _BLOCK = 256, 1024
_TIMEOUT = 120.0
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]


class Prepared:
    """A multiplier without arithmetic: the answer to a block, of at most 1,024 rows, is always the same.

    Attributes:
        answer: uint32 [1024, columns], of which a block gets as many rows as it has.
    """

    def __init__(self, columns: int) -> None:
        generator = np.random.default_rng(1)
        self.answer = generator.integers(0, Q31.modulus, (1024, columns), dtype=np.uint32)

    def outputs(self, product: Product) -> int:
        return self.answer.shape[1]

    def multiply(self, product: Product, operand: Residues, parameters: ParameterSet) -> Residues:
        return self.answer[: len(operand)]


def _store(columns: int) -> LayerStore:
    integers = torch.zeros((LAYER, columns), dtype=torch.int8)
    layer = IntegerLayer(integers, np.ones(LAYER, np.float32))
    return LayerStore.from_layers(iter([("layer", layer)]), model="none")


def _each_at_once(chunks: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from chunks


def _all_together(chunks: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from list(chunks)


def _least(columns: int) -> Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]:
    """Rows in blocks as a worker takes them, and as many of an answer."""
    answer = Prepared(columns).answer

    def serve(arriving: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        rows = worker_pb2.MultiplyRequest.FromString(next(arriving)).header.rows
        block = np.empty((_BLOCK, columns), np.uint32)
        there, size = 0, _FIRST_BLOCK
        for message in arriving:
            words = np.frombuffer(REQUEST_ROWS.rows(message) or b"", np.uint32).reshape(-1, columns)
            part = block[there : there + len(words)]
            np.copyto(part, words)
            require_residues(part, Q31, "the operand")
            there += len(words)
            rows -= len(words)
            if there >= size or not rows:
                yield from response_messages(answer[:there])
                there, size = 0, _BLOCK

    return serve


def serve_bare(tls: TlsFiles | None, columns: int) -> int:
    """Serves grpcio and nothing else, and returns the port."""
    keep_freed_memory(KEPT_BYTES)  # as a worker does
    server = grpc.server(ThreadPoolExecutor(4), options=_OPTIONS)
    methods = {
        "EachAtOnce": grpc.stream_stream_rpc_method_handler(_each_at_once),
        "AllTogether": grpc.stream_stream_rpc_method_handler(_all_together),
        "Least": grpc.stream_stream_rpc_method_handler(_least(columns)),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", methods),))
    port = Endpoint("127.0.0.1", 0, tls).bind(server)
    server.start()
    _kept.append(server)
    return port


_kept: list[Any] = []


def serve_worker(tls: TlsFiles | None, columns: int) -> int:
    """Serves a worker, and returns the port."""
    limits = Limits(max_requests_per_second=1e6)
    endpoint = Endpoint("127.0.0.1", 0, tls)
    running = serve(_store(columns), endpoint, limits=limits, multiplier=Prepared(columns))
    _kept.append(running)
    return running.port


class Server:
    """A server in a process of its own."""

    def __init__(self, kind: str, columns: int, certificates: Path | None) -> None:
        arguments = ["--serve", kind, "--columns", str(columns)]
        if certificates is not None:
            arguments += ["--certificates", str(certificates)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.network.transport", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._usage = psutil.Process(self._process.pid)
        assert self._process.stdout is not None
        self.address = f"127.0.0.1:{int(self._process.stdout.readline())}"

    def core_seconds(self) -> float:
        """What it has computed for so far."""
        times = self._usage.cpu_times()
        return times.user + times.system

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


class Measured:
    """A way to move an operand and an answer, and the core-seconds of both ends.

    Attributes:
        move: does it without counting.
    """

    def __init__(self, move: Callable[[], object], server: Server) -> None:
        self.move, self._server = move, server
        self.calls = 0
        self.client_seconds = 0.0
        self.server_seconds = 0.0

    def __call__(self) -> None:
        client, server = time.process_time(), self._server.core_seconds()
        self.move()
        self.client_seconds += time.process_time() - client
        self.server_seconds += self._server.core_seconds() - server
        self.calls += 1


def bare_channel(address: str, operator: Operator | None) -> grpc.Channel:
    """A channel that does what any channel does."""
    if operator is None:
        return grpc.insecure_channel(address, _OPTIONS)
    assert operator.ca and operator.key and operator.cert
    files = (Path(x).read_bytes() for x in (operator.ca, operator.key, operator.cert))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(*files), _OPTIONS)


def bare_move(channel: grpc.Channel, method: str, chunks: list[bytes]) -> Callable[[], object]:
    """Moves chunks to the server and back."""
    call = channel.stream_stream(f"/bare/{method}")
    size = sum(map(len, chunks))

    def move() -> None:
        if sum(len(x) for x in call(iter(chunks), timeout=_TIMEOUT)) != size:
            raise RuntimeError("bytes were lost")

    return move


def least_move(channel: grpc.Channel, request: WorkRequest, buffers: Buffers) -> Callable[[], object]:
    """Moves an operand and its answer with what a client cannot do without."""
    call = channel.stream_stream("/bare/Least")

    def move() -> None:
        answer = buffers.take(len(request.share.residues), request.outputs)
        stream = call(messages.request_messages(request), timeout=_TIMEOUT)
        for _ in messages.read_rows(request, stream, answer):
            pass
        buffers.give(answer)

    return move


def ask(transport: GrpcTransport, request: WorkRequest, buffers: Buffers) -> None:
    """Moves an operand to the worker and its answer back, into memory that is used again as in a run."""
    answer = buffers.take(len(request.share.residues), request.outputs)
    for _ in transport.multiply(request, _TIMEOUT, answer):
        pass
    buffers.give(answer)


def measure(
    columns: int, each_rows: Sequence[int], certificates: Path | None, seconds: float
) -> Iterator[dict[str, Any]]:
    """Rates of ours and of bare grpcio, for operands of so many rows."""
    operator = _operator(certificates)
    with ExitStack() as stack:
        bare, worker = (Server(kind, columns, certificates) for kind in ("bare", "worker"))
        stack.callback(bare.close)
        stack.callback(worker.close)
        channel = stack.enter_context(bare_channel(bare.address, operator))
        transport = GrpcTransport(
            operator or Operator("alpha", [worker.address]), worker.address, insecure=operator is None
        )
        stack.callback(transport.close)
        product = Product(Direction.FORWARD, (Span("layer", 0, columns),))
        fingerprint = _store(columns).fingerprint
        for rows in each_rows:
            residues = np.random.default_rng(0).integers(0, Q31.modulus, (rows, columns), dtype=np.uint32)
            request = WorkRequest(fingerprint, Q31.name, product, Share(0, residues), columns)
            step = max(1, messages.CHUNK_BYTES // (4 * columns))
            chunks = [residues[i : i + step].tobytes() for i in range(0, rows, step)]
            ways = {
                "each at once": Measured(bare_move(channel, "EachAtOnce", chunks), bare),
                "all together": Measured(bare_move(channel, "AllTogether", chunks), bare),
                "least": Measured(least_move(channel, request, Buffers(128 << 20)), bare),
                "ours": Measured(partial(ask, transport, request, Buffers(128 << 20)), worker),
            }
            turns: dict[str, Callable[[], object]] = {}
            for name, way in ways.items():
                turns |= {f"before {name}": way.move, name: way}
            medians = in_turns(turns, seconds)
            moved = 2 * residues.nbytes / 1e9
            yield {
                "link": "plaintext" if operator is None else "tls",
                "rows": rows,
                "columns": columns,
                "gb_per_second": {name: moved / medians[name] for name in ways},
                "client_core_seconds_per_gb": {
                    name: way.client_seconds / (way.calls * moved) for name, way in ways.items()
                },
                "server_core_seconds_per_gb": {
                    name: way.server_seconds / (way.calls * moved) for name, way in ways.items()
                },
            }


def _operator(certificates: Path | None) -> Operator | None:
    if certificates is None:
        return None
    return Operator(
        "alpha",
        ["127.0.0.1:1"],
        ca=str(certificates / "ca.pem"),
        cert=str(certificates / "client.pem"),
        key=str(certificates / "client-key.pem"),
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--columns", nargs="+", type=int, default=COLUMNS)
    parser.add_argument("--link", nargs="+", choices=("plaintext", "tls"), default=("plaintext", "tls"))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each payload")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=("bare", "worker"), help=argparse.SUPPRESS)
    parser.add_argument("--certificates", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        folder = options.certificates
        names = ("worker.pem", "worker-key.pem", "ca.pem")
        tls = None if folder is None else TlsFiles(*(folder / name for name in names))
        port = (
            serve_bare(tls, options.columns[0])
            if options.serve == "bare"
            else serve_worker(tls, options.columns[0])
        )
        print(port, flush=True)
        sys.stdin.read()
        return
    keep_freed_memory()  # as a client does
    print(json.dumps(machine()))
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        issue_operator_certificates(Path(folder), "alpha")
        for link in options.link:
            certificates = Path(folder) / "alpha" if link == "tls" else None
            for columns in options.columns:
                results += measure(columns, options.rows, certificates, options.seconds)
    table = []
    for found in results:
        rate = found["gb_per_second"]
        best = max(WAYS[:2], key=lambda way: rate[way])
        cores = [
            f"{found['client_core_seconds_per_gb'][way]:.2f} + {found['server_core_seconds_per_gb'][way]:.2f}"
            for way in (best, "ours")
        ]
        shape = f"{found['rows']} x {found['columns']}"
        rates = [f"{rate[way]:.2f}" for way in WAYS]
        shares = [f"{rate['ours'] / rate[way]:.2f}" for way in (best, "least")]
        table.append([shape, found["link"], *rates, *shares, *cores])
    print_table(
        [
            "operand",
            "link",
            *(f"{way}: GB/s" for way in WAYS),
            "ours / faster bare",
            "ours / least",
            "core-s per GB, client + server: bare",
            "ours",
        ],
        table,
    )
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
