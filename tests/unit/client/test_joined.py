"""Weights that a checkpoint stores joined in one tensor: each is a layer of its own, like any other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.standard import SHARES
from support.transports import LocalWorker, honest_multiplier, manifest_of, remote_multiplier
from torch import nn
from transformers import (
    GteConfig,
    GteForSequenceClassification,
    GteModel,
    Molmo2TextConfig,
    Molmo2TextModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import (
    Chunk,
    Interleave,
    PermuteForRope,
    Split,
    Transpose,
    WeightConverter,
)

from blindtune.checkpoint import Checkpoint
from blindtune.checkpoint.files import TensorFiles
from blindtune.checkpoint.joined import Rows, split_rows, tensor_keys
from blindtune.client import BlindConfig, Operator
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import cached_kit, prepare
from blindtune.client.merge.checkpoint import merge
from blindtune.client.model import quantizer as quantizer_module
from blindtune.client.model.remote_linear import RemoteLinear
from blindtune.client.operators.manifest import check_manifest
from blindtune.client.preflight.weights import require_shapes
from blindtune.client.rounds.connect import expectations
from blindtune.errors import (
    CheckpointError,
    IncompatibleWorkerError,
    UnsupportedError,
    UntrustworthyOperatorError,
)
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31, ParameterSet
from blindtune.protocol.products import Direction, Product, forward_products
from blindtune.protocol.residues import Residues
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.verification import secret_vectors
from blindtune.protocol.weights import quantize_int8

pytestmark = pytest.mark.hf

_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.15,
    "max_position_embeddings": 64,
}
_MOLMO2 = _SIZES | {"head_dim": 8, "additional_vocab_size": 8, "qkv_bias": True}
FAMILIES: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "gte": (GteForSequenceClassification, GteConfig(**_SIZES, num_labels=3, pad_token_id=0)),
    # Its keys and values have fewer rows than its queries.
    "molmo2": (Molmo2TextModel, Molmo2TextConfig(**_MOLMO2, num_key_value_heads=2)),
}
JOINED = {
    "gte": {
        "gte.encoder.layer.0.attention.qkv_proj.weight": [32, 32, 32],
        "gte.encoder.layer.0.mlp.up_gate_proj.weight": [48, 48],
    },
    "molmo2": {
        "layers.0.self_attn.att_proj.weight": [32, 16, 16],
        "layers.0.mlp.ff_proj.weight": [48, 48],
    },
}
IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))


def _save(cls: type[PreTrainedModel], config: PretrainedConfig, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = cls(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)  # under zeros a lost bias would go unnoticed
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Family:
    """A tiny checkpoint, in the form in which families of its kind are published."""

    name: str
    folder: Path

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return FAMILIES[self.name][0]

    def stock(self) -> PreTrainedModel:
        return self.model_class.from_pretrained(self.folder, dtype=torch.float32).eval()

    def remote(self, **options: Any) -> PreTrainedModel:
        config = BlindConfig(masking="reference", progress=False)
        return self.model_class.from_pretrained(
            self.folder, quantization_config=config, dtype=torch.float32, **options
        )


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return {x: Family(x, _save(*FAMILIES[x], tmp_path_factory.mktemp(x))) for x in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


def _outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS)[0]


def test_each_part_is_the_rows_of_the_whole_tensor_as_integers(family: Family) -> None:
    checkpoint = Checkpoint.open(family.folder)
    layers = {x.name: x for x in checkpoint.layers}
    with checkpoint.reader() as reader:
        prints = {name: reader.read(layer).fingerprint() for name, layer in layers.items()}
        for key, counts in JOINED[family.name].items():
            whole, start = quantize_int8(reader.tensors.get(key)), 0
            for count in counts:
                part = reader.read(layers[f"{key}[{start}:{start + count}]"])
                rows = slice(start, start + count)
                assert torch.equal(part.integers, whole.integers[rows])
                assert np.array_equal(part.scales, whole.scales[rows])
                assert (part.integers.shape, start) == ((count, 32), rows.start)
                start += count
            assert start == whole.integers.shape[0]
    assert len(set(prints.values())) == len(prints) == len(layers)


def test_every_linear_layer_is_remote_and_all_else_is_loaded(
    family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    model, info = family.remote(output_loading_info=True)
    stock = family.stock()
    assert not any(info.values()), info
    remote = {name for name, module in model.named_modules() if isinstance(module, RemoteLinear)}
    linear = {name for name, module in stock.named_modules() if isinstance(module, nn.Linear)}
    assert remote == linear - {"classifier"}
    state, expected = model.state_dict(), stock.state_dict()
    assert set(expected) - set(state) == {f"{name}.weight" for name in remote}
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert not [x for x in caplog.records if x.name == "blindtune.client.model.kept"]
    together = {id(x._group): len(x._group._singles) for x in model.modules() if isinstance(x, RemoteLinear)}
    assert sorted(x for x in together.values() if x > 1) == [2, 2, 3, 3]


def test_outputs_and_gradients_are_those_of_the_plain_model_to_quantization_error(family: Family) -> None:
    outputs, gradients = [], []
    for model in (family.remote(), family.stock()):
        torch.manual_seed(2)
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
        output = adapted.eval()(input_ids=IDS)[0]
        (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
        outputs.append(output.detach())
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.grad is not None})
    assert 0 < float((outputs[0] - outputs[1]).norm() / outputs[1].norm()) < 0.05
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) >= 2 * 2 * 7
    found, expected = (torch.cat([x.flatten() for x in g.values()]) for g in gradients)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.1


def _kit(family: Family, folder: Path) -> Kit:
    return prepare(Checkpoint.open(family.folder), folder)


def _from_kit(
    family: Family, kit: Kit, workers: Sequence[LocalWorker], monkeypatch: pytest.MonkeyPatch
) -> PreTrainedModel:
    multiplier = remote_multiplier(kit, [[worker] for worker in workers], source=ShareSource(2, SHARES))
    monkeypatch.setattr(quantizer_module, "connect", lambda *_: multiplier)
    nowhere = [Operator("alpha", ["127.0.0.1:1"]), Operator("beta", ["127.0.0.2:1"])]
    config = BlindConfig(operators=nowhere, progress=False, insecure=True, allow_one_machine=True)
    return family.model_class.from_pretrained(kit.folder, quantization_config=config, dtype=torch.float32)


def test_from_a_kit_without_these_weights_masked_products_are_those_of_the_reference(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = _kit(family, tmp_path / "kit")
    with TensorFiles(kit.folder) as here, TensorFiles(family.folder) as whole:
        assert set(whole) - set(here) == set(tensor_keys(kit.layers)) >= JOINED[family.name].keys()
    assert kit.description.fingerprint == cached_kit(Checkpoint.open(family.folder)).description.fingerprint
    honest = honest_multiplier(Checkpoint.open(family.folder))
    workers = [LocalWorker(honest), LocalWorker(honest)]
    model = _from_kit(family, kit, workers, monkeypatch)
    assert torch.equal(_outputs(model), _outputs(family.remote()))
    asked = {span.layer for request in workers[1].requests for span in request.product.spans}
    assert asked == set(kit.layers)


@dataclass
class Confused:
    """Takes another part of the same tensor for the one that it is asked for."""

    honest: Multiplier
    other: dict[str, str]

    def multiply(self, product: Product, operand: Residues, parameters: ParameterSet) -> Residues:
        spans = tuple(replace(x, layer=self.other.get(x.layer, x.layer)) for x in product.spans)
        return self.honest.multiply(replace(product, spans=spans), operand, Q31)


def _two_parts(family: Family) -> tuple[str, str]:
    """Two layers of the same shape that share a key."""
    key, counts = list(JOINED[family.name].items())[1]
    return f"{key}[0:{counts[0]}]", f"{key}[{counts[0]}:{sum(counts)}]"


def test_the_answer_for_another_part_of_the_same_tensor_is_a_lie(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = _two_parts(family)
    honest = honest_multiplier(Checkpoint.open(family.folder))
    confused = Confused(honest, {one: other, other: one})
    workers = [LocalWorker(honest), LocalWorker(confused)]
    model = _from_kit(family, _kit(family, tmp_path / "kit"), workers, monkeypatch)
    with pytest.raises(UntrustworthyOperatorError, match="beta"):
        _outputs(model)


def test_a_worker_whose_parts_are_exchanged_is_refused(family: Family) -> None:
    kit = cached_kit(Checkpoint.open(family.folder))
    manifest = manifest_of(kit)
    check_manifest(manifest, expectations(kit, Q31), "beta")
    one, other = (next(x for x in manifest.layers if x.name == name) for name in _two_parts(family))
    one.fingerprint, other.fingerprint = other.fingerprint, one.fingerprint
    with pytest.raises(IncompatibleWorkerError, match="lacks 2 of the layers"):
        check_manifest(manifest, expectations(kit, Q31), "beta")


def test_parts_of_one_tensor_share_neither_masks_nor_verification_vectors(family: Family) -> None:
    names = _two_parts(family)
    shape = {x.name: (x.out_features, x.in_features) for x in Checkpoint.open(family.folder).layers}
    assert shape[names[0]] == shape[names[1]]
    products = [forward_products([name], 32)[0] for name in names]
    assert products[0].label != products[1].label
    # Even if the operating system gave the same bytes twice.
    source = ShareSource(2, Q31, random_bytes=bytes)
    operand = np.ones((3, 32), np.int32)
    seeds = [source.hide_integers(operand, x).shares[0].seed for x in products]
    assert seeds[0] and seeds[1] and seeds[0].key != seeds[1].key
    s = [secret_vectors(bytes(32), name, Direction.FORWARD, shape[name][0], Q31) for name in names]
    assert not np.array_equal(*s)


def _adapter(family: Family, folder: Path, **lora: Any) -> Path:
    torch.manual_seed(4)
    task = "SEQ_CLS" if family.name == "gte" else "FEATURE_EXTRACTION"
    peft = get_peft_model(
        family.stock(), LoraConfig(**{"task_type": task, "r": 4, "target_modules": "all-linear"} | lora)
    )
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    peft.save_pretrained(folder)
    return folder


def _labels(family: Family) -> list[str]:
    return ["breach", "notice", "term"] if family.name == "gte" else []


@pytest.mark.parametrize(
    "lora", [{}, {"bias": "all"}, {"target_modules": ["k_proj"]}], ids=["all", "biases", "one part"]
)
@pytest.mark.filterwarnings("ignore")
def test_merging_writes_the_joined_form_bit_for_bit_as_peft_and_transformers_do(
    family: Family, tmp_path: Path, lora: dict[str, Any]
) -> None:
    adapter = _adapter(family, tmp_path / "adapter", **lora)
    merge(adapter, family.folder, tmp_path / "out", labels=_labels(family))
    adapted = PeftModel.from_pretrained(family.stock(), adapter).eval()
    expected = _outputs(adapted)
    adapted.merge_and_unload().save_pretrained(tmp_path / "expected")
    merged, whole = (load_file(tmp_path / x / "model.safetensors") for x in ("out", "expected"))
    assert merged.keys() == whole.keys() >= JOINED[family.name].keys()
    assert all(torch.equal(merged[key], whole[key]) for key in merged)
    model, info = family.model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.allclose(_outputs(model), expected, atol=1e-5)
    assert not torch.allclose(_outputs(family.stock()), expected, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_classifier_on_a_checkpoint_of_the_bare_model_has_the_same_layers_and_is_merged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = FAMILIES["gte"][1]
    family = Family("gte", _save(GteModel, config, tmp_path / "base"))
    names = {x.name for x in Checkpoint.open(family.folder).layers}
    assert "encoder.layer.0.mlp.up_gate_proj.weight[48:96]" in names
    model, info = family.remote(output_loading_info=True)
    assert not info["unexpected_keys"]
    assert {x.split(".")[-2] for x in info["missing_keys"]} == {"dense", "classifier"}
    assert sum(isinstance(x, RemoteLinear) for x in model.modules()) == len(names)
    assert not [
        x for x in caplog.records if x.name == "blindtune.client.model.kept"
    ]  # of a pooler that is random
    targets = {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["pooler", "classifier"]}
    adapter = _adapter(family, tmp_path / "adapter", **targets)
    merge(adapter, family.folder, tmp_path / "out", labels=_labels(family))
    tuned, info = GteForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.allclose(
        _outputs(tuned), _outputs(PeftModel.from_pretrained(family.stock(), adapter)), atol=1e-5
    )


def test_what_loading_makes_in_other_ways_is_not_merged(families: dict[str, Family], tmp_path: Path) -> None:
    embedding = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    adapter = _adapter(families["molmo2"], tmp_path / "adapter", **embedding)
    with pytest.raises(UnsupportedError, match=r"changes embed_tokens.weight, which .* in another form"):
        merge(adapter, families["molmo2"].folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_a_tensor_with_a_part_that_is_no_layer_nothing_is_remote(tmp_path: Path) -> None:
    """Here keys and values are too small; loading could not give the client a part of a tensor."""
    config = Molmo2TextConfig(**_MOLMO2 | {"head_dim": 4}, num_key_value_heads=1)
    family = Family("molmo2", _save(Molmo2TextModel, config, tmp_path))
    names = {x.name for x in Checkpoint.open(tmp_path).layers}
    assert not any("att_proj" in name for name in names) and "layers.0.mlp.ff_proj.weight[0:48]" in names
    model, stock = family.remote(), family.stock()
    assert torch.equal(model.layers[0].self_attn.q_proj.weight, stock.layers[0].self_attn.q_proj.weight)
    assert 0 < float((_outputs(model) - _outputs(stock)).norm() / _outputs(stock).norm()) < 0.05


def test_settings_that_cut_a_tensor_elsewhere_than_its_kit_leave_it_whole(tmp_path: Path) -> None:
    """Else the queries, which begin at the same place, would be remote, and keys and values random."""
    config = Molmo2TextConfig(**_MOLMO2 | {"qkv_bias": False}, num_key_value_heads=2)
    family = Family("molmo2", _save(Molmo2TextModel, config, tmp_path))
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        family.remote(num_key_value_heads=1)


def test_a_tensor_with_other_rows_than_its_parts_is_refused(family: Family, tmp_path: Path) -> None:
    key = next(iter(JOINED[family.name]))
    adapter = _adapter(family, tmp_path / "adapter")
    damaged = tmp_path / "model"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((family.folder / "config.json").read_bytes())
    tensors = load_file(family.folder / "model.safetensors")
    tensors[key] = torch.cat([tensors[key], tensors[key][:3]])
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(damaged)
    layer = next(x for x in checkpoint.layers if x.key == key)
    with checkpoint.reader() as reader, pytest.raises(CheckpointError, match="but the model needs"):
        reader.read(layer)
    with TensorFiles(damaged) as files, pytest.raises(CheckpointError, match=f"tensor {key} has shape"):
        require_shapes(files, family.stock())
    with pytest.raises(CheckpointError, match=f"tensor {key} of the base has shape"):
        merge(adapter, damaged, tmp_path / "out", labels=_labels(family))
    assert not (tmp_path / "out").exists()


def _converter(*operations: Any, sources: Sequence[str] = ("qkv",)) -> WeightConverter:
    many = len(sources) > 1
    return WeightConverter(list(sources), ["q"] if many else ["q", "k", "v"], list(operations))


@pytest.mark.parametrize(
    ("converter", "counts"),
    [
        (lambda: _converter(Chunk(dim=0)), [4, 4, 4]),
        (lambda: _converter(Split(dim=0)), [6, 3, 3]),
    ],
)
def test_ranges_follow_from_the_conversion(
    converter: Callable[[], WeightConverter], counts: list[int]
) -> None:
    rows = split_rows(converter(), "qkv", counts)
    ends = np.cumsum(counts)
    assert rows == [Rows("qkv", int(end) - n, int(end), 12) for end, n in zip(ends, counts, strict=True)]
    assert tensor_keys(x.name for x in rows) == ["qkv"]


@pytest.mark.parametrize(
    ("converter", "counts"),
    [
        (lambda: _converter(Chunk(dim=0)), [6, 3, 3]),
        (lambda: _converter(Chunk(dim=1)), [4, 4, 4]),
        (lambda: _converter(Chunk(dim=0, num_shards_attribute="num_codebooks")), [4, 4, 4]),
        (lambda: _converter(Split(dim=1)), [4, 4, 4]),
        (lambda: _converter(Interleave(dim=0), Chunk(dim=0)), [4, 4, 4]),
        (lambda: _converter(Chunk(dim=0), PermuteForRope()), [4, 4, 4]),
        (lambda: _converter(Transpose(0, 1)), [4, 4, 4]),
        (lambda: _converter(Chunk(dim=0), sources=["q", "k"]), [4]),
    ],
)
def test_other_conversions_are_not_read(converter: Callable[[], WeightConverter], counts: list[int]) -> None:
    assert split_rows(converter(), "qkv", counts) is None


class _OwnChunk(Chunk):
    """May do anything."""


def test_an_operation_that_only_derives_from_a_known_one_is_not_read() -> None:
    assert split_rows(_converter(_OwnChunk(dim=0)), "qkv", [4, 4, 4]) is None
