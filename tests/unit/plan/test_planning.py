"""A plan agrees with the estimate of a recipe to the byte, and scales as the world does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import FAMILIES
from support.recipes import recipe_of, with_tokenizer, write_lines
from transformers import (
    BertConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    T5Config,
)

from blindtune.checkpoint import Checkpoint
from blindtune.client.data.prepared import prepare_data
from blindtune.client.kit.groups import all_products
from blindtune.client.kit.hints import hint_bytes
from blindtune.client.kit.kit import product_outputs
from blindtune.client.plan.costs import Link
from blindtune.client.plan.estimate import estimate
from blindtune.client.plan.planning import Plan, Settings, make_plan
from blindtune.client.plan.profiles import CPU_CLIENT, SHIPPED, Profile
from blindtune.client.training.models import load_tokenizer
from blindtune.errors import CheckpointError, ConfigurationError, UnsupportedError
from blindtune.protocol.lattice.parameters import LATTICE_PARAMETER_SETS, MLWE1536
from blindtune.protocol.parameters import PARAMETER_SETS

pytestmark = pytest.mark.hf

SLOW_LINK = Link(1e5, 1e5, 0.0)
PROFILE = Profile(CPU_CLIENT, SHIPPED["cpu"])
SMALL = Settings(batch=2, length=8, link=SLOW_LINK)
_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
OTHERS: dict[str, PretrainedConfig] = {
    "mistral": MistralConfig(**_SIZES, num_key_value_heads=2),
    "phi": PhiConfig(**_SIZES),
    "gemma": GemmaConfig(**_SIZES, num_key_value_heads=2, head_dim=8),
    "opt": OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "bert": BertConfig(**_SIZES, architectures=["BertModel"]),
}


def config_only(folder: Path, config: PretrainedConfig) -> str:
    """A folder with config.json and nothing else."""
    config.save_pretrained(folder)
    assert [x.name for x in folder.iterdir()] == ["config.json"]
    return str(folder)


def plan_of(folder: Path | str, profile: Profile = PROFILE, **changes: Any) -> Plan:
    return make_plan(str(folder), None, replace(SMALL, **changes), profile)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    return config_only(
        folder, LlamaConfig(**_SIZES, num_key_value_heads=2, architectures=["LlamaForCausalLM"])
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_traffic_is_that_of_a_recipe_with_the_same_batches(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    classifies = family == "bert"
    # Eight examples of one length, so that there is no padding and each batch is the same.
    records = [
        {"text": "ab ab", "label": "xyz"[i % 3]} if classifies else {"prompt": "ab", "completion": "c"}
        for i in range(8)
    ]
    folder = with_tokenizer(checkpoints[family], tmp_path)
    recipe = recipe_of(
        tmp_path,
        folder,
        write_lines(tmp_path / "train.jsonl", records),
        masking={"mode": "shares", "insecure": True},
        operators=[{"name": x, "workers": [f"127.0.0.{i}:1"]} for i, x in enumerate("abc", 1)],
        data={"task": "classification" if classifies else "instructions"},
        training={"max_steps": 2, "per_device_train_batch_size": 4},
    )
    data = prepare_data(recipe.data, load_tokenizer(folder), 0)
    (length,) = set(data.train.lengths)
    down = {}
    for name, parameters in PARAMETER_SETS.items():
        masking = recipe.masking.model_copy(update={"parameter_set": name})
        expected = estimate(recipe.model_copy(update={"masking": masking}), data)
        planned = plan_of(
            checkpoints[family], batch=4, length=length, micro_batches=2, operators=3, parameter_set=name
        )
        assert (planned.rounds, planned.bytes_up, planned.bytes_down, planned.tokens) == (
            expected.rounds,
            expected.bytes_up,
            expected.bytes_down,
            expected.tokens,
        )
        down[name] = planned.bytes_down / parameters.word_bytes
    assert len(set(down.values())) == 1, "answers have as many numbers in every parameter set"


@pytest.mark.parametrize("family", FAMILIES)
def test_hints_are_those_that_a_kit_will_hold(family: str, checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints[family])
    shapes = {x.name: (x.out_features, x.in_features) for x in checkpoint.layers}
    for parameters in LATTICE_PARAMETER_SETS.values():
        expected = sum(
            4096 + hint_bytes(parameters, product_outputs(x, shapes))
            for x in all_products(checkpoint, "auto")
        )
        planned = plan_of(checkpoints[family], masking="lattice", parameter_set=parameters.name)
        assert planned.memory.hints == expected
    assert plan_of(checkpoints[family]).memory.hints == 0


# Of both blocks together, and beside them: an untied head, or the layer that pools.
GROUPS = {"mistral": 2 * 4 + 1, "phi": 2 * 3 + 1, "gemma": 2 * 4, "opt": 2 * 4, "bert": 2 * 4 + 1}


@pytest.mark.parametrize("family", OTHERS)
def test_a_configuration_without_weights_is_enough(family: str, tmp_path: Path) -> None:
    planned = plan_of(config_only(tmp_path, OTHERS[family]))
    # Nothing trained precedes the first group, so it is not asked for backward.
    assert planned.rounds == 2 * GROUPS[family] - 1
    assert planned.local_seconds > 0
    assert planned.memory.worker > 2 * 6 * 32 * 32
    assert planned.memory.activations > 0


def test_a_bert_without_a_task_is_a_classifier_and_a_llama_a_language_model(
    tmp_path: Path, llama: str
) -> None:
    folder = config_only(tmp_path, BertConfig(**_SIZES, architectures=["BertForMaskedLM"]))
    assert plan_of(folder).architecture == "BertForSequenceClassification"
    assert plan_of(llama).architecture == "LlamaForCausalLM"
    assert plan_of(llama, task="classification").architecture == "LlamaForSequenceClassification"


def test_with_one_micro_batch_a_step_takes_the_sum_of_its_parts(llama: str) -> None:
    planned = plan_of(llama, link=Link(1e6, 1e5, 0.01))
    assert planned.seconds == pytest.approx(sum(planned.busy.values()))
    assert planned.busy["latency"] == pytest.approx((0.01 + CPU_CLIENT.turn) * planned.rounds)


@pytest.mark.parametrize("masking", ["shares", "lattice"])
def test_network_time_is_bytes_over_bandwidth_in_each_direction(llama: str, masking: str) -> None:
    slow, fast = (plan_of(llama, masking=masking, link=Link(x, x / 4, 0.0)) for x in (1e5, 2e5))
    for planned, speed in ((slow, 1e5), (fast, 2e5)):
        assert planned.busy["upload"] == pytest.approx(planned.bytes_up / speed)
        assert planned.busy["download"] == pytest.approx(4 * planned.bytes_down / speed)
        assert planned.bound == "download"
    assert slow.busy["client"] == fast.busy["client"]


def test_micro_batches_in_flight_hide_what_is_not_the_bottleneck(llama: str) -> None:
    link = Link(1e6, 1e6, 0.02)
    one, two, many = (plan_of(llama, link=link, micro_batches=8, in_flight=x) for x in (1, 2, 8))
    assert one.seconds > two.seconds > many.seconds
    assert one.busy == two.busy and one.bytes_up == two.bytes_up
    longest = max(seconds for name, seconds in many.busy.items() if name != "latency")
    assert longest <= many.seconds < one.seconds
    assert many.memory.activations == 8 * one.memory.activations


def test_workers_on_this_machine_take_time_of_their_own(llama: str) -> None:
    remote = plan_of(llama, link=Link(1e15, 1e15, 0.0), micro_batches=4, in_flight=4)
    here = plan_of(llama, link=None, micro_batches=4, in_flight=4)
    # Nothing overlaps on one processor, and it does the work of both operators.
    assert here.seconds == pytest.approx(here.busy["client"] + here.busy["workers"])
    assert here.busy["workers"] > 1.5 * remote.busy["workers"]
    assert remote.seconds < here.seconds


def test_more_rows_cost_more_of_everything(llama: str) -> None:
    small, large = plan_of(llama), plan_of(llama, length=16)
    assert large.rounds == small.rounds
    assert large.bytes_down == 2 * small.bytes_down
    assert large.busy["client"] > small.busy["client"]
    assert large.memory.activations > small.memory.activations
    assert large.memory.adapter == small.memory.adapter


def test_a_lattice_plan_sends_less_and_computes_more_than_shares(llama: str) -> None:
    shares, lattice = plan_of(llama), plan_of(llama, masking="lattice")
    assert 2 * lattice.bytes_down == shares.bytes_down
    assert lattice.bytes_up == shares.bytes_up - 32 * shares.rounds
    bigger = plan_of(llama, masking="lattice", parameter_set=MLWE1536.name)
    assert bigger.busy["client"] > lattice.busy["client"]


def test_prices_are_of_all_workers_for_the_step_and_of_all_bytes(llama: str) -> None:
    planned = plan_of(llama, worker_hour=7.2, gigabyte=0.5, operators=3)
    assert planned.worker_cost == pytest.approx(planned.seconds * 3 * 7.2 / 3600)
    assert planned.traffic_cost == pytest.approx((planned.bytes_up + planned.bytes_down) * 0.5e-9)
    assert planned.cost == planned.worker_cost + planned.traffic_cost


def test_a_faster_worker_takes_less_time_and_nothing_else_changes(llama: str) -> None:
    cpu, gpu = (plan_of(llama, Profile(CPU_CLIENT, SHIPPED[x])) for x in ("cpu", "h100"))
    assert gpu.busy["workers"] < cpu.busy["workers"]
    assert gpu.busy | {"workers": 0} == cpu.busy | {"workers": 0}


def test_the_memory_of_an_adapter_is_weights_gradients_and_two_moments_in_float32(llama: str) -> None:
    eight, sixteen = plan_of(llama), plan_of(llama, rank=16)
    assert sixteen.trained == 2 * eight.trained
    assert eight.memory.adapter == 16 * eight.trained


def test_a_worker_with_four_bit_weights_takes_less_memory_and_nothing_else_changes(llama: str) -> None:
    plain, four_bit = plan_of(llama), plan_of(llama, quantization="nf4")
    assert plan_of(llama, quantization="nf4-double").memory.worker < four_bit.memory.worker
    assert four_bit.memory.worker < plain.memory.worker
    assert replace(four_bit, memory=plain.memory) == plain
    assert replace(four_bit.memory, worker=plain.memory.worker) == plain.memory


def test_memory_between_arrays_is_counted_as_calibrated(llama: str) -> None:
    tight, loose = (
        plan_of(llama, Profile(replace(CPU_CLIENT, spread=x), SHIPPED["cpu"])).memory for x in (1.0, 3.0)
    )
    grown = loose.client - tight.client
    assert grown == loose.buffers - tight.buffers
    # Twice what is there at once, which is more than what is kept for the backward pass.
    assert grown > 2 * tight.activations
    assert loose.activations == tight.activations and loose.adapter == tight.adapter


@pytest.mark.parametrize(
    "constant", ["flop", "moved", "call", "attended"], ids=lambda x: f"{x} of the local part"
)
def test_each_kind_of_local_work_takes_the_time_of_its_constant(constant: str, llama: str) -> None:
    slow = Profile(replace(CPU_CLIENT, **{constant: 2 * getattr(CPU_CLIENT, constant)}), SHIPPED["cpu"])
    one, two = plan_of(llama), plan_of(llama, slow)
    assert two.local_seconds > one.local_seconds
    assert two.busy | {"client": 0} == one.busy | {"client": 0}


def test_threads_are_woken_up_and_memory_provided_where_operations_are_large(llama: str) -> None:
    def seconds(constant: str, length: int) -> float:
        slow = Profile(replace(CPU_CLIENT, **{constant: 1.0}), SHIPPED["cpu"])
        large = {"batch": 64, "length": length}
        return plan_of(llama, slow, **large).local_seconds - plan_of(llama, **large).local_seconds

    assert seconds("shared", 64) > seconds("shared", 1) == 0
    # Logits of 64 * 2048 tokens and 99 words, in float32.
    assert seconds("fresh", 2048) > 64 * 2048 * 99 * 4 * 0.9
    assert seconds("fresh", 64) == 0


def test_a_head_at_the_workers_is_one_more_product_in_each_direction(llama: str) -> None:
    local, remote = plan_of(llama, head="local"), plan_of(llama, head="remote")
    assert (remote.layers, remote.rounds) == (local.layers + 1, local.rounds + 2)


NONSENSE: dict[str, tuple[dict[str, Any], str]] = {
    "no_rows": ({"batch": 0}, "batch must be 1 or more"),
    "no_tokens": ({"length": -4}, "length must be 1 or more"),
    "more_in_flight_than_there_are": ({"in_flight": 2}, "2 micro-batches can't be in flight"),
    "one_operator_for_shares": ({"operators": 1}, "needs two or more operators"),
    "two_operators_for_lattice": ({"masking": "lattice", "operators": 2}, "takes one operator"),
    "no_masking": ({"masking": "none"}, "masking is shares or lattice"),
    "no_such_lattice": ({"masking": "lattice", "parameter_set": "x"}, "is one of mlwe1280"),
    "negative_price": ({"gigabyte": -1.0}, "a price can't be negative"),
    "no_bandwidth": ({"link": Link(0.0, 1.0, 0.0)}, "bandwidth must be positive"),
    "bandwidth_is_no_number": ({"link": Link(float("nan"), 1.0, 0.0)}, "bandwidth must be positive"),
    "negative_latency": ({"link": Link(1.0, 1.0, -1.0)}, "latency must not be negative"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_settings_that_make_no_sense_are_refused(case: str) -> None:
    changes, message = NONSENSE[case]
    with pytest.raises(ConfigurationError, match=message):
        replace(SMALL, **changes)


def test_an_adapter_on_layers_that_are_not_there_is_refused(llama: str) -> None:
    with pytest.raises(ConfigurationError, match="adapter: .*no_such_layer"):
        plan_of(llama, target_modules=("no_such_layer",))


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    folder = config_only(tmp_path, MixtralConfig(**_SIZES, num_local_experts=4))
    with pytest.raises(UnsupportedError, match="is a mixture of experts"):
        plan_of(folder)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = config_only(tmp_path, T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    with pytest.raises(UnsupportedError, match="a t5 model can't be trained for the task instructions"):
        plan_of(folder, task="instructions")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "no-such-organisation/no-such-model"])
def test_a_model_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        plan_of(name)


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "many"}')
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        plan_of(tmp_path)
