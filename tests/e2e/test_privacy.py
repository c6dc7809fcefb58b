"""What workers get, and what the client keeps: nothing private leaves, and no frozen weight comes in."""

import ast
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare
from support import private_training
from support.checkpoints import CLASSES, batch
from support.memory import NEEDLE_BYTES, found_in_memory
from support.operators import RunningOperators, running_operators
from support.recording import Received, read_recording
from support.standard import SHARES
from support.training import training_step, with_adapter
from support.wiretap import Wiretap
from transformers import PreTrainedModel

from blindtune.checkpoint import Checkpoint
from blindtune.client import BlindConfig, Operator, multiplier_of
from blindtune.client.kit.prepare import prepare
from blindtune.client.model.absent_weight import AbsentWeight
from blindtune.protocol.fixed_point import quantize_rows
from blindtune.protocol.residues import Residues, centre, from_centred, subtract
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.wire_words import to_words

pytestmark = pytest.mark.hf

Load = Callable[..., PreTrainedModel]
STEPS = 3
# A test that an honest build fails once in a million runs.
UNLIKELY = 1e-6


def _train(model: PreTrainedModel, folder: Path, operators: RunningOperators, **inputs: Any) -> None:
    """Three steps on the same batch, recorded at both operators' workers."""
    wrapped = with_adapter(model, "llama")
    for operator in operators:
        operator.workers[0].record(folder / operator.name)
    for _ in range(STEPS):
        training_step(wrapped, "llama", batch("llama", **inputs))
    for operator in operators:
        operator.workers[0].record(None)


@pytest.fixture(scope="module")
def recorded(
    session_operators: RunningOperators,
    checkpoints: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[Received]]:
    """All that the two operators' workers got during three steps on one and the same batch."""
    folder = tmp_path_factory.mktemp("recorded")
    config = BlindConfig(
        operators=session_operators.operators("llama", [0]), allow_one_machine=True, progress=False
    )
    model = CLASSES["llama"].from_pretrained(checkpoints["llama"], quantization_config=config)
    _train(model, folder, session_operators, rows=8, tokens=16)
    multiplier_of(model).close()
    return {name: read_recording(folder / name) for name in ("alpha", "beta")}


def _shape(received: Received) -> tuple[str, int, int]:
    return received.product, received.rows, received.columns


def _residues(received: list[Received]) -> list[Residues]:
    assert all(x.residues is not None for x in received)
    return [x.residues for x in received if x.residues is not None]


