"""Recipes of tiny runs: a tokenizer of single characters, data files, and an observer that shows nothing."""

import json
import shutil
import string
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, TrainerCallback

from blindtune.client.data.prepared import PreparedData, prepare_data
from blindtune.client.process.disk import make_folder
from blindtune.client.recipe import Recipe
from blindtune.client.training.adapter import new_adapter
from blindtune.client.training.figures import Figures
from blindtune.client.training.models import BaseModel
from blindtune.client.training.trainer import RecipeTrainer
from support.operators import RunningOperators

__all__ = [
    "CHAT",
    "GENERATION",
    "Silent",
    "character_tokenizer",
    "operator_sections",
    "recipe_of",
    "trained_one_step",
    "with_tokenizer",
    "write_lines",
]

# The numbers of the special tokens are those of `support.checkpoints`, and all fit its vocabulary.
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_CHARACTERS = string.ascii_letters + string.digits + " \n.,:;?!#'-/_()|"

GENERATION = (
    "{{ bos_token }}{% for m in messages %}|{{ m['role'] }}:"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}|assistant:{% endif %}"
)
"""A chat template that marks what the assistant says."""

CHAT = GENERATION.replace("{% generation %}", "").replace("{% endgeneration %}", "")
"""The same without the marks."""


def character_tokenizer(
    template: str | None = GENERATION, *, begins: bool = False, ends: bool = False, split: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each character.

    Args:
        template: for chats.
        begins, ends: whether every text gets a token at its begin or end.
        split: whether text is split at spaces first, as most tokenizers do.
    """
    words = {token: number for number, token in enumerate([*_SPECIAL, *_CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in _SPECIAL])
    tokenizer.decoder = decoders.Fuse()
    if split:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    if begins or ends:
        pattern = f"{'<s> ' if begins else ''}$A{' </s>' if ends else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=pattern, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )


def with_tokenizer(checkpoint: Path, folder: Path, tokenizer: Any = None) -> Path:
    """A copy of a checkpoint that has a tokenizer."""
    copy = folder / checkpoint.name
    shutil.copytree(checkpoint, copy)
    (tokenizer or character_tokenizer()).save_pretrained(copy)
    return copy


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """Writes a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(x) + "\n" for x in records), encoding="utf-8")
    return path


def recipe_of(folder: Path, model: str | Path, train: Path, **sections: Any) -> Recipe:
    """A recipe that trains for instructions in this process, but for what its sections say otherwise.

    Args:
        folder: its output goes to ``output`` in there.
    """
    base: dict[str, Any] = {
        "model": {"name": str(model)},
        "masking": {"mode": "reference", "allow_one_machine": True},
        "data": {"task": "instructions", "train": str(train)},
        "training": {"use_cpu": True, "save_strategy": "no", "per_device_train_batch_size": 2},
        "output": {"dir": str(folder / "output")},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
    return Recipe.model_validate(base)


def operator_sections(operators: RunningOperators, model: str) -> list[dict[str, Any]]:
    """Running operators as a recipe names them."""
    return [
        {"name": x.name, "workers": list(x.workers), "ca": str(x.ca), "cert": str(x.cert), "key": str(x.key)}
        for x in operators.operators(model)
    ]


def trained_one_step(recipe: Recipe) -> RecipeTrainer:
    """A trainer without workers that did the first step of a recipe, and saved nothing."""
    base = BaseModel.found(recipe)
    tokenizer = base.tokenizer()
    data = prepare_data(recipe.data, tokenizer, recipe.training.seed)
    model = new_adapter(base.load(data.labels, tokenizer, None), recipe, base.keys())
    only_one = recipe.training.model_copy(update={"max_steps": 1, "save_strategy": "no"})
    recipe = recipe.model_copy(update={"training": only_one})
    trainer = RecipeTrainer(recipe, recipe.output.dir, model, tokenizer, data.train)
    trainer.train_from(None)
    make_folder(Path(trainer.args.output_dir))
    return trainer


class Silent:
    """Shows nothing of a run, and keeps what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.figures: dict[str, dict[str, float]] = {}

    def say(self, message: str) -> None:
        self.said.append(message)

    def data(self, data: PreparedData) -> None: ...

    def measured(self, when: str, figures: dict[str, float]) -> None:
        self.figures[when] = figures

    def steps(self, so_far: Callable[[], Figures]) -> TrainerCallback:
        return TrainerCallback()
