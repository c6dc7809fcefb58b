"""What would stop a run is found before a weight is loaded and anyone is connected to, by one list."""

from pathlib import Path
from typing import Any

import pytest
from support.broken import (
    LABELLED,
    configured,
    found_by_check,
    found_by_dry_run,
    found_by_run,
    only_named,
    recipe_for,
    tensors_changed,
    token_added,
)
from support.recipes import Silent, recipe_of, with_tokenizer, write_lines

from blindtune.client.preflight.offline import Known, offline_steps
from blindtune.client.process.exit_codes import ExitCode, exit_code
from blindtune.client.runs.evaluation import tuned_model
from blindtune.client.runs.run import train_recipe
from blindtune.errors import ConfigurationError

pytestmark = pytest.mark.hf

CONFIGURATION, MODEL = ExitCode.CONFIGURATION, ExitCode.MODEL
LONG = {"prompt": "a" * 60, "completion": "b" * 20}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def training(**arguments: Any) -> dict[str, Any]:
    return {"training": arguments}


def damage(change: Any) -> dict[str, Any]:
    return {"damage": change}


def _nan(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"][3] = float("nan")


def _infinite_bias(tensors: dict[str, Any]) -> None:
    tensors["bert.encoder.layer.1.output.dense.bias"][0] = float("inf")


def _short(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


# Family, what is broken, the step that finds it, the exit code, and words of the message.
CASES: dict[str, tuple[str, dict[str, Any], str, ExitCode, str]] = {
    # Schedules
    "cosine_with_min_lr": (
        "llama",
        training(lr_scheduler_type="cosine_with_min_lr"),
        "rehearsal",
        CONFIGURATION,
        "One of min_lr or min_lr_rate should be set",
    ),
    "cosine_warmup_with_min_lr": (
        "llama",
        training(lr_scheduler_type="cosine_warmup_with_min_lr"),
        "rehearsal",
        CONFIGURATION,
        "One of min_lr or min_lr_rate should be set",
    ),
    "warmup_stable_decay": (
        "llama",
        training(lr_scheduler_type="warmup_stable_decay"),
        "rehearsal",
        CONFIGURATION,
        "num_decay_steps",
    ),
    "unknown_argument_of_a_schedule": (
        "llama",
        training(lr_scheduler_kwargs={"num_cycles": 1}),
        "rehearsal",
        CONFIGURATION,
        "num_cycles",
    ),
    "argument_of_a_schedule_of_another_type": (
        "llama",
        training(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": "low"}),
        "rehearsal",
        CONFIGURATION,
        "unsupported operand",
    ),
    "polynomial_that_ends_above_its_start": (
        "llama",
        training(lr_scheduler_type="polynomial", learning_rate=1e-8),
        "rehearsal",
        CONFIGURATION,
        "must be smaller than initial lr",
    ),
    "schedule_that_divides_by_zero_at_the_end": (
        "llama",
        training(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": -1}),
        "rehearsal",
        CONFIGURATION,
        "fails at step 2 of 2",
    ),
    "plateau_without_measuring": (
        "llama",
        training(lr_scheduler_type="reduce_lr_on_plateau"),
        "training",
        CONFIGURATION,
        "requires an eval strategy",
    ),
    "constant_drops_its_arguments": (
        "llama",
        training(lr_scheduler_type="constant", lr_scheduler_kwargs={"last_epoch": 3}),
        "rehearsal",
        CONFIGURATION,
        "training.lr_scheduler_kwargs would change nothing, with training.lr_scheduler_type constant",
    ),
    "constant_drops_the_warm_up": (
        "llama",
        training(lr_scheduler_type="constant", warmup_steps=1),
        "rehearsal",
        CONFIGURATION,
        "training.warmup_steps would change nothing",
    ),
    # Optimizers
    "optimizer_whose_package_is_missing": (
        "llama",
        training(optim="grokadamw"),
        "training",
        CONFIGURATION,
        "training.optim grokadamw: Please install grokadamw",
    ),
    "option_that_the_optimizer_does_not_know": (
        "llama",
        training(optim="sgd", optim_args="momentun=0.9, nesterov=false"),
        "training",
        CONFIGURATION,
        "training.optim_args: optimizer sgd reads no momentun from there",
    ),
    "option_of_the_wrong_type": (
        "llama",
        training(optim="sgd", optim_args="momentum=much"),
        "training",
        CONFIGURATION,
        "training.optim sgd: could not convert string to float: 'much'",
    ),
    "argument_of_another_optimizer": (
        "llama",
        training(optim="adafactor", adam_beta2=0.95),
        "rehearsal",
        CONFIGURATION,
        "training.adam_beta2 would change nothing, with training.optim adafactor",
    ),
    "layers_of_another_optimizer": (
        "llama",
        training(optim_target_modules=["q_proj"]),
        "training",
        CONFIGURATION,
        "training.optim_target_modules: optimizer adamw_torch_fused does not read it",
    ),
    "noise_below_zero": (
        "llama",
        training(neftune_noise_alpha=-1.0),
        "rehearsal",
        CONFIGURATION,
        "RuntimeError",
    ),
    # Measuring and saving
    "metric_of_another_task": (
        "llama",
        training(**EVALUATED, load_best_model_at_end=True, metric_for_best_model="accuracy"),
        "rehearsal",
        CONFIGURATION,
        "data.task: instructions has no 'accuracy': one of loss, nll, perplexity, token_accuracy",
    ),
    "metric_of_the_machine": (
        "bert",
        training(**EVALUATED, metric_for_best_model="eval_runtime"),
        "rehearsal",
        CONFIGURATION,
        "data.task: classification has no 'runtime': one of loss, nll, accuracy, macro_f1",
    ),
    "saves_by_a_metric_that_is_none": (
        "bert",
        training(eval_strategy="epoch", save_strategy="best", metric_for_best_model="f1"),
        "rehearsal",
        CONFIGURATION,
        "has no 'f1'",
    ),
    "best_of_nothing": (
        "llama",
        training(load_best_model_at_end=True),
        "rehearsal",
        CONFIGURATION,
        "training.load_best_model_at_end would change nothing",
    ),
    "saves_other_steps_than_it_measures": (
        "llama",
        training(**EVALUATED | {"save_steps": 2}, load_best_model_at_end=True),
        "training",
        CONFIGURATION,
        "write the same for save_steps and eval_steps",
    ),
    "saves_no_multiple_of_what_it_measures": (
        "llama",
        training(**EVALUATED | {"eval_steps": 2, "save_steps": 3}, load_best_model_at_end=True),
        "training",
        CONFIGURATION,
        "change one of these arguments",
    ),
    # Batches
    "fewer_rows_than_a_batch": (
        "llama",
        training(dataloader_drop_last=True, per_device_train_batch_size=16),
        "rehearsal",
        CONFIGURATION,
        "7 examples make no whole batch of 16",
    ),
    "persistent_workers_of_none": (
        "llama",
        training(dataloader_persistent_workers=True),
        "rehearsal",
        CONFIGURATION,
        "persistent_workers",
    ),
    # Tokens
    "padding_outside_of_the_embedding": (
        "llama",
        damage(token_added(pads=True)),
        "fit",
        MODEL,
        "pads with token 122, and the model's embedding has 99 rows",
    ),
    "padding_of_a_classifier_outside_of_the_embedding": (
        "bert",
        damage(token_added(pads=True)),
        "fit",
        MODEL,
        "pads with token 122",
    ),
    "token_outside_of_the_embedding": (
        "llama",
        {"damage": token_added(pads=False), "rows": [{"prompt": "a", "completion": "<x39>"}]},
        "fit",
        MODEL,
        "makes token 121, and the model's embedding has 99 rows",
    ),
    "longer_than_the_model": (
        "gpt2",
        {"rows": [LONG]},
        "fit",
        CONFIGURATION,
        "81 tokens, and the model takes 64: set data.max_length to 64",
    ),
    "text_longer_than_the_model": (
        "bert",
        {"rows": [*LABELLED, {"text": "a" * 70, "label": "x"}]},
        "fit",
        CONFIGURATION,
        "70 tokens, and the model takes 64",
    ),
    # Checkpoints
    "weights_that_git_did_not_fetch": (
        "llama",
        damage(only_named("model.safetensors")),
        "fit",
        MODEL,
        "fetch it with git lfs pull",
    ),
    "tokenizer_that_git_did_not_fetch": (
        "bert",
        damage(only_named("tokenizer.json")),
        "model",
        MODEL,
        "tokenizer.json is a git-lfs pointer",
    ),
    "norm_that_is_no_number": ("llama", damage(tensors_changed(_nan)), "fit", MODEL, "model.norm.weight"),
    "bias_without_end": ("bert", damage(tensors_changed(_infinite_bias)), "fit", MODEL, "infinite"),
    "tensor_of_another_shape": (
        "llama",
        damage(tensors_changed(_short)),
        "fit",
        MODEL,
        "has shape (31,), and the model needs (32,): config.json is of another checkpoint",
    ),
    "smaller_vocabulary": (
        "llama",
        damage(configured(vocab_size=98)),
        "fit",
        MODEL,
        "has shape (99, 32), and the model needs (98, 32), and 1 more do not fit",
    ),
    "head_of_other_classes": (
        "bert",
        {"rows": LABELLED[:2]},
        "fit",
        CONFIGURATION,
        "model.name is a classifier of 3 classes, and the data has 2",
    ),
    "model_of_another_task": (
        "llama",
        damage(configured(model_type="t5", architectures=["T5ForConditionalGeneration"])),
        "fit",
        MODEL,
        "(t5) has no model for data.task: instructions",
    ),
    # Adapters
    "layers_that_are_not_there": (
        "llama",
        {"adapter": {"target_modules": ["no_such_layer"]}},
        "traffic",
        CONFIGURATION,
        "no_such_layer",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_check_and_the_dry_run_find(case: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    family, broken, step, code, words = CASES[case]
    recipe = recipe_for(tmp_path, checkpoints[family], **broken)
    error = found_by_dry_run(recipe)
    assert error is not None
    assert words in str(error)
    assert exit_code(error) == code
    assert str(error).rpartition(": ")[2], "what to do"
    (problem,) = found_by_check(recipe)
    assert problem.check == step
    assert words in f"{problem.detail}: {problem.fix}"
    assert not recipe.output.dir.exists()


@pytest.mark.parametrize("case", ["metric_of_the_machine", "smaller_vocabulary", "layers_that_are_not_there"])
def test_the_run_itself_ends_with_the_same_word(
    case: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    family, broken, *_ = CASES[case]
    recipe = recipe_for(tmp_path, checkpoints[family], **broken)
    assert str(found_by_run(recipe)) == str(found_by_dry_run(recipe))
    assert not recipe.output.dir.exists()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_nothing_is_loaded_by_the_dry_run_and_the_check_goes_on_when_all_else_is_well(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path, checkpoints[family])
    assert found_by_dry_run(recipe) is None
    (problem,) = found_by_check(recipe)
    assert problem.check == "model", "the matrices are no numbers"


def test_what_is_broken_twice_is_found_twice_and_always_in_the_same_order(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_for(
        tmp_path,
        checkpoints["llama"],
        damage=tensors_changed(_nan),
        training={"optim": "grokadamw", "load_best_model_at_end": True},
        adapter={"target_modules": ["no_such_layer"]},
        operators=[{"name": "a", "workers": ["127.0.0.2:1"]}],
    )
    found = [x.check for x in found_by_check(recipe)]
    assert found == ["configuration", "training", "fit"]
    assert [x.check for x in found_by_check(recipe)] == found
    assert "two or more operators" in str(found_by_dry_run(recipe)), "the first of them"


def test_a_used_output_folder_is_found_unless_a_run_goes_on_in_it(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path, checkpoints["llama"])
    assert "holds no run to resume" in str(found_by_dry_run(recipe, resume=True))
    recipe.output.dir.mkdir()
    (recipe.output.dir / "notes.txt").write_text("mine")
    assert "is not empty (notes.txt)" in str(found_by_dry_run(recipe))
    assert found_by_check(recipe)[0].check == "output"
    (recipe.output.dir / "run.json").write_text("{}")
    assert "holds a run already: go on with it with --resume" in str(found_by_dry_run(recipe))
    assert found_by_dry_run(recipe, resume=True) is None
    assert [x.check for x in found_by_check(recipe)] == ["model"], "it may be meant"


def test_what_is_measured_afterwards_has_to_fit_as_well(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    later = write_lines(tmp_path / "later.jsonl", [LONG])
    recipe = recipe_of(
        tmp_path, with_tokenizer(checkpoints["gpt2"], tmp_path), train, training={"max_steps": 1}
    )
    train_recipe(recipe, Silent())
    with tuned_model(recipe.output.dir) as tuned:
        with pytest.raises(ConfigurationError, match="81 tokens, and the model takes 64"):
            tuned.measure(later, None)


def test_what_never_happens_is_a_warning_that_says_why(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_for(
        tmp_path, checkpoints["llama"], training={"eval_steps": 5, "save_strategy": "epoch", "save_steps": 7}
    )
    known = Known()
    found = [x for step in offline_steps() for x in step.find(recipe, known)]
    assert [x.line for x in found if (x.check, x.status) == ("training", "warning")] == [
        "warning: training: training.eval_steps does nothing, with eval_strategy no: leave it out",
        "warning: training: training.save_steps does nothing, with save_strategy epoch: leave it out",
    ]
