"""Seeds at a worker, over a connection: expanded by the host or by the method, as much at once as fits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from blindtune.client.config.blind_config import Operator
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.transport import GrpcTransport
from blindtune.protocol.expansion import Seed
from blindtune.protocol.masks import Share
from blindtune.protocol.multiplication.methods import FloatProduct, Method
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Direction, Product, backward_products, forward_products
from blindtune.protocol.residues import Residues
from blindtune.protocol.weights import IntegerLayer
from blindtune.server.daemon import serve
from blindtune.server.store import LayerStore
from blindtune.server.transport import Endpoint
from blindtune.server.wire import Request

CPU = torch.device("cpu")
# Row 74,133 of this seed holds a word that is rejected twice, in column 668.
SEED = Seed(bytes(range(32)), Q31, 74_000)
ROWS = 1300
SHAPES = {"a": (40, 700), "b": (660, 700)}
FORWARD = forward_products(["a", "b"], 700)[0]
BACKWARD = backward_products([("a", 40), ("b", 660)])[0]
EACH_PRODUCT = pytest.mark.parametrize("product", [FORWARD, BACKWARD], ids=lambda p: p.label)
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    ],
)


class Device(FloatProduct):
    """A method that expands seeds itself, for which memory suffices for so many rows at once."""

    def __init__(self, most: int = 1 << 30) -> None:
        super().__init__(Q31, CPU)
        self.most = most
        self.asked: list[tuple[int, int]] = []
        self.expand = self._expand

    def _expand(self, rows: SeededRows) -> torch.Tensor:
        self.asked.append((rows.seed.row_offset, rows.rows))
        if rows.rows > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.prepare(rows.residues())


class Recorder:
    """Remembers what a worker receives."""

    def __init__(self) -> None:
        self.seen: list[Residues | Seed] = []

    def operand(self, request: Request, part: Residues | Seed) -> None:
        self.seen.append(part)


def layers() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)
    return {name: generator.integers(-127, 128, shape, dtype=np.int8) for name, shape in SHAPES.items()}


def store(device: torch.device | str = CPU, method: Method | None = None) -> LayerStore:
    integers = {
        name: IntegerLayer(torch.from_numpy(w), np.ones(len(w), np.float32)) for name, w in layers().items()
    }
    made = LayerStore.from_layers(integers.items(), device, model="two")
    return replace(made, methods=(method,) if method else made.methods)


def answer(served: LayerStore, product: Product, recorder: Recorder | None = None) -> Residues:
    outputs = served.multiplier().outputs(product)
    share = Share(0, SeededRows(SEED, ROWS, product.contraction))
    request = WorkRequest(served.fingerprint, Q31.name, product, share, outputs)
    running = serve(served, Endpoint.parse("127.0.0.1:0", insecure=True), observer=recorder)
    transport = GrpcTransport(Operator("alpha", [running.address]), running.address, insecure=True)
    found = np.empty((ROWS, outputs), np.uint32)
    try:
        assert list(transport.multiply(request, 60, found))[-1] == ROWS
    finally:
        transport.close()
        running.stop(drain_seconds=0)
    return found


def expected(product: Product) -> Residues:
    # No sum reaches 700 * 2^31 * 2^7: 64 bits are exact here.
    stack = np.concatenate([w.astype(np.int64) for w in layers().values()])
    operand = SEED.expand(ROWS, product.contraction).astype(np.int64)
    return (operand @ (stack.T if product.direction is Direction.FORWARD else stack)) % Q31.modulus


@EACH_PRODUCT
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_seed_is_multiplied_as_its_expansion_on_each_device(product: Product, device: str) -> None:
    assert np.array_equal(answer(store(device), product), expected(product))


@EACH_PRODUCT
def test_a_method_that_expands_seeds_gets_all_rows_and_an_observer_the_seed(product: Product) -> None:
    method, recorder = Device(), Recorder()
    assert np.array_equal(answer(store(method=method), product, recorder), expected(product))
    assert sorted(set(method.asked)) == [(74_000, 256), (74_256, 1024), (75_280, 20)]
    assert recorder.seen == [SEED]


def test_a_seed_whose_expansion_does_not_fit_is_expanded_in_smaller_parts() -> None:
    method = Device(most=100)
    assert np.array_equal(answer(store(method=method), FORWARD), expected(FORWARD))
    assert method.asked[:4] == [(74_000, 256), (74_000, 128), (74_000, 64), (74_064, 64)]
    assert sum(rows for _, rows in method.asked if rows <= 100) == ROWS
