"""Models trained and used through worker processes: exactly the reference, whatever happens to a worker."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from support.checkpoints import CLASSES, FAMILIES, batch, save_checkpoint
from support.operators import RunningOperators, RunningWorker, running_operators
from support.recording import read_recording
from support.training import training_step, with_adapter
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from blindtune.checkpoint import Checkpoint
from blindtune.client import Operator, multiplier_of
from blindtune.client.kit.prepare import prepare
from blindtune.client.model.remote_linear import RemoteLinear
from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates
from blindtune.errors import IncompatibleWorkerError, OperatorUnavailableError, UnsupportedError
from blindtune.proto import worker_pb2, worker_pb2_grpc
from blindtune.server.admission.limits import Limits

pytestmark = pytest.mark.hf

Load = Callable[..., PreTrainedModel]
CAUSAL = ["llama", "llama_tied", "qwen3", "gpt2"]
ALONE, GENEROUS = 2.0, 30.0


def _step(model: PreTrainedModel, family: str = "llama") -> dict[str, bytes]:
    return training_step(with_adapter(model, family), family)


@pytest.fixture
def spare(checkpoints: dict[str, Path], tmp_path: Path) -> Iterator[RunningOperators]:
    """Operators of two workers each that a test may kill."""
    with running_operators(tmp_path, {"llama": checkpoints["llama"]}, (2, 2)) as operators:
        yield operators


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_through_two_operators_are_those_of_the_reference(
    operators: RunningOperators, load: Load, family: str
) -> None:
    shares = _step(load(family, operators=operators.operators(family)), family)
    assert shares == _step(load(family, masking="reference"), family)
    assert len(shares) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_close_to_those_of_the_plain_model(
    operators: RunningOperators, load: Load, checkpoints: dict[str, Path], family: str
) -> None:
    private = _step(load(family, operators=operators.operators(family)), family)
    plain = _step(CLASSES[family].from_pretrained(checkpoints[family]), family)
    assert private.keys() == plain.keys()
    a, b = (np.concatenate([np.frombuffer(x[name], np.float32) for name in plain]) for x in (private, plain))
    assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b)
    loss, expected = (float(np.frombuffer(x["loss"], np.float32)[0]) for x in (private, plain))
    assert loss == pytest.approx(expected, rel=0.02)


def test_a_bf16_model_through_two_operators_equals_the_reference(
    operators: RunningOperators, load: Load
) -> None:
    shares = _step(load("llama", operators=operators.operators("llama"), dtype=torch.bfloat16))
    assert shares == _step(load("llama", masking="reference", dtype=torch.bfloat16))


def test_three_operators_equal_the_reference(
    load: Load, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with running_operators(tmp_path, {"llama": checkpoints["llama"]}, (1, 1, 1)) as three:
        model = load("llama", operators=three.operators("llama"))
        assert _step(model) == _step(load("llama", masking="reference"))
        requests = {name: x.requests for name, x in multiplier_of(model).statistics().items()}
    assert len(set(requests.values())) == 1
    assert list(requests) == ["alpha", "beta", "gamma"]


@pytest.mark.parametrize("scheme", ["nf4", "nf4-double"])
def test_four_bit_workers_equal_the_reference_and_serve_no_other_scheme(
    load: Load, checkpoints: dict[str, Path], tmp_path: Path, scheme: str
) -> None:
    models = {x: checkpoints[x] for x in ("llama", "gpt2")}
    with running_operators(tmp_path, models, (1, 1), quantization=scheme) as operators:
        for family in models:
            asked = {"operators": operators.operators(family), "quantization": scheme}
            found = _step(load(family, **asked), family)
            assert found == _step(load(family, masking="reference", quantization=scheme), family)
            assert found != _step(load(family, masking="reference"), family)
        with pytest.raises(IncompatibleWorkerError, match=rf"--quantization int8.*configure {scheme} here"):
            load("llama", operators=operators.operators("llama"))


@pytest.mark.parametrize("family", CAUSAL)
def test_a_remote_head_through_two_operators_equals_the_reference(
    operators: RunningOperators, load: Load, family: str
) -> None:
    model = load(family, operators=operators.operators(family), head="remote")
    assert isinstance(model.get_output_embeddings(), RemoteLinear)
    assert _step(model, family) == _step(load(family, masking="reference", head="remote"), family)


@pytest.mark.parametrize("family", CAUSAL)
def test_generated_tokens_are_those_of_the_reference(
    operators: RunningOperators, load: Load, family: str
) -> None:
    prompts = torch.tensor([[5, 17, 31], [8, 3, 90]])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompts)
    tokens = [
        load(family, **masking).generate(prompts, attention_mask=mask, **options)
        for masking in ({"operators": operators.operators(family)}, {"masking": "reference"})
    ]
    assert tokens[0].shape == (2, 8)
    assert torch.equal(*tokens)


@pytest.mark.parametrize(
    "factors",
    [[1.0], [0.0], [1e30], [1e-38], [1.0, 0.0, 1e30, 1e-38, 1.0]],
    ids=lambda x: " ".join(map(str, x)),
)
def test_rows_of_any_size_equal_the_reference_in_both_directions(
    operators: RunningOperators, load: Load, factors: list[float]
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(factors), 32, generator=generator) * torch.tensor(factors)[:, None]
    results = []
    for masking in ({"operators": operators.operators("llama")}, {"masking": "reference"}):
        attention = load("llama", **masking).model.layers[0].self_attn
        x = rows.clone().requires_grad_()
        outputs = [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        # Gradients of the opposite sizes: large ones where the rows are small.
        torch.autograd.backward(outputs, [y.detach().flip(0) for y in outputs])
        results.append([x.grad, *outputs])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(value.isfinite().all() for value in results[0])
    if factors == [0.0]:
        assert not any(value.any() for value in results[0])


def test_values_that_are_not_finite_reach_no_worker(
    operators: RunningOperators, load: Load, tmp_path: Path
) -> None:
    model = load("llama", operators=operators.operators("llama"))
    for number, worker in enumerate(operators.workers):
        worker.record(tmp_path / str(number))
    for value in (float("nan"), float("inf")):
        with pytest.raises(UnsupportedError, match="not finite"):
            model.model.layers[0].mlp.down_proj(torch.full((2, 48), value))
    assert [x.read_text() for x in tmp_path.glob("*/parts.jsonl")] == [""] * 4


def test_4097_rows_are_cut_to_what_workers_take_and_equal_the_reference(
    load: Load, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    limits = Limits(max_rows=1000)
    inputs = batch("llama", rows=4097, tokens=1)
    inputs["labels"] = inputs["labels"].roll(1, 0)
    model = load("llama", masking="reference").eval()
    with running_operators(tmp_path, {"llama": checkpoints["llama"]}, limits=limits) as operators:
        remote = load("llama", operators=operators.operators("llama")).eval()
        for worker in operators.workers:
            worker.record(tmp_path / worker.spec.host)
        results = []
        for m in (remote, model):
            embedded = m.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
            logits = m(inputs_embeds=embedded).logits
            logits.square().sum().backward()
            results.append((logits.detach(), embedded.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for worker in operators.workers:
        received = read_recording(tmp_path / worker.spec.host)
        # Five blocks of about one size.
        assert max(x.rows for x in received) <= 1000
        assert [x.rows for x in received[:5]] == [819, 819, 820, 819, 820]
    seeds = [x.seed for x in read_recording(tmp_path / "127.0.0.1")[:5]]
    assert [seed.row_offset for seed in seeds if seed] == [0, 819, 1638, 2458, 3277]
    assert len({seed.key for seed in seeds if seed}) == 1


def test_a_kit_gives_what_the_checkpoint_gives(
    operators: RunningOperators, load: Load, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for family in ("llama", "gpt2", "bert"):
        kit = prepare(Checkpoint.open(checkpoints[family]), tmp_path / family)
        chosen = operators.operators(family)
        from_kit = _step(load(family, operators=chosen, folder=kit.folder), family)
        assert from_kit == _step(load(family, operators=chosen), family)


@pytest.mark.parametrize("head", ["local", "remote"])
def test_a_kit_made_for_a_head_gives_what_the_checkpoint_gives(
    operators: RunningOperators, load: Load, checkpoints: dict[str, Path], tmp_path: Path, head: str
) -> None:
    for family in ("llama", "llama_tied"):
        kit = prepare(Checkpoint.open(checkpoints[family]), tmp_path / family, head)  # type: ignore[arg-type]
        chosen = operators.operators(family)
        from_kit = _step(load(family, operators=chosen, folder=kit.folder, head=head), family)
        assert from_kit == _step(load(family, operators=chosen, head=head), family)


@pytest.mark.parametrize("fault", ["dies", "unavailable", "busy"])
@pytest.mark.parametrize("failing", [0, 1], ids=["who gets seeds", "who gets residues"])
def test_a_worker_that_fails_in_the_middle_is_replaced_with_the_same_bytes(
    spare: RunningOperators, load: Load, tmp_path: Path, failing: int, fault: str
) -> None:
    model = load("llama", operators=spare.operators("llama"))
    first, replica = spare[failing].workers
    for name, worker in (("first", first), ("replica", replica)):
        worker.record(tmp_path / name)
    first.lie("llama", fault, at=9)
    assert _step(model) == _step(load("llama", masking="reference"))
    statistics = multiplier_of(model).statistics()[spare[failing].name]
    failures = sum(statistics.failures.values())
    assert statistics.requests == statistics.verified_responses + failures
    # Whoever is dead is asked again after a while, which a slow machine takes for a step.
    assert failures == 1 or (fault == "dies" and failures > 1)
    assert statistics.lies == ()
    failed = read_recording(tmp_path / "first")[8]
    taken_over = read_recording(tmp_path / "replica")[0]
    assert taken_over.operand == failed.operand
    assert taken_over.product == failed.product
    assert (failed.seed is None) == bool(failing)
    if fault == "dies":
        first.process.join(60)
        assert not first.process.is_alive()


def test_shares_never_reach_another_operator_even_while_workers_fail(
    spare: RunningOperators, load: Load, tmp_path: Path
) -> None:
    """What alpha and beta got can't both be in one place: not even after failures at all of them."""
    model = load("llama", operators=spare.operators("llama"))
    for operator in spare:
        for number, worker in enumerate(operator.workers):
            worker.record(tmp_path / operator.name / str(number))
        operator.workers[0].lie("llama", "unavailable", at=5, times=3)
        operator.workers[1].lie("llama", "busy", at=2)
    assert _step(model) == _step(load("llama", masking="reference"))
    for operator, has_seeds in zip(spare, (True, False), strict=True):
        for number in range(2):
            received = read_recording(tmp_path / operator.name / str(number))
            assert received
            assert {x.seed is not None for x in received} == {has_seeds}


