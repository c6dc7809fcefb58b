"""One run from its recipe to its adapter, in this process: what is written, and how it goes on."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file
from support.operators import RunningOperators
from support.recipes import Silent, operator_sections, recipe_of, with_tokenizer, write_lines
from transformers import TrainerCallback, TrainerControl, TrainerState

from blindtune.client.recipe import Recipe, load_recipe
from blindtune.client.runs.evaluation import tuned_model
from blindtune.client.runs.run import train_recipe
from blindtune.client.runs.stopping import StopRequest
from blindtune.client.training.figures import Figures, Prices
from blindtune.client.training.folder import RunFolder
from blindtune.client.training.trainer import RecipeTrainer
from blindtune.errors import (
    BlindtuneError,
    CheckpointError,
    ConfigurationError,
    InterruptedRunError,
    OperatorUnavailableError,
    UntrustworthyOperatorError,
)

pytestmark = pytest.mark.hf

RECORDS = [{"prompt": "ab" * i, "completion": "c" * (1 + 3 * (i % 4))} for i in range(1, 13)]
# Dropout, momentum, a schedule, accumulation and measuring: all that a resumed run could get wrong.
TRAINING = {
    "num_train_epochs": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
}
STEPS = 6


Make = Callable[..., Recipe]


def _maker(shared: Path, folder: Path) -> Make:
    """Makes recipes of six steps, with their output in ``folder/NAME/output``."""

    def make(name: str, **sections: Any) -> Recipe:
        training = {**TRAINING, **sections.pop("training", {})}
        return recipe_of(
            folder / name,
            shared / "llama",
            shared / "train.jsonl",
            data={"validation": str(shared / "validation.jsonl"), **sections.pop("data", {})},
            adapter={"lora_dropout": 0.2},
            training=training,
            **sections,
        )

    return make


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """A model with a tokenizer, and data."""
    folder = tmp_path_factory.mktemp("shared")
    with_tokenizer(checkpoints["llama"], folder)
    write_lines(folder / "train.jsonl", RECORDS)
    write_lines(folder / "validation.jsonl", RECORDS[:3])
    return folder


@pytest.fixture(scope="module")
def whole(shared: Path) -> Recipe:
    """A run that nothing happened to."""
    run = _maker(shared, shared)("whole")
    train_recipe(run, Silent())
    return run


@pytest.fixture
def recipe(shared: Path, tmp_path: Path) -> Make:
    """Makes recipes for the test's own folder."""
    return _maker(shared, tmp_path)


class Stopping(Silent):
    """Raises at the end of a step, as a worker that is gone would in the middle of the next one."""

    def __init__(self, step: int, error: BaseException) -> None:
        super().__init__()
        self.step = step
        self.error = error

    def steps(self, so_far: Callable[[], Figures]) -> TrainerCallback:
        observer = self

        class Stop(TrainerCallback):
            def on_substep_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                # The first half of a step is done: its gradients and random numbers are used up.
                if state.global_step == observer.step:
                    raise observer.error

        return Stop()