def _uniformity(residues: NDArray[np.unsignedinteger[Any]]) -> list[float]:
    """The p-values of chi-square tests: by size, by lowest byte, and by the byte above it."""
    values = residues.ravel().astype(np.int64)
    edges = -(-np.arange(257) * SHARES.modulus // 256)
    size = np.searchsorted(edges, values, side="right") - 1
    expected = np.diff(edges) / SHARES.modulus * len(values)
    return [
        float(chisquare(np.bincount(size, minlength=256), expected).pvalue),
        float(chisquare(np.bincount(values & 255, minlength=256)).pvalue),
        float(chisquare(np.bincount(values >> 8 & 255, minlength=256)).pvalue),
    ]


def test_one_operator_gets_seeds_only_and_the_other_residues_only(
    recorded: dict[str, list[Received]],
) -> None:
    alpha, beta = recorded["alpha"], recorded["beta"]
    assert len(alpha) == len(beta) > 40
    assert all(x.seed is not None and x.residues is None for x in alpha)
    assert all(x.seed is None and x.residues is not None for x in beta)
    assert [_shape(x) for x in alpha] == [_shape(x) for x in beta]


def test_residues_are_uniform(recorded: dict[str, list[Received]]) -> None:
    operands = _residues(recorded["beta"])
    everything = np.concatenate([x.ravel() for x in operands])
    assert everything.max() < SHARES.modulus
    assert len(everything) > 200_000
    assert min(_uniformity(everything)) > UNLIKELY
    for operand in operands:
        assert min(_uniformity(operand)) > UNLIKELY / len(operands)


def test_seeds_are_uniform_and_never_used_twice(recorded: dict[str, list[Received]]) -> None:
    keys = [x.seed.key for x in recorded["alpha"] if x.seed is not None]
    assert len(set(keys)) == len(keys)
    counts = np.bincount(np.frombuffer(b"".join(keys), np.uint8), minlength=256)
    assert chisquare(counts).pvalue > UNLIKELY


def test_operands_of_equal_batches_are_unrelated(recorded: dict[str, list[Received]]) -> None:
    """A mask that is used twice shows in the difference of what it covers."""
    beta = recorded["beta"]
    each = len(beta) // STEPS
    steps = [_residues(beta[i * each : (i + 1) * each]) for i in range(STEPS)]
    assert [_shape(x) for x in beta[:each]] == [_shape(x) for x in beta[-each:]]
    for first, second in combinations(steps, 2):
        a, b = (np.concatenate([x.ravel() for x in step]) for step in (first, second))
        # About one in 10 000 runs has a single coincidence.
        assert np.count_nonzero(a == b) <= 2
        differences = subtract(a[None], b[None], SHARES)
        assert min(_uniformity(differences)) > UNLIKELY
        assert abs(np.corrcoef(a, b)[0, 1]) < 6 / len(a) ** 0.5


def test_operands_that_follow_each_other_and_rows_within_them_are_unrelated(
    recorded: dict[str, list[Received]],
) -> None:
    operands = _residues(recorded["beta"])
    for a, b in pairwise(operands):
        width = min(a.shape[1], b.shape[1])
        assert np.count_nonzero(a[:, :width] == b[:, :width]) <= 2
    rows = [(x[:-1], x[1:]) for x in operands]
    differences = np.concatenate([subtract(a, b, SHARES).ravel() for a, b in rows])
    assert min(_uniformity(differences)) > UNLIKELY


def test_only_both_operators_together_could_read_the_data(recorded: dict[str, list[Received]]) -> None:
    """This is what makes the other tests here meaningful: the recordings are those of the real shares."""
    plain: dict[tuple[str, int, int], list[Residues]] = {}
    for alpha, beta in zip(recorded["alpha"], recorded["beta"], strict=True):
        assert alpha.seed is not None and beta.residues is not None
        mask = alpha.seed.expand(alpha.rows, alpha.columns)
        assert not np.array_equal(mask, beta.residues)
        integers = centre(subtract(beta.residues, mask, SHARES), SHARES)
        assert abs(integers.astype(np.int64)).max() < SHARES.modulus // 4
        plain.setdefault(_shape(alpha), []).append(from_centred(integers, SHARES))
    for same in plain.values():
        assert len(same) == STEPS
        assert np.array_equal(same[0], same[1]) and np.array_equal(same[0], same[2])


def test_requests_for_other_data_of_the_same_shape_look_the_same(
    operators: RunningOperators, load: Load, tmp_path: Path
) -> None:
    shapes = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        _train(load("llama", operators=operators.operators("llama", [0])), folder, operators, seed=seed)
        shapes.append([[_shape(x) for x in read_recording(folder / o.name)] for o in operators])
    assert shapes[0] == shapes[1]


class Secrets:
    """Bytes that no worker may get to see, each in the forms in which they could leak."""

    def __init__(self) -> None:
        self.known: dict[str, bytes] = {}

    def numbers(self, what: str, values: Any, *types: str) -> None:
        for kind in types:
            self.known[f"{what} as {kind}"] = np.ascontiguousarray(values).astype(kind).tobytes()

    def seen_in(self, data: bytes) -> list[str]:
        return [what for what, value in self.known.items() if value in data]


@pytest.fixture
def tapped(checkpoints: dict[str, Path], tmp_path: Path) -> Iterator[tuple[RunningOperators, list[Wiretap]]]:
    """Two operators in plaintext, with a tap on the way to each."""
    with ExitStack() as stack:
        models = {"llama": checkpoints["llama"]}
        operators = stack.enter_context(running_operators(tmp_path / "operators", models, secure=False))
        taps = [
            stack.enter_context(Wiretap(worker.spec.host, worker.addresses["llama"]))
            for worker in operators.workers
        ]
        yield operators, taps


def test_no_private_number_passes_over_any_wire_or_into_any_log(
    tapped: tuple[RunningOperators, list[Wiretap]],
    load: Load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operators, taps = tapped
    secrets = Secrets()
    calls = 0
    hide = ShareSource.hide_reals

    def watched(
        self: ShareSource, x: Any, product: Any, budget: int, column_scale: Any = None, *others: Any
    ) -> Any:
        nonlocal calls
        masked, scales = hide(self, x, product, budget, column_scale, *others)
        integers, again = quantize_rows(x, budget, column_scale, product.diffused)
        assert np.array_equal(scales, again)
        calls += 1
        secrets.numbers(f"values {calls}", x[0][:8], "<f4", "<f8")
        secrets.numbers(f"integers {calls}", integers[0][:8], "<i4", "<i8", "<f4", "<f8")
        residues = from_centred(integers, SHARES)[:1, :8]
        secrets.numbers(f"residues {calls}", residues[0], "<u4")
        secrets.known[f"residues {calls} as words"] = to_words(residues, SHARES).tobytes()
        # A row of zeros has scale 1, which is no secret.
        for row, scale in enumerate(scales[:4]):
            if scale == 1:
                continue
            secrets.numbers(f"scale {calls}.{row}", [scale], "<f8", ">f8")
            secrets.known[f"scale {calls}.{row} in digits"] = f"{scale:.12g}".encode()
        return masked, scales

    monkeypatch.setattr(ShareSource, "hide_reals", watched)
    chosen = [Operator(o.name, [tap.address]) for o, tap in zip(operators, taps, strict=True)]
    model = with_adapter(load("llama", operators=chosen, insecure=True), "llama")
    inputs = batch("llama", rows=3, tokens=11)
    for row, ids in enumerate(inputs["input_ids"].numpy()):
        secrets.numbers(f"tokens {row}", ids, "<i8", "<i4", "<i2", "u1")
        secrets.known[f"tokens {row} in words"] = str(ids.tolist()).encode()
        secrets.known[f"tokens {row} in digits"] = " ".join(map(str, ids)).encode()
    secrets.known["where the client keeps its files"] = str(tmp_path.parent).encode()
    embedding = model.get_input_embeddings().weight.detach()
    secrets.numbers("embedding", embedding[inputs["input_ids"][0, 0], :8].numpy(), "<f4", "<f8")
    folders = [tmp_path / operator.name for operator in operators]
    for worker, folder in zip(operators.workers, folders, strict=True):
        worker.record(folder)
    for _ in range(STEPS):
        training_step(model, "llama", inputs)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            secrets.numbers(f"adapter {name}", parameter.detach()[0, :8].numpy(), "<f4", "<f8")
            secrets.numbers(f"gradient {name}", parameter.grad[0, :8].numpy(), "<f4", "<f8")
    assert calls > 40
    assert len(secrets.known) > 300

    seeds, rows = (read_recording(folder) for folder in folders)
    # The taps do see what is sent.
    assert all(x.seed is not None and x.seed.key in taps[0].sent for x in seeds)
    assert all(
        x.residues is not None and to_words(x.residues[:1], SHARES).tobytes() in taps[1].sent for x in rows
    )
    for tap, worker in zip(taps, operators.workers, strict=True):
        assert secrets.seen_in(tap.sent) == []
        assert secrets.seen_in(worker.log.encode()) == []


def test_a_worker_logs_shapes_and_times_and_nothing_else(operators: RunningOperators, load: Load) -> None:
    model = load("llama", operators=operators.operators("llama", [0]))
    worker = operators[1].workers[0]
    before = len(worker.log)
    model(**batch("llama"))
    lines = [json.loads(line) for line in worker.log[before:].splitlines()]
    assert len(lines) >= 8
    metadata = {
        "event",
        "request_id",
        "peer",
        "client",
        "stalled",
        "direction",
        "layers",
        "rows",
        "columns",
        "operand",
    }
    metadata |= {"bytes_in", "bytes_out", "seconds", "status", "level", "logger", "timestamp"}
    assert all(set(line) <= metadata for line in lines)


def _weights(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Each frozen weight as numbers and as integers; a head that is the embedding stays here."""
    with checkpoint.reader() as reader:
        for layer in checkpoint.layers:
            if layer.tied:
                continue
            weight = reader.tensors.get(layer.name)
            yield layer.name, weight.t() if layer.transposed else weight
            yield f"{layer.name} in integers", reader.read(layer).integers


def _tensors() -> list[torch.Tensor]:
    """All that this process holds."""
    # Not isinstance, which some objects answer with a warning. Arrays are found through tensors.
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


def _held(weights: Mapping[str, torch.Tensor], besides: Sequence[torch.Tensor] = ()) -> set[str]:
    """Which of these weights this process holds in another tensor, whole or as part of one."""
    own = {id(tensor) for tensor in (*weights.values(), *besides)}
    held = set()
    for found in _tensors():
        if id(found) in own or isinstance(found, AbsentWeight):
            continue
        tensor = found.detach()
        if tensor.dim() < 2 or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            continue
        tensor = tensor.reshape(-1, tensor.shape[-1])
        for name, weight in weights.items():
            for candidate in (weight, weight.t()):
                if tensor.shape[1] == candidate.shape[1] and tensor.shape[0] >= candidate.shape[0]:
                    rows = tensor[: candidate.shape[0]].to(torch.float32)
                    if torch.allclose(rows, candidate.to(torch.float32), rtol=1e-2, atol=1e-6):
                        held.add(name)
    return held


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_frozen_weight_is_held_while_training(
    operators: RunningOperators, load: Load, checkpoints: dict[str, Path], family: str
) -> None:
    weights = dict(_weights(Checkpoint.open(checkpoints[family])))
    stock = CLASSES[family].from_pretrained(checkpoints[family])
    in_full = {name for name in weights if not name.endswith("integers")}
    assert _held(weights) >= in_full, "the search finds the weights of a plain model"
    del stock
    gc.collect()
    of_other_tests = _tensors()
    model = with_adapter(load(family, operators=operators.operators(family)), family)
    held: list[set[str]] = []
    handle = model.register_forward_hook(lambda *_: held.append(_held(weights, of_other_tests)))
    training_step(model, family)
    handle.remove()
    assert held == [set()]
    assert _held(weights, of_other_tests) == set()
    shapes = {tuple(weight.shape) for weight in weights.values()}
    shapes |= {shape[::-1] for shape in shapes}
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    for name, parameter in model.named_parameters():
        assert "lora_" in name or id(parameter) in embeddings or tuple(parameter.shape) not in shapes, name


def _run_training(
    settings: dict[str, Any], tmp_path: Path, environment: Mapping[str, str], paused: Callable[[int], None]
) -> dict[str, Any]:
    """Runs the training script in a process of its own; ``paused`` is called in the middle, with its id."""
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    with (
        open(tmp_path / "stderr", "w") as stderr,
        subprocess.Popen(
            [sys.executable, private_training.__file__, str(tmp_path / "settings.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=clean | environment,
        ) as process,
    ):
        try:
            assert process.stdin is not None and process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line == "paused\n":
                    paused(process.pid)
                    process.stdin.write("go on\n")
                    process.stdin.flush()
            assert process.wait(60) == 0, (tmp_path / "stderr").read_text()
            assert "paused\n" in lines
        finally:
            process.kill()
    return json.loads(lines[-1])


def _settings(operators: list[Operator], model: str | Path, output: Path) -> dict[str, Any]:
    plain = [
        {
            name: value if isinstance(value, str | tuple | None) else str(value)
            for name, value in asdict(x).items()
        }
        for x in operators
    ]
    return {"model": str(model), "operators": plain, "output": str(output)}


def _needles(checkpoint: Checkpoint) -> dict[str, bytes]:
    needles = {}
    for name, weight in _weights(checkpoint):
        needles[name] = weight[3].contiguous().numpy().tobytes()[:NEEDLE_BYTES]
        needles[f"{name}, transposed"] = weight[:, 3].contiguous().numpy().tobytes()[:NEEDLE_BYTES]
    return needles


def _contacts(result: dict[str, Any]) -> set[tuple[str, str]]:
    """Each contacted ``host:port``, or host alone where a name was looked up, and in which phase."""
    contacts = {(phase, address.removeprefix("::ffff:")) for phase, address in result["connections"]}
    for phase, event, target in result["contacted"]:
        if event == "socket.connect" and not target.startswith("("):
            continue  # a socket in the file system
        if target.startswith("("):
            host, port, *_ = ast.literal_eval(target)
            target = f"{host}:{port}".removeprefix("::ffff:")
        contacts.add((phase, target))
    return contacts


def test_a_training_process_holds_no_frozen_weight_and_contacts_only_its_workers(
    operators: RunningOperators, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(checkpoints["llama"])
    kit = prepare(checkpoint, tmp_path / "kit")
    needles = _needles(checkpoint)
    embedding = CLASSES["llama"].from_pretrained(checkpoints["llama"]).get_input_embeddings().weight
    needles["embedding"] = embedding[40].detach().numpy().tobytes()[:NEEDLE_BYTES]
    found: list[set[str]] = []

    def look(pid: int) -> None:
        try:
            found.append(found_in_memory(pid, needles))
        except PermissionError:
            warnings.warn("one process may not look into another here: memory was not searched", stacklevel=1)

    chosen = operators.operators("llama", [0])
    # Nobody listens there: should anything ask a hub, it is seen, and goes nowhere.
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    result = _run_training(_settings(chosen, kit.folder, tmp_path / "out"), tmp_path, hub, look)
    assert len(result["losses"]) == 3
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert found in ([], [{"embedding"}]), "of all weights only the embedding, which stays here, is in memory"

    addresses = {address for operator in chosen for address in operator.workers}
    names = {address.rpartition(":")[0] for address in addresses}
    seen = {address for _, address in _contacts(result)}
    assert addresses <= seen, "connections are seen at all"
    assert seen - addresses <= names


@pytest.mark.slow
def test_a_model_of_the_hub_is_not_asked_about_once_it_is_loaded(
    operators: RunningOperators, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Saving an adapter, for one, would otherwise ask the hub about the base model."""
    repository = tmp_path / "hub" / "hub" / "models--acme--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(checkpoints["llama"])
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    chosen = operators.operators("llama", [0])
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    settings = _settings(chosen, "acme/tiny", tmp_path / "out")
    result = _run_training(settings, tmp_path, hub, lambda pid: None)
    contacts = _contacts(result)
    assert ("loading", "127.0.0.1:9") in contacts, "the hub is asked while the model is loaded, and seen"
    addresses = {address for operator in chosen for address in operator.workers}
    assert {address for phase, address in contacts if phase == "training"} <= addresses
