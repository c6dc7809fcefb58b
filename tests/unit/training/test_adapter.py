"""A run's adapter: what is random is trained and saved, and every name in the recipe means something."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.recipes import Silent, character_tokenizer, recipe_of, write_lines
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
)

from blindtune.checkpoint.files import TensorFiles
from blindtune.checkpoint.skeleton import absent_parameters
from blindtune.client import BlindConfig, multiplier_of
from blindtune.client.data.prepared import prepare_data
from blindtune.client.merge.checkpoint import merge
from blindtune.client.plan.estimate import estimate
from blindtune.client.recipe import Recipe, load_recipe, write_recipe
from blindtune.client.runs.run import train_recipe
from blindtune.client.training.adapter import new_adapter
from blindtune.client.training.models import BaseModel, load_tokenizer, stored_keys
from blindtune.errors import BlindtuneError, CheckpointError, ConfigurationError

pytestmark = pytest.mark.hf

_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_DISTILBERT = DistilBertConfig(
    vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64, pad_token_id=0
)
# What a classifier needs besides each of these is its head, and a pooler for some.
BASES: dict[str, Callable[[], Any]] = {
    "deberta": lambda: DebertaV2Model(DebertaV2Config(**_SIZES)),
    "bert without a pooler": lambda: BertForMaskedLM(BertConfig(**_SIZES)),
    "distilbert": lambda: DistilBertForMaskedLM(_DISTILBERT),
    "distilbert with a head": lambda: DistilBertForSequenceClassification(_DISTILBERT),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**_SIZES)),
    "albert": lambda: AlbertForMaskedLM(AlbertConfig(**_SIZES, embedding_size=16)),
}
SAVED = {
    "deberta": {"pooler", "classifier"},
    "bert without a pooler": {"bert.pooler", "classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "distilbert with a head": {"pre_classifier", "classifier"},
    "roberta": {"classifier"},
    "albert": {"albert.pooler", "classifier"},
}
RECORDS = [{"text": "ab" * i, "label": "xy"[i % 2]} for i in range(1, 9)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    with torch.random.fork_rng():
        for name, make in BASES.items():
            torch.manual_seed(3)
            make().save_pretrained(root / name)
            character_tokenizer().save_pretrained(root / name)
    return {name: root / name for name in BASES}


@pytest.fixture
def recipe(bases: dict[str, Path], tmp_path: Path) -> Callable[..., Recipe]:
    train = write_lines(tmp_path / "train.jsonl", RECORDS)

    def make(base: str | Path, **sections: Any) -> Recipe:
        model = bases[base] if isinstance(base, str) else base
        training = {"max_steps": 1}
        return recipe_of(
            tmp_path, model, train, data={"task": "classification"}, training=training, **sections
        )

    return make


@pytest.mark.parametrize("name", BASES)
def test_what_a_checkpoint_lacks_is_what_loading_says_it_made_up(name: str, bases: dict[str, Path]) -> None:
    _, info = AutoModelForSequenceClassification.from_pretrained(
        bases[name], num_labels=2, output_loading_info=True
    )
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(bases[name]))
    with TensorFiles(bases[name]) as tensors:
        assert set(absent_parameters(model, tensors)) == info["missing_keys"]
    assert info["missing_keys"] or name == "distilbert with a head"


@torch.no_grad()
def _logits(model: Any, folder: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(["abab", "zz"], return_tensors="pt", padding=True)
    return model.eval()(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits


@pytest.mark.parametrize("name", ["deberta", "distilbert", "albert"])
@pytest.mark.filterwarnings("ignore")
def test_a_reloaded_classifier_does_not_depend_on_chance_and_merges(
    name: str, recipe: Callable[..., Recipe], bases: dict[str, Path], tmp_path: Path
) -> None:
    run = recipe(name)
    estimate(run, prepare_data(run.data, load_tokenizer(bases[name]), 0))
    observer = Silent()
    train_recipe(run, observer)
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        stock = AutoModelForSequenceClassification.from_pretrained(bases[name], num_labels=2)
        found.append(_logits(PeftModel.from_pretrained(stock, run.output.dir), run.output.dir))
    assert torch.equal(*found)
    merge(run.output.dir, bases[name], tmp_path / "merged", labels=["x", "y"])
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(_logits(merged, run.output.dir), found[0], atol=1e-5)
    more = SAVED[name] - {"classifier"}
    assert [x for x in observer.said if "trained whole" in x and all(y in x for y in more)]


def _with_adapter(run: Recipe, folder: Path) -> PeftModel:
    tokenizer = load_tokenizer(folder)
    base = BaseModel(run, folder).load(["x", "y"], tokenizer, None)
    return new_adapter(base, run, stored_keys(folder))


@pytest.mark.parametrize("name", BASES)
def test_new_modules_are_trained_whole_without_lora_and_the_same_for_a_seed(
    name: str, recipe: Callable[..., Recipe], bases: dict[str, Path]
) -> None:
    one, other = (_with_adapter(recipe(name), bases[name]) for _ in range(2))
    saved = set(one.peft_config["default"].modules_to_save) - {"score"}
    assert saved == SAVED[name]
    for module in saved:
        inside = [x for x, _ in one.base_model.model.get_submodule(module).named_modules()]
        assert "modules_to_save.default" in inside
        assert not [x for x in inside if "lora_A" in x]
    state = other.state_dict()
    assert all(torch.equal(x, state[key]) for key, x in one.state_dict().items())


def test_a_checkpoint_that_lacks_a_part_of_a_block_is_refused(
    recipe: Callable[..., Recipe], bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    model = BertModel(BertConfig(**_SIZES))
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.LayerNorm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    run = recipe(folder)
    with pytest.raises(CheckpointError, match=r"lacks bert\.encoder\.layer\.1\.output\.LayerNorm\.weight"):
        train_recipe(run, Silent())
    assert not (run.output.dir / "run.json").exists()


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        ({"target_modules": ["query", "kee"]}, "adapter.target_modules names 'kee'"),
        ({"target_modules": "que.y"}, "adapter.target_modules: .*whole name.*'que.y'"),
        ({"exclude_modules": ["valu"]}, "adapter.exclude_modules names 'valu'"),
        ({"modules_to_save": ["poolr"]}, "adapter.modules_to_save names 'poolr'"),
        ({"rank_pattern": {"query": 4, "qery": 2}}, "adapter.rank_pattern names 'qery'"),
        ({"alpha_pattern": {"classifier": 4}}, "adapter.alpha_pattern names 'classifier', which is no layer"),
        ({"layers_to_transform": [0, 2]}, "names block 2, and the model has 2 blocks, from 0 to 1"),
        (
            {"layers_to_transform": [1], "target_modules": r".*layer\.0.*query"},
            "no layer is in adapter.target_modules and in adapter.layers_to_transform",
        ),
    ],
)
def test_a_name_that_means_nothing_is_refused(
    adapter: dict[str, Any], match: str, recipe: Callable[..., Recipe], bases: dict[str, Path]
) -> None:
    with pytest.raises(ConfigurationError, match=match):
        _with_adapter(recipe("roberta", adapter=adapter), bases["roberta"])


def test_a_classifier_of_other_classes_is_refused_by_a_run_and_before_it(
    recipe: Callable[..., Recipe], bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(bases["distilbert with a head"], tmp_path / "five")
    DistilBertForSequenceClassification.from_pretrained(
        folder, num_labels=5, ignore_mismatched_sizes=True
    ).save_pretrained(folder)
    run = recipe(folder)
    data = prepare_data(run.data, load_tokenizer(folder), 0)
    for refused in (lambda: estimate(run, data), lambda: train_recipe(run, Silent())):
        with pytest.raises(ConfigurationError, match="a classifier of 5 classes, and the data has 2"):
            refused()


def test_what_stays_with_the_workers_is_not_trained_whole(
    recipe: Callable[..., Recipe], bases: dict[str, Path]
) -> None:
    run = recipe("roberta", adapter={"modules_to_save": ["query"]})
    with pytest.raises(ConfigurationError, match=r"weight of .*layer\.0.*query stays with the workers"):
        train_recipe(run, Silent())


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(query|output\.dense)", ["query", "output.dense"]])
def test_layers_to_transform_goes_with_every_way_to_name_layers(
    targets: Any, recipe: Callable[..., Recipe], bases: dict[str, Path]
) -> None:
    run = recipe("roberta", adapter={"layers_to_transform": [1], "target_modules": targets})
    targeted = _with_adapter(run, bases["roberta"]).base_model.targeted_module_names
    assert targeted and all(".layer.1." in x for x in targeted)
    assert any("query" in x for x in targeted)
    assert any("intermediate" in x for x in targeted) == (targets == "all-linear")


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        ({"target_modules": "(query"}, r"adapter.target_modules.*'\(query' is no regular expression"),
        ({"exclude_modules": "*"}, "adapter.exclude_modules.*no regular expression"),
        ({"rank_pattern": {"[": 3}}, "adapter.rank_pattern.*no regular expression"),
        ({"alpha_pattern": {"q": 0}}, "adapter.alpha_pattern"),
        ({"modules_to_save": [""]}, "adapter.modules_to_save.*empty"),
        ({"target_modules": [" "]}, "adapter.target_modules.*empty"),
        ({"layers_to_transform": [-1]}, "adapter.layers_to_transform"),
        ({"layers_to_transform": []}, "adapter.layers_to_transform"),
    ],
)
def test_what_no_model_could_match_is_refused_by_its_key_before_anything_is_loaded(
    adapter: dict[str, Any], match: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    write_recipe(recipe_of(tmp_path, "nowhere", tmp_path / "train.jsonl"), path)
    (key, value), *_ = adapter.items()
    with pytest.raises(ConfigurationError, match=match):
        load_recipe(path, [f"adapter.{key}={json.dumps(value)}"])


@pytest.fixture
def classifier(bases: dict[str, Path]) -> Iterator[Any]:
    """With remote layers, as a stock script loads it."""
    config = BlindConfig(masking="reference", progress=False)
    model = AutoModelForSequenceClassification.from_pretrained(
        bases["bert without a pooler"], quantization_config=config, num_labels=2
    )
    yield model
    multiplier_of(model).close()


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"target_modules": "all-linear"}, ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]),
        ({"target_modules": ["query"], "modules_to_save": ["pooler"]}, []),
        (
            {"target_modules": ["query"], "task_type": None},
            ["bert.pooler.dense.weight", "classifier.weight", "classifier.bias"],
        ),
    ],
    ids=["lora on it", "saved", "head forgotten"],
)
def test_a_stock_script_is_told_once_what_stays_random(
    lora: dict[str, Any], named: list[str], classifier: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(classifier, LoraConfig(**{"task_type": "SEQ_CLS"} | lora))
    caplog.set_level(logging.WARNING, "blindtune.client.model.guard")
    for training in (False, True, True):
        model.train(training)(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([1]))
    said = [x.getMessage() for x in caplog.records if "not in the checkpoint" in x.getMessage()]
    assert len(said) == bool(named)
    assert all(x in said[0] for x in named)


def test_errors_of_an_adapter_are_ours(recipe: Callable[..., Recipe], bases: dict[str, Path]) -> None:
    """Such as that of PEFT about a module that is no layer."""
    with pytest.raises(BlindtuneError, match="adapter: .*not supported"):
        _with_adapter(recipe("roberta", adapter={"target_modules": ["attention"]}), bases["roberta"])