@pytest.mark.parametrize("dead", [0, 1], ids=["who gets seeds", "who gets residues"])
def test_a_worker_that_is_dead_at_the_start_is_left_to_its_replica(
    spare: RunningOperators, load: Load, caplog: pytest.LogCaptureFixture, dead: int
) -> None:
    chosen = spare.operators("llama")
    address = spare[dead].workers[0].addresses["llama"]
    spare[dead].workers[0].kill()
    model = load("llama", operators=chosen, retry_seconds=ALONE)
    assert f"worker {address} of operator {spare[dead].name}" in caplog.text
    assert _step(model) == _step(load("llama", masking="reference"))


def test_an_operator_that_is_dead_at_the_start_is_one_clear_error(
    spare: RunningOperators, load: Load
) -> None:
    chosen = spare.operators("llama")
    for worker in spare[1].workers:
        worker.kill()
    with pytest.raises(OperatorUnavailableError) as caught:
        load("llama", operators=chosen, retry_seconds=ALONE)
    message = str(caught.value)
    assert "no worker of operator beta answers" in message
    assert all(worker.addresses["llama"] in message for worker in spare[1].workers)
    assert "refused" in message
    assert "\n" not in message


def test_an_operator_that_dies_in_the_middle_is_one_clear_error(spare: RunningOperators, load: Load) -> None:
    model = load("llama", operators=spare.operators("llama", [0]), retry_seconds=ALONE)
    spare[0].workers[0].lie("llama", "dies", at=12)
    with pytest.raises(OperatorUnavailableError) as caught:
        _step(model)
    message = str(caught.value)
    assert "operator alpha: no worker answered within 2 s" in message
    assert f"{spare[0].workers[0].addresses['llama']}: could not be reached" in message
    assert "resume from the last checkpoint" in message
    assert "\n" not in message


