"""What a text is taken for does not depend on the texts that share its batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.recipes import Silent, character_tokenizer, recipe_of, with_tokenizer, write_lines
from transformers import AutoModelForSequenceClassification, AutoTokenizer, XLNetConfig, XLNetModel

from blindtune.client.data.prepared import read_split
from blindtune.client.merge.checkpoint import merge
from blindtune.client.runs.run import train_recipe
from blindtune.client.training.models import BaseModel, load_tokenizer
from blindtune.client.training.trainer import RecipeTrainer

pytestmark = pytest.mark.hf

RECORDS = [{"text": "ab" * i + "zq"[i % 2] * 3, "label": "xy"[i % 2]} for i in range(1, 9)]


def _changed(folder: Path, name: str, **settings: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture
def model(request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A model by its family, with other settings of padding."""
    family, config, tokenizer = request.param
    if family == "xlnet":
        folder = tmp_path / family
        torch.manual_seed(2)
        sizes = {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
        XLNetModel(XLNetConfig(**sizes, pad_token_id=0)).save_pretrained(folder)
        character_tokenizer().save_pretrained(folder)
    else:
        folder = with_tokenizer(checkpoints[family], tmp_path)
    _changed(folder, "config.json", **config)
    _changed(folder, "tokenizer_config.json", **tokenizer)
    return folder


@pytest.mark.parametrize(
    "model",
    [
        ("llama", {"pad_token_id": 40}, {}),
        ("gpt2", {}, {"pad_token": "</s>"}),
        ("gpt2", {}, {"padding_side": "left"}),
        ("xlnet", {"pad_token_id": 40}, {}),
    ],
    indirect=True,
    ids=["another token", "the end of a text", "left of absolute positions", "right of the last place"],
)
def test_figures_do_not_depend_on_the_size_of_a_batch(model: Path, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", RECORDS)
    found = []
    for size in (1, 3, 8):
        training = {"per_device_eval_batch_size": size}
        recipe = recipe_of(tmp_path, model, train, data={"task": "classification"}, training=training)
        tokenizer = load_tokenizer(model)
        split = read_split(recipe.data, train, tokenizer, None, None, 0)
        base = BaseModel(recipe, model).load(split.labels, tokenizer, None)
        found.append(RecipeTrainer(recipe, tmp_path, base, tokenizer, None).measure(split))
        assert tokenizer.padding_side == load_tokenizer(model).padding_side, "it is saved as it was"
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("model", [("llama", {}, {})], indirect=True)
def test_the_loss_that_decides_on_the_best_checkpoint_counts_tokens_and_not_batches(
    model: Path, tmp_path: Path
) -> None:
    records = [{"prompt": "ab", "completion": "c" * (1 + 6 * i)} for i in range(8)]
    train = write_lines(tmp_path / "train.jsonl", records)
    for size in (1, 3, 8):
        recipe = recipe_of(tmp_path, model, train, training={"per_device_eval_batch_size": size})
        tokenizer = load_tokenizer(model)
        split = read_split(recipe.data, train, tokenizer, None, None, 0)
        trainer = RecipeTrainer(
            recipe, tmp_path, BaseModel(recipe, model).load([], tokenizer, None), tokenizer, None
        )
        figures = trainer.evaluate(split)
        assert figures["eval_loss"] == trainer.state.log_history[-1]["eval_loss"] == figures["eval_nll"]


@pytest.mark.parametrize("model", [("llama", {"pad_token_id": 40}, {})], indirect=True)
@pytest.mark.filterwarnings("ignore")
def test_a_merged_classifier_pads_as_it_was_trained(model: Path, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", RECORDS)
    task, training = {"task": "classification"}, {"max_steps": 1}
    recipe = recipe_of(tmp_path / "run", model, train, data=task, training=training)
    observer = Silent()
    train_recipe(recipe, observer)
    assert [x for x in observer.said if "pads with token 40 and its tokenizer with 0" in x]
    merge(recipe.output.dir, model, tmp_path / "merged", labels=["x", "y"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    stock = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    private = PeftModel.from_pretrained(stock, recipe.output.dir).eval()
    assert merged.config.pad_token_id == 0
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["pad_token_id"] == 0
    texts = [x["text"] for x in RECORDS]
    with torch.no_grad():
        together = merged(**_inputs(tokenizer, texts)).logits
        for text, logits in zip(texts, together, strict=True):
            assert torch.allclose(private(**_inputs(tokenizer, [text])).logits[0], logits, atol=1e-5)


def _inputs(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
