"""Memory that runs out: asked for before a model is loaded, and survived while requests run."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_layer import tiny_header

from blindtune.checkpoint import FrozenLayer
from blindtune.errors import ResourceError
from blindtune.proto import worker_pb2
from blindtune.protocol.multiplication.layer_memory import row_bytes
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Residues
from blindtune.protocol.weights import IntegerLayer
from blindtune.server.admission.limits import Limits
from blindtune.server.admission.places import Places, bounds_of
from blindtune.server.memory import is_out_of_memory, memory_needed, require_memory
from blindtune.server.rows import workspace_bytes
from blindtune.server.service import WorkerService
from blindtune.server.store import LayerStore

CPU = torch.device("cpu")
ROWS = 100


class _AbortedError(Exception):
    pass


class Context:
    """What a servicer's context offers, without a connection."""

    def __init__(self) -> None:
        self.code: Any = None
        self.details = ""
        self.active = True

    def time_remaining(self) -> float:
        return 60.0

    def add_callback(self, callback: Any) -> bool:
        return True

    def send_initial_metadata(self, metadata: tuple[()]) -> None:
        pass

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def peer(self) -> str:
        return "test"

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def is_active(self) -> bool:
        return self.active

    def cancel(self) -> None:
        self.active = False

    def abort(self, code: Any, details: str) -> None:
        self.code, self.details = code, details
        raise _AbortedError


class Cramped:
    """A multiplier for which memory suffices for so many rows at once."""

    def __init__(self, store: LayerStore, rows: int, error: Exception) -> None:
        self._honest = store.multiplier()
        self._rows = rows
        self._error = error
        self.sizes: list[int] = []

    def outputs(self, product: Product) -> int:
        return self._honest.outputs(product)

    def multiply(self, product: Product, operand: Residues, parameters: ParameterSet) -> Residues:
        self.sizes.append(len(operand))
        if len(operand) > self._rows:
            raise self._error
        return self._honest.multiply(product, operand, parameters)


@pytest.fixture(scope="module")
def store() -> LayerStore:
    integers = torch.arange(32, dtype=torch.int8).reshape(4, 8)
    return LayerStore.from_layers([("w", IntegerLayer(integers, np.ones(4, np.float32)))], model="tiny")


def ask(store: LayerStore, multiplier: Any, context: Context, rows: int = ROWS) -> bytes:
    return b"".join(parts(store, multiplier, context, rows))


def parts(store: LayerStore, multiplier: Any, context: Context, rows: int) -> Iterator[bytes]:
    """The answer as it comes, so that nobody needs to hold all of it."""
    header = tiny_header(store.fingerprint, rows)
    places = Places(bounds_of(Limits()))
    service = WorkerService(store, Limits(), places, multiplier)
    served: Any = context
    try:
        answer = service.Multiply([worker_pb2.MultiplyRequest(header=header).SerializeToString()], served)
        for message in answer:
            yield worker_pb2.MultiplyResponse.FromString(message).residues
    finally:
        assert places.inside == 0


NO_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("rows", [1, 3, 30])
def test_a_block_is_halved_until_it_fits_and_the_answer_is_the_same(
    store: LayerStore, rows: int, error: Exception
) -> None:
    expected = ask(store, None, Context())
    cramped = Cramped(store, rows, error)
    assert ask(store, cramped, Context()) == expected
    assert len(expected) == ROWS * 16
    # What failed is not tried again.
    assert cramped.sizes[:2] == [100, 50]
    assert sum(size for size in cramped.sizes if size <= rows) == ROWS
    assert sum(size > rows for size in cramped.sizes) == {1: 6, 3: 5, 30: 2}[rows]


def test_only_when_not_one_row_fits_the_request_fails(store: LayerStore) -> None:
    context = Context()
    cramped = Cramped(store, 0, MemoryError())
    with pytest.raises(_AbortedError):
        ask(store, cramped, context)
    assert cramped.sizes == [100, 50, 25, 12, 6, 3, 1]
    assert context.code.name == "RESOURCE_EXHAUSTED"
    assert "out of memory" in context.details


def test_another_error_is_no_lack_of_memory(store: LayerStore) -> None:
    context = Context()
    cramped = Cramped(store, 0, RuntimeError("a size does not match"))
    with pytest.raises(_AbortedError):
        ask(store, cramped, context)
    assert cramped.sizes == [100]
    assert context.code.name == "INTERNAL"