def _restart(worker: RunningWorker, models: dict[str, Path]) -> RunningWorker:
    port = int(next(iter(worker.addresses.values())).rpartition(":")[2])
    worker.kill()
    return RunningWorker(replace(worker.spec, models=models, port=port))


def test_a_run_goes_on_when_a_dead_worker_is_started_again(
    spare: RunningOperators, load: Load, checkpoints: dict[str, Path]
) -> None:
    chosen = spare.operators("llama", [0])
    model = with_adapter(load("llama", operators=chosen, retry_seconds=GENEROUS), "llama")
    expected = _step(load("llama", masking="reference"))
    assert training_step(model, "llama") == expected
    again = _restart(spare[0].workers[0], {"llama": checkpoints["llama"]})
    try:
        assert training_step(model, "llama") == expected
    finally:
        again.stop()


def test_a_worker_that_comes_back_with_another_model_is_left_out(
    spare: RunningOperators, load: Load, checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = load("llama", operators=spare.operators("llama"), retry_seconds=GENEROUS)
    again = _restart(spare[0].workers[0], {"qwen3": checkpoints["qwen3"]})
    try:
        address = again.addresses["qwen3"]
        assert _step(model) == _step(load("llama", masking="reference"))
        assert f"worker {address} of operator alpha serves something else: FAILED_PRECONDITION" in caplog.text
    finally:
        again.stop()


def test_a_worker_that_hangs_does_not_hide_its_replica(spare: RunningOperators, load: Load) -> None:
    model = load("llama", operators=spare.operators("llama"), request_timeout=1.5, retry_seconds=1.0)
    spare[1].workers[0].lie("llama", "hangs", at=3)
    assert _step(model) == _step(load("llama", masking="reference"))
    assert multiplier_of(model).statistics()["beta"].lies == ()


def test_a_worker_with_another_model_is_refused_at_the_start(operators: RunningOperators, load: Load) -> None:
    alpha, beta = operators.operators("llama")
    other = replace(beta, workers=[operators[1].workers[0].addresses["llama_tied"]])
    with pytest.raises(IncompatibleWorkerError) as caught:
        load("llama", operators=[alpha, other])
    message = str(caught.value)
    assert f"worker {other.workers[0]} of operator beta serves another model (llama_tied" in message
    assert "start it with the same checkpoint and revision" in message


def test_a_worker_with_other_weights_of_the_same_shapes_is_refused(
    operators: RunningOperators, load: Load, tmp_path: Path
) -> None:
    folder = save_checkpoint("llama", tmp_path / "other", seed=6)
    with pytest.raises(IncompatibleWorkerError, match="serves another model"):
        load("llama", operators=operators.operators("llama"), folder=folder)


class _FromTheFuture(worker_pb2_grpc.WorkerServicer):
    def GetManifest(self, request: object, context: object) -> worker_pb2.Manifest:
        return worker_pb2.Manifest(protocol_versions=[2])


@pytest.fixture
def newer_worker(tmp_path: Path) -> Iterator[Operator]:
    """A worker of a release to come, over TLS."""
    files = issue_operator_certificates(tmp_path, "beta", ["127.0.0.2"])
    server = grpc.server(futures.ThreadPoolExecutor(2))
    worker_pb2_grpc.add_WorkerServicer_to_server(_FromTheFuture(), server)
    pair = (files.worker_key.read_bytes(), files.worker.read_bytes())
    credentials = grpc.ssl_server_credentials([pair], files.ca.read_bytes(), require_client_auth=True)
    port = server.add_secure_port("127.0.0.2:0", credentials)
    server.start()
    yield Operator("beta", [f"127.0.0.2:{port}"], ca=files.ca, cert=files.client, key=files.client_key)
    server.stop(None).wait()


def test_a_worker_of_another_protocol_version_is_refused_with_which_side_to_upgrade(
    operators: RunningOperators, load: Load, newer_worker: Operator
) -> None:
    with pytest.raises(IncompatibleWorkerError) as caught:
        load("llama", operators=[operators[0].operator("llama"), newer_worker])
    assert str(caught.value) == (
        f"worker {newer_worker.workers[0]} of operator beta speaks protocol version [2], this client "
        "speaks 1: upgrade this client"
    )


@pytest.fixture
def strangers(tmp_path: Path) -> OperatorCertificates:
    return issue_operator_certificates(tmp_path, "strangers", ["127.0.0.2"])


@pytest.mark.parametrize("wrong", ["ca", "certificate"])
def test_wrong_certificates_are_one_error_that_points_to_certificates(
    operators: RunningOperators, load: Load, strangers: OperatorCertificates, wrong: str
) -> None:
    alpha, beta = operators.operators("llama", [0])
    if wrong == "ca":
        beta = replace(beta, ca=strangers.ca)
    else:
        beta = replace(beta, cert=strangers.client, key=strangers.client_key)
    with pytest.raises(OperatorUnavailableError) as caught:
        load("llama", operators=[alpha, beta], retry_seconds=1.0)
    message = str(caught.value)
    assert f"no worker of operator beta answers (worker {beta.workers[0]} of operator beta" in message
    if wrong == "ca":
        # It must be told from a worker that is not there.
        assert "CERTIFICATE_VERIFY_FAILED" in message
    assert "its certificates" in message
    assert "\n" not in message


def test_a_worker_at_an_address_that_its_certificate_does_not_name_is_refused(
    operators: RunningOperators, load: Load, checkpoints: dict[str, Path]
) -> None:
    """Whoever got hold of one worker's certificate can't pass for the operator's other workers."""
    alpha, beta = operators.operators("llama", [0])
    spec = replace(operators[1].workers[0].spec, host="127.0.0.9", models={"llama": checkpoints["llama"]})
    elsewhere = RunningWorker(spec)
    try:
        moved = replace(beta, workers=[elsewhere.addresses["llama"]])
        with pytest.raises(OperatorUnavailableError, match="no worker of operator beta answers"):
            load("llama", operators=[alpha, moved], retry_seconds=1.0)
    finally:
        elsewhere.stop()


def test_plaintext_on_loopback_equals_the_reference(
    load: Load, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with running_operators(tmp_path, {"llama": checkpoints["llama"]}, secure=False) as plaintext:
        chosen = [Operator(x.name, [x.workers[0].addresses["llama"]]) for x in plaintext]
        model = load("llama", operators=chosen, insecure=True)
        assert _step(model) == _step(load("llama", masking="reference"))


def test_threads_that_train_at_the_same_time_get_their_own_results(
    operators: RunningOperators, load: Load
) -> None:
    model = load("llama", operators=operators.operators("llama")).eval()
    inputs = [batch("llama", seed=seed) for seed in range(6)]
    with torch.no_grad():
        expected = [model(**x).logits for x in inputs]
    with futures.ThreadPoolExecutor(3) as pool:
        logits = list(pool.map(lambda x: model(**x).logits.detach(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))


def test_data_loaders_that_fork_do_not_disturb_open_connections(
    operators: RunningOperators, load: Load
) -> None:
    model = load("llama", operators=operators.operators("llama"))
    model.train()
    examples = [{name: value[0] for name, value in batch("llama", seed=i).items()} for i in range(6)]
    loader = DataLoader(examples, batch_size=2, num_workers=1, multiprocessing_context="fork")  # type: ignore[arg-type]
    steps = 0
    for inputs in loader:
        model(**inputs).loss.backward()
        steps += 1
    assert steps == 3
    assert all(x.lies == () for x in multiplier_of(model).statistics().values())


def test_a_forked_child_has_connections_and_masks_of_its_own(
    operators: RunningOperators, load: Load, tmp_path: Path
) -> None:
    model = load("llama", operators=operators.operators("llama", [0])).eval()
    for worker in operators.workers[::2]:
        worker.record(tmp_path / worker.spec.host)
    with torch.no_grad():
        expected = model(**batch("llama")).logits
        child = os.fork()
        if not child:
            signal.alarm(60)  # should it hang, it ends
            torch.set_num_threads(1)  # torch's own threads do not survive a fork
            os._exit(0 if torch.equal(model(**batch("llama")).logits, expected) else 3)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(model(**batch("llama")).logits, expected)
    for worker in operators.workers[::2]:
        received = read_recording(tmp_path / worker.spec.host)
        assert len(received) == 3 * 9
        assert len({x.operand for x in received}) == len(received)


def test_closing_ends_every_connection_and_thread(operators: RunningOperators, load: Load) -> None:
    before = set(threading.enumerate())
    model = load("llama", operators=operators.operators("llama"))
    model(**batch("llama"))
    multiplier_of(model).close()
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert not [name for name in left if name.startswith("blindtune_")]