class Telling(Silent):
    """Calls something at the end of each step, with the trainer's arguments and the step."""

    def __init__(self, tell: Callable[[Any, int], None]) -> None:
        super().__init__()
        self.tell = tell

    def steps(self, so_far: Callable[[], Figures]) -> TrainerCallback:
        observer = self

        class Tell(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                observer.tell(args, state.global_step)

        return Tell()


def adapter(recipe: Recipe) -> bytes:
    return (recipe.output.dir / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("step", range(STEPS))
def test_a_run_that_fails_in_the_middle_of_a_step_ends_as_if_it_had_not(
    step: int, recipe: Make, whole: Recipe
) -> None:
    failing = recipe("failing")
    with pytest.raises(OperatorUnavailableError):
        train_recipe(failing, Stopping(step, OperatorUnavailableError("gone")))
    saved = {x.name for x in (failing.output.dir / "checkpoints").glob("checkpoint-*")}
    assert (f"checkpoint-{step}" in saved) == (step > 0), "the last whole step is kept"
    before = RunFolder(failing.output.dir).state["so_far"]["seconds"]
    summary = train_recipe(failing, Silent(), resume=True)
    assert adapter(failing) == adapter(whole)
    assert summary["steps"] == STEPS
    assert summary["seconds"]["total"] > before > 0, "what went before the first checkpoint counts"
    expected = json.loads((whole.output.dir / "summary.json").read_text())
    assert summary["after"] == expected["after"]
    assert summary["before"] == expected["before"]
    assert summary["tokens"] == expected["tokens"], "the failed half of a step is not counted twice"


def test_an_error_that_is_not_ours_leaves_the_checkpoints_as_they_were(recipe: Make, whole: Recipe) -> None:
    """Who knows what state the model is in."""
    failing = recipe("failing")
    with pytest.raises(ZeroDivisionError):
        train_recipe(failing, Stopping(3, ZeroDivisionError()))
    assert [x.name for x in (failing.output.dir / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    train_recipe(failing, Silent(), resume=True)
    assert adapter(failing) == adapter(whole)


def test_a_half_written_checkpoint_is_not_resumed_from(recipe: Make, whole: Recipe) -> None:
    failing = recipe("failing")
    with pytest.raises(ZeroDivisionError):
        train_recipe(failing, Stopping(3, ZeroDivisionError()))
    checkpoints = failing.output.dir / "checkpoints"
    unfinished = checkpoints / ".unfinished" / "checkpoint-4"
    shutil.copytree(checkpoints / "checkpoint-2", unfinished)
    (unfinished / "optimizer.pt").write_bytes(b"")
    train_recipe(failing, Silent(), resume=True)
    assert not unfinished.exists()
    assert adapter(failing) == adapter(whole)


def test_a_run_killed_before_it_wrote_down_what_it_is_can_be_started_again(
    recipe: Make,
) -> None:
    run = recipe("run")
    run.output.dir.mkdir(parents=True)
    (run.output.dir / "recipe.yaml").write_text("model: {}\n")
    (run.output.dir / ".recipe.yaml.abc").write_text("mod")
    train_recipe(run, Silent())
    assert load_recipe(run.output.dir / "recipe.yaml") == run


def test_older_checkpoints_go_when_the_new_one_is_there_and_the_best_one_stays(
    recipe: Make,
) -> None:
    run = recipe(
        "run",
        training={
            "save_steps": 1,
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "token_accuracy",
            "greater_is_better": False,
        },
    )
    train_recipe(run, Silent())
    left = {x.name for x in (run.output.dir / "checkpoints").glob("checkpoint-*")}
    best = json.loads(
        (run.output.dir / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()
    )
    assert f"checkpoint-{STEPS}" in left
    assert best["best_model_checkpoint"] == str(
        run.output.dir / "checkpoints" / f"checkpoint-{best['best_global_step']}"
    )
    assert left == {f"checkpoint-{STEPS}", f"checkpoint-{best['best_global_step']}"}
    best_adapter = Path(best["best_model_checkpoint"], "adapter_model.safetensors").read_bytes()
    assert adapter(run) == best_adapter


def test_the_output_is_a_stock_adapter_with_what_was_done_and_only_its_owner_can_look(
    recipe: Make,
) -> None:
    run = recipe("run")
    summary = train_recipe(run, Silent(), prices=Prices(per_hour=3600.0, per_gb=1.0))
    folder = run.output.dir
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "recipe.yaml"):
        assert (folder / name).is_file(), name
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["steps"] == STEPS
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert summary["cost"] == pytest.approx(summary["seconds"]["total"])
    assert folder.stat().st_mode & 0o077 == 0
    with tuned_model(folder) as tuned:
        # Scales of a new client are those of a first step.
        found = tuned.measure(run.data.validation, None)["loss"]
        assert found == pytest.approx(summary["after"]["loss"], rel=1e-4)
        assert isinstance(tuned.answer("abab", 4), str)
    with tuned_model(folder, adapter=False) as base:
        assert base.measure(run.data.validation, None)["loss"] == pytest.approx(summary["before"]["loss"])


def test_a_folder_in_use_is_left_alone(recipe: Make) -> None:
    run = recipe("run")
    run.output.dir.mkdir(parents=True)
    with FileLock(run.output.dir / ".lock"), pytest.raises(ConfigurationError, match="is in use"):
        train_recipe(run, Silent())
    assert [x.name for x in run.output.dir.iterdir()] == [".lock"]


def _refusal(run: Recipe, resume: bool) -> str:
    before = {x: x.read_bytes() for x in run.output.dir.rglob("*") if x.is_file()}
    with pytest.raises(ConfigurationError) as caught:
        train_recipe(run, Silent(), resume=resume)
    after = {x: x.read_bytes() for x in run.output.dir.rglob("*") if x.is_file()}
    assert {k: v for k, v in after.items() if k.name != ".lock"} == {
        k: v for k, v in before.items() if k.name != ".lock"
    }
    return str(caught.value)


def test_nothing_that_was_trained_is_overwritten_or_mixed_with_another_run(
    recipe: Make, shared: Path
) -> None:
    run = recipe("run")
    with pytest.raises(OperatorUnavailableError):
        train_recipe(run, Stopping(3, OperatorUnavailableError("gone")))
    assert "holds a run already" in _refusal(run, resume=False)
    changed = recipe("run", training={"learning_rate": 1e-5})
    assert "another training.learning_rate" in _refusal(changed, resume=True)
    write_lines(shared / "train.jsonl", [*RECORDS[:-1], {"prompt": "x", "completion": "y"}])
    try:
        assert "the train data is not what the run began with" in _refusal(run, resume=True)
    finally:
        write_lines(shared / "train.jsonl", RECORDS)
    train_recipe(run, Silent(), resume=True)
    kept = adapter(run)
    observer = Silent()
    train_recipe(run, observer, resume=True)
    assert any("complete already" in x for x in observer.said)
    assert adapter(run) == kept


def test_resuming_what_was_never_begun_is_refused(recipe: Make) -> None:
    assert "no run to resume" in _refusal(recipe("run"), resume=True)


def test_somebody_elses_folder_is_refused_before_any_data_is_read(recipe: Make, tmp_path: Path) -> None:
    run = recipe("run", data={"train": str(tmp_path / "no such file")})
    run.output.dir.parent.mkdir()
    run.output.dir.write_text("mine")
    assert "output is a file" in _refusal(run, resume=False)
    run.output.dir.unlink()
    assert "no run to resume" in _refusal(run, resume=True)
    assert not run.output.dir.exists()
    run.output.dir.mkdir()
    (run.output.dir / "thesis.txt").write_text("mine")
    assert "is not empty (thesis.txt)" in _refusal(run, resume=False)


def test_a_request_to_stop_ends_the_run_after_the_step_with_a_checkpoint(
    recipe: Make,
    whole: Recipe,
) -> None:
    class Signalling(Silent):
        def steps(self, so_far: Callable[[], Figures]) -> TrainerCallback:
            class Signal(TrainerCallback):
                def on_substep_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                    if state.global_step == 2:
                        os.kill(os.getpid(), signal.SIGTERM)

            return Signal()

    run = recipe("run")
    with pytest.raises(InterruptedRunError, match="stopped after step 3 of 6"):
        train_recipe(run, Signalling())
    assert (run.output.dir / "checkpoints" / "checkpoint-3").is_dir(), "which no save_steps asks for"
    train_recipe(run, Silent(), resume=True)
    assert adapter(run) == adapter(whole)


def test_an_operator_that_leaves_in_the_middle_costs_nothing_that_was_trained(
    recipe: Make, whole: Recipe, operators: RunningOperators
) -> None:
    """Through real workers, whose answers are those of the reference bit for bit."""
    masking = {"mode": "shares", "retry_seconds": 1.0}
    run = recipe("run", masking=masking, operators=operator_sections(operators, "llama"))
    for worker in operators[0].workers:
        worker.lie("llama", "unavailable", at=60, times=10_000)
    with pytest.raises(OperatorUnavailableError, match="resume"):
        train_recipe(run, Silent())
    for worker in operators[0].workers:
        worker.lie("llama", None)
    summary = train_recipe(run, Silent(), resume=True)
    assert adapter(run) == adapter(whole)
    assert summary["verified_responses"] > 0
    assert summary["bytes_up"] > 0


def test_an_operator_that_is_gone_at_the_start_leaves_nothing_in_the_way(
    recipe: Make, operators: RunningOperators
) -> None:
    sections = operator_sections(operators, "llama")
    gone = [sections[0], {**sections[1], "workers": ["127.0.0.2:1"]}]
    masking = {"mode": "shares", "retry_seconds": 0.5}
    with pytest.raises(OperatorUnavailableError):
        train_recipe(recipe("run", masking=masking, operators=gone), Silent())
    train_recipe(recipe("run", masking=masking, operators=sections, training={"max_steps": 1}), Silent())


def test_an_unfinished_run_cannot_be_measured(recipe: Make) -> None:
    run = recipe("run")
    with pytest.raises(BlindtuneError):
        train_recipe(run, Stopping(3, OperatorUnavailableError("gone")))
    with pytest.raises(ConfigurationError, match="not finished: go on with"), tuned_model(run.output.dir):
        pass


def test_an_example_longer_than_the_model_takes_is_refused_before_anything_is_written(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    train = write_lines(tmp_path / "train.jsonl", [{"text": "ab " * 40, "label": x} for x in "xyz"])
    run = recipe_of(
        tmp_path, with_tokenizer(checkpoints["bert"], tmp_path), train, data={"task": "classification"}
    )
    with pytest.raises(ConfigurationError, match="the model takes 64: set data.max_length to 64"):
        train_recipe(run, Silent())
    assert not (run.output.dir / "run.json").exists()


def test_measuring_leaves_no_example_out_when_training_leaves_out_the_last_ones(recipe: Make) -> None:
    run = recipe("run", training={"dataloader_drop_last": True, "per_device_eval_batch_size": 2})
    run = run.model_copy(update={"training": run.training.model_copy(update={"max_steps": 1})})
    whole = recipe("other", training={"per_device_eval_batch_size": 2, "max_steps": 1})
    assert train_recipe(run, Silent())["before"] == train_recipe(whole, Silent())["before"]


def test_a_run_killed_after_its_last_step_takes_no_step_more(recipe: Make) -> None:
    """In the middle of an epoch, where the data would go on."""

    class Ending(Silent):
        def measured(self, when: str, figures: dict[str, float]) -> None:
            if when == "after":
                raise ZeroDivisionError

    train_recipe(recipe("whole", training={"max_steps": 4}), Silent())
    run = recipe("run", training={"max_steps": 4})
    with pytest.raises(ZeroDivisionError):
        train_recipe(run, Ending())
    assert train_recipe(run, Silent(), resume=True)["steps"] == 4
    assert adapter(run) == adapter(recipe("whole", training={"max_steps": 4}))


def test_a_damaged_checkpoint_gives_one_clear_error(recipe: Make) -> None:
    run = recipe("run")
    with pytest.raises(OperatorUnavailableError):
        train_recipe(run, Stopping(3, OperatorUnavailableError("gone")))
    for name in ("optimizer.pt", "adapter_model.safetensors", "figures.json"):
        path = run.output.dir / "checkpoints" / "checkpoint-3" / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match="is damaged"):
            train_recipe(run, Silent(), resume=True)
        path.write_bytes(content)
    train_recipe(run, Silent(), resume=True)


def test_an_operator_that_lied_and_has_no_replica_costs_nothing_that_was_trained(recipe: Make) -> None:
    run = recipe("run")
    with pytest.raises(UntrustworthyOperatorError):
        train_recipe(run, Stopping(3, UntrustworthyOperatorError("lied")))
    assert (run.output.dir / "checkpoints" / "checkpoint-3").is_dir()


def _other_weights(model: Path) -> None:
    """Changes a frozen layer."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] = -tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture
def own_model(shared: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Makes recipes on a copy of the model that a test may change."""
    shutil.copytree(shared / "llama", tmp_path / "model")

    def make(revision: str | None = None) -> Recipe:
        training = {"max_steps": 4, "gradient_accumulation_steps": 2}
        run = recipe_of(tmp_path, tmp_path / "model", shared / "train.jsonl", training=training)
        return run.model_copy(update={"model": run.model.model_copy(update={"revision": revision})})

    return make


def _interrupted(run: Recipe) -> Path:
    with pytest.raises(OperatorUnavailableError):
        train_recipe(run, Stopping(2, OperatorUnavailableError("gone")))
    return run.output.dir / "run.json"


def test_a_model_that_changed_under_the_same_name_is_not_gone_on_with(
    own_model: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = own_model()
    begun = json.loads(_interrupted(run).read_text())["model_fingerprint"]
    shutil.copytree(tmp_path / "model", tmp_path / "kept")
    _other_weights(tmp_path / "model")
    said = _refusal(run, resume=True)
    assert f"began with a base model of fingerprint {begun[:16]}, and {tmp_path / 'model'} now has " in said
    assert "restore it" in said
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(tmp_path / "kept", tmp_path / "model")
    train_recipe(run, Silent(), resume=True)


def test_a_run_that_does_not_say_its_model_goes_on_with_a_warning_and_says_it_then(
    own_model: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = own_model()
    state = _interrupted(run)
    content = json.loads(state.read_text())
    begun = content.pop("model_fingerprint")
    state.write_text(json.dumps(content))
    assert "another model.revision" in _refusal(own_model("other"), resume=True)
    observer = Silent()
    with pytest.raises(OperatorUnavailableError):
        train_recipe(run, _with(observer, Stopping(3, OperatorUnavailableError("gone"))), resume=True)
    assert [x for x in observer.said if "does not say which base model" in x]
    assert json.loads(state.read_text())["model_fingerprint"] == begun
    _other_weights(tmp_path / "model")
    assert "began with a base model" in _refusal(run, resume=True)


def _with(observer: Silent, stopping: Stopping) -> Stopping:
    stopping.said = observer.said
    return stopping


def test_a_branch_that_moved_can_be_pinned_to_the_commit_that_it_was(
    own_model: Callable[..., Recipe],
) -> None:
    _interrupted(own_model())
    assert train_recipe(own_model("0123abc"), Silent(), resume=True)["steps"] == 4


def test_a_name_on_the_hub_is_resolved_once(
    own_model: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch that moves in between would give the tokenizer of one commit and the weights of another."""
    run = own_model()
    asked: list[str] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append(name)
        return run.model.name

    monkeypatch.setattr("blindtune.checkpoint.files.snapshot_download", snapshot)
    named = run.model_copy(update={"model": run.model.model_copy(update={"name": "someone/model"})})
    train_recipe(named, Silent())
    assert asked == ["someone/model"]


def test_a_request_from_python_stops_as_a_signal_does_and_is_no_first_signal(
    recipe: Make, whole: Recipe
) -> None:
    run, stop = recipe("run"), StopRequest()

    def tell(args: Any, step: int) -> None:
        if step == 2:
            stop.wanted = True
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRunError, match="stopped after step"):
        train_recipe(run, Telling(tell), stop=stop)
    train_recipe(run, Silent(), resume=True)
    assert adapter(run) == adapter(whole)


@pytest.mark.parametrize(
    ("epoch", "step", "stops_at"),
    [(0.5, 3, "step"), (1.0, 3, "epoch"), (None, 3, "epoch"), (2.0, 6, None), (1.5, 6, None)],
)
def test_a_stop_comes_after_what_belongs_to_the_end_of_an_epoch_and_not_after_the_last_step(
    epoch: float | None, step: int, stops_at: str | None
) -> None:
    """The checkpoint holds what was measured there, which a run that goes on from it does not measure."""
    stop, control = StopRequest(), TrainerControl()
    state, seen = TrainerState(epoch=epoch, global_step=step, max_steps=6), []
    stop.wanted = True
    for moment, tell in (("step", stop.on_step_end), ("epoch", stop.on_epoch_end)):
        tell(None, state, control)  # type: ignore[arg-type]
        seen += [moment] * (control.should_training_stop and control.should_save)
    assert (seen or [None])[0] == stops_at


def test_no_checkpoint_lacks_a_measurement_that_decides(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe("run", training={"max_steps": 2, "save_steps": 1, "load_best_model_at_end": True})
    measure, measured = RecipeTrainer.evaluation_loop, []

    def failing(self: RecipeTrainer, *arguments: Any, **options: Any) -> Any:
        measured.append(self.state.global_step)
        if self.state.global_step == 2 and measured.count(2) == 1:
            raise OperatorUnavailableError("gone")
        return measure(self, *arguments, **options)

    monkeypatch.setattr(RecipeTrainer, "evaluation_loop", failing)
    with pytest.raises(OperatorUnavailableError):
        train_recipe(run, Silent())
    assert [x.name for x in (run.output.dir / "checkpoints").iterdir()] == ["checkpoint-1"]
    train_recipe(run, Silent(), resume=True)
    assert measured.count(2) > 1


def test_a_second_signal_interrupts_at_once(recipe: Make) -> None:
    run = recipe("run")

    class Twice(Silent):
        def steps(self, so_far: Callable[[], Figures]) -> TrainerCallback:
            class Signal(TrainerCallback):
                def on_substep_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                    if state.global_step == 3:
                        os.kill(os.getpid(), signal.SIGTERM)
                        os.kill(os.getpid(), signal.SIGINT)

            return Signal()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train_recipe(run, Twice())
    assert [x.name for x in (run.output.dir / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_nobody_else_can_read_what_a_run_writes_into_a_folder_that_was_there(recipe: Make) -> None:
    run = recipe("run")
    folder = run.output.dir
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    seen: set[str] = set()

    def look(args: Any, step: int) -> None:
        seen.update(_open_to_others(folder))

    mask = os.umask(0o022)
    try:
        train_recipe(run, Telling(look))
    finally:
        os.umask(mask)
    seen.update(_open_to_others(folder))
    assert not seen
    assert (folder / "checkpoints" / f"checkpoint-{STEPS}" / "optimizer.pt").is_file()
    assert (folder / "tokenizer.json").is_file()
    assert folder.stat().st_mode & 0o777 == 0o755, "that one is its owner's affair"


def _open_to_others(folder: Path) -> set[str]:
    """What in a folder others may read, inside folders that they may enter."""
    found = set()
    for path in folder.iterdir():
        if path.stat().st_mode & 0o077:
            found.add(path.name)
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        found |= {str(x) for x in [checkpoint, *checkpoint.iterdir()] if x.stat().st_mode & 0o077}
    return found


def test_folders_that_a_run_makes_on_the_way_are_its_owners(recipe: Make, tmp_path: Path) -> None:
    run = recipe("deep/er", training={"max_steps": 1})
    train_recipe(run, Silent())
    for folder in (tmp_path / "deep", tmp_path / "deep" / "er", run.output.dir):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_accelerates_variables_change_nothing_and_are_there_again_afterwards(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    seen: list[Any] = []
    run = recipe("run", training={"max_steps": 1})
    train_recipe(run, Telling(lambda args, step: seen.append(args.mixed_precision)))
    assert seen == ["no"]
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    with tuned_model(run.output.dir):
        assert "ACCELERATE_MIXED_PRECISION" not in os.environ
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    with pytest.raises(ConfigurationError):
        train_recipe(run, Silent())
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_new_prices_change_the_cost_of_a_run_that_is_complete(recipe: Make) -> None:
    run = recipe("run", training={"max_steps": 1})
    assert "cost" not in train_recipe(run, Silent())
    priced = train_recipe(run, Silent(), resume=True, prices=Prices(per_hour=7200.0, per_gb=1.0))
    assert priced["cost"] == pytest.approx(2 * priced["seconds"]["total"])
    assert json.loads((run.output.dir / "summary.json").read_text()) == priced
    assert train_recipe(run, Silent(), resume=True) == priced, "without prices it stays as it was"


def test_a_run_that_diverges_says_so_once_and_writes_json_that_everyone_can_read(recipe: Make) -> None:
    run = recipe("run", training={"learning_rate": 1e38, "lr_scheduler_type": "constant"})
    observer = Silent()
    summary = train_recipe(run, observer, private=False)
    assert not math.isfinite(observer.figures["after"]["loss"]), "the test's own run diverges"
    assert len([x for x in observer.said if "the training diverges" in x]) == 1
    assert summary["after"]["loss"] is None
    written = (run.output.dir / "summary.json").read_text()
    assert json.loads(written, parse_constant=pytest.fail) == summary