def test_what_torch_raises_without_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.int8)
    assert is_out_of_memory(caught.value)


class Departing(Cramped):
    """A client that goes away while the first block is multiplied."""

    def __init__(self, store: LayerStore, context: Context) -> None:
        super().__init__(store, 10_000, MemoryError())
        self._context = context

    def multiply(self, product: Product, operand: Residues, parameters: ParameterSet) -> Residues:
        self._context.active = False
        return super().multiply(product, operand, parameters)


def test_nothing_is_computed_for_a_client_that_has_gone(
    store: LayerStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "blindtune")
    context = Context()
    departing = Departing(store, context)
    ask(store, departing, context, rows=4000)  # five blocks
    assert departing.sizes == [256]
    [line] = [vars(record) for record in caplog.records if record.message == "multiply"]
    assert line["status"] == "CANCELLED"


def layers(*shapes: tuple[int, int]) -> list[FrozenLayer]:
    return [FrozenLayer(f"layer{i}", "", *shape) for i, shape in enumerate(shapes)]


def test_the_work_space_grows_with_requests_and_is_bounded_for_each() -> None:
    small = layers((8, 16), (16, 8))
    assert workspace_bytes(small, Limits(max_concurrent=3)) == 3 * 1024 * 48 * 32
    assert workspace_bytes(small, Limits(max_concurrent=3, max_rows=10)) == 3 * 10 * 48 * 32
    large = layers((4096, 14336))
    assert workspace_bytes(large, Limits(max_concurrent=2)) == 2 * (8 << 20) * 32


def test_too_little_memory_for_all_requests_names_the_option_that_helps() -> None:
    kept, workspace = layers((1024, 1024)), 8 << 20
    needed = memory_needed(kept, CPU, workspace)
    assert needed == {CPU: 1024 * row_bytes(1024) + workspace}
    require_memory(needed, lambda device: needed[CPU], workspace)
    with pytest.raises(ResourceError, match="lower --max-concurrent") as caught:
        require_memory(needed, lambda device: needed[CPU] - 1, workspace)
    assert "0.01 GiB of it for requests" in str(caught.value)
    with pytest.raises(ResourceError) as caught:
        require_memory(needed, lambda device: 1 << 10, workspace)
    assert "--max-concurrent" not in str(caught.value)


_UNDER_A_LIMIT = """
import json, resource, sys
import numpy as np, torch
torch.set_num_threads(1)
sys.path[:0] = {folders!r}
from test_server_memory import Context, parts
from blindtune.protocol.weights import IntegerLayer
from blindtune.server.store import LayerStore

layer = IntegerLayer(torch.ones((8192, 8), dtype=torch.int8), np.ones(8192, np.float32))
store = LayerStore.from_layers([("w", layer)], model="wide")

def digest(context):
    import hashlib
    found = hashlib.sha256()
    for part in parts(store, None, context, 1280):
        found.update(part)
    return found.hexdigest()

expected = digest(Context())
def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
import logging
class Halvings(logging.Handler):
    count = 0
    def emit(self, record):
        Halvings.count += "fewer rows" in record.getMessage()
logging.getLogger("blindtune").addHandler(Halvings())
import ctypes
from blindtune.protocol.kernels.recycled import give_back
import gc
gc.collect()
give_back()  # what was freed is no reserve
ctypes.CDLL(None).malloc_trim(0)
limit = used() + ({megabytes} << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
# Whatever else was freed before is no reserve either.
held = []
try:
    while True:
        held.append(np.ones(1 << 17))
except MemoryError:
    del held[-{megabytes}:]
context = Context()
answers = [digest(context) == expected for _ in range(3)]
print(json.dumps({{"answers": answers, "halvings": Halvings.count}}))
"""


def test_a_process_without_memory_for_a_block_answers_all_the_same() -> None:
    # The second block, of 1,024 rows and 8,192 outputs, takes some 45 MB.
    code = _UNDER_A_LIMIT.format(folders=[str(x) for x in Path(__file__).parents[:3]], megabytes=30)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    outcome = json.loads(ended.stdout)
    assert outcome["answers"] == [True] * 3
    assert outcome["halvings"] >= 1
