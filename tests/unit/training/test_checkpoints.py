"""What a run leaves behind when it is killed, the power goes, the disk is full, or a file is damaged."""

import contextlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support.crashes import Crash, CrashRecorder
from support.recipes import Silent, recipe_of, trained_one_step, with_tokenizer, write_lines
from transformers import TrainerCallback

from blindtune.client.recipe import Recipe
from blindtune.client.record.chain import parse_chain
from blindtune.client.record.commitment import Salt
from blindtune.client.record.digests import require_whole
from blindtune.client.record.keys import RecordKey, VerificationKey
from blindtune.client.record.verify import check_output
from blindtune.client.runs.run import train_recipe
from blindtune.client.training.figures import Figures
from blindtune.client.training.folder import RunFolder
from blindtune.errors import CheckpointError, ResourceError

pytestmark = pytest.mark.hf

RECORDS = [{"prompt": "ab" * i, "completion": "c" * (1 + 3 * (i % 4))} for i in range(1, 9)]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXCLUDED = ["norm", "act_fn", "lm_head", "rotary_emb", "embed_tokens"]
TRAINING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """A model with a tokenizer, and data."""
    folder = tmp_path_factory.mktemp("shared")
    with_tokenizer(checkpoints["llama"], folder)
    write_lines(folder / "train.jsonl", RECORDS)
    return folder


def recipe_in(folder: Path, shared: Path, **training: Any) -> Recipe:
    return recipe_of(
        folder,
        shared / "llama",
        shared / "train.jsonl",
        adapter={"target_modules": MODULES, "exclude_modules": EXCLUDED, "lora_dropout": 0.2},
        training={**TRAINING, **training},
        record={"key": str(folder / "keys" / "record.key")},
    )


class Promising(Silent):
    """Takes the run at its word: what it tells of is on the disk."""

    def __init__(self, disk: CrashRecorder) -> None:
        super().__init__()
        self._disk = disk

    def steps(self, so_far: Callable[[], Figures]) -> TrainerCallback:
        promise = self._disk.promise

        class Saved(TrainerCallback):
            def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                promise(state.global_step)

        return Saved()


@pytest.fixture(scope="module")
def recorded(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, CrashRecorder]:
    """A run of two checkpoints of which one is kept, its record and key, and all crashes of it."""
    folder = tmp_path_factory.mktemp("recorded")
    run = recipe_in(folder, shared)
    with CrashRecorder(folder) as disk:
        train_recipe(run, Promising(disk))
        disk.promise("the summary")
    return run, disk


def left_by(crash: Crash, folder: Path, run: Recipe) -> Recipe:
    """The recipe of the run that a crash left in a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    crash.write_to(folder)
    (folder / "output").mkdir(exist_ok=True)
    assert run.record.key is not None
    key = folder / run.record.key.relative_to(run.output.dir.parent)
    output = run.output.model_copy(update={"dir": folder / "output"})
    record = run.record.model_copy(update={"key": key})
    return run.model_copy(update={"output": output, "record": record})


def require_resumable(crash: Crash, run: Recipe, recipe: bytes) -> None:
    """Checks what a run relies on when it goes on; each of these was once torn or lost by a crash."""
    folder = RunFolder(run.output.dir)
    state = folder.state
    assert run.record.key is not None
    if run.record.key.exists():
        signing = RecordKey.obtained(run.record.key).verification
        assert signing.raw == VerificationKey.read(run.record.key.with_suffix(".pub")).raw
    steps = [x for x in crash.promised if isinstance(x, int)]
    checkpoint = folder.newest_checkpoint()
    if checkpoint is None:
        assert not steps, "a checkpoint that the run told of is gone"
    else:
        for each in (run.output.dir / "checkpoints").glob("checkpoint-*"):
            require_whole(each)
        assert int(checkpoint.name.removeprefix("checkpoint-")) >= max(steps, default=0)
    if not state:
        folder.require_unused()  # it can be started again
        assert checkpoint is None and not folder.complete
        return
    assert (run.output.dir / "recipe.yaml").read_bytes() == recipe
    path = run.output.dir / "record.jsonl"
    lines = path.read_bytes() if path.exists() else b""
    whole = lines[: lines.rfind(b"\n") + 1]
    if checkpoint is not None or folder.complete:
        assert whole and state["record"]
    if whole:
        chain = parse_chain(whole, VerificationKey.read(run.record.key.with_suffix(".pub")), str(path))
        assert chain.record == state["record"]
        salt = Salt.read(run.record.key.parent / "salts" / f"{chain.record}.salt")
        assert salt.digest == chain.start.body["salt_sha256"]
        assert (run.output.dir / "record.pub").read_bytes() == run.record.key.with_suffix(".pub").read_bytes()
    if folder.complete:
        assert check_output(chain, run.output.dir).adapter
        assert json.loads((run.output.dir / "summary.json").read_text())["steps"] == TRAINING["max_steps"]
    assert folder.complete or "the summary" not in crash.promised


def test_a_crash_at_any_moment_leaves_the_old_checkpoint_or_the_new_one_and_a_run_to_go_on_with(
    recorded: tuple[Recipe, CrashRecorder], tmp_path: Path
) -> None:
    run, disk = recorded
    assert len(disk) > 100
    recipe = (run.output.dir / "recipe.yaml").read_bytes()
    seen = set()
    for crash in disk:
        left = left_by(crash, tmp_path / "left", run)
        try:
            require_resumable(crash, left, recipe)
        except Exception as error:
            raise AssertionError(f"{crash}, after {crash.promised} were promised") from error
        seen.add(getattr(RunFolder(left.output.dir).newest_checkpoint(), "name", None))
    assert seen == {None, "checkpoint-1", "checkpoint-2"}


@pytest.mark.slow
def test_a_run_that_goes_on_after_a_crash_ends_in_the_same_adapter(
    recorded: tuple[Recipe, CrashRecorder], tmp_path: Path
) -> None:
    run, disk = recorded
    expected = (run.output.dir / "adapter_model.safetensors").read_bytes()
    for crash in list(disk)[::5]:
        left = left_by(crash, tmp_path / "left", run)
        train_recipe(left, Silent(), resume=bool(RunFolder(left.output.dir).state))
        assert (left.output.dir / "adapter_model.safetensors").read_bytes() == expected, str(crash)
        assert left.record.key is not None
        public = VerificationKey.read(left.record.key.with_suffix(".pub"))
        record = left.output.dir / "record.jsonl"
        assert check_output(parse_chain(record.read_bytes(), public, str(record)), left.output.dir).adapter


def bit_flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "was changed": bit_flipped,
    "was changed (its first bit)": lambda x: bytes([x[0] ^ 1]) + x[1:],
    "was changed (its last bit)": lambda x: x[:-1] + bytes([x[-1] ^ 128]),
    "was changed (cut off)": lambda x: x[: len(x) // 2],
    "was changed (empty)": lambda x: b"",
    "was changed (longer)": lambda x: x + b"\n",
    "is missing": lambda x: None,
}


def test_no_damage_to_any_file_of_a_checkpoint_goes_unnoticed(
    recorded: tuple[Recipe, CrashRecorder], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(recorded[0].output.dir / "checkpoints" / "checkpoint-2", checkpoint)
    require_whole(checkpoint)
    files = {x: x.read_bytes() for x in checkpoint.iterdir() if x.name != "digests.json"}
    assert {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "figures.json"} < {
        x.name for x in files
    }
    for path, content in files.items():
        for what, damage in DAMAGES.items():
            damaged = damage(content)
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(CheckpointError) as caught:
                require_whole(checkpoint)
            said = (
                f"{checkpoint} is damaged: {path.name} {what.partition(' (')[0]}: restore it from a copy; or "
            )
            assert str(caught.value).startswith(said)
            path.write_bytes(content)
    for name in ("pytorch_model.bin", "scaler.pt", "inner/file"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=f"{name} was added: "):
            require_whole(checkpoint)
        (checkpoint / name).unlink()
    digests = checkpoint / "digests.json"
    whole = json.loads(digests.read_text())
    for content, words in (
        (None, "digests.json is missing"),
        (b"", "digests.json cannot be read"),
        (b"[]", "digests.json cannot be read"),
        (b'{"files": 3, "step": 2}', "digests.json cannot be read"),
        (b'{"files": [["a", 3], [3, "a"]], "step": 2}', "digests.json cannot be read"),
        (b'{"files": {}}', "digests.json cannot be read"),
        (b"[" * 100_000, "digests.json cannot be read"),
        (json.dumps(whole | {"files": {}}).encode(), "README.md was added, .* and [0-9]+ more"),
        (json.dumps(whole | {"step": 1}).encode(), "it is the checkpoint of another step"),
    ):
        digests.unlink(missing_ok=True)
        if content is not None:
            digests.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{words}.*: restore it from a copy"):
            require_whole(checkpoint)


class Ending(Silent):
    """Raises when all steps are done."""

    def measured(self, when: str, figures: dict[str, float]) -> None:
        if when == "after":
            raise ZeroDivisionError


def measured(recipe: Recipe, **training: Any) -> Recipe:
    """The recipe with training data for validation, whose best checkpoint is the result."""
    section = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, **training}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"validation": recipe.data.train}),
            "training": recipe.training.model_copy(update=section),
        }
    )


def _no_model_is_read(*arguments: Any) -> NoReturn:
    raise AssertionError("the model is read")


@pytest.mark.parametrize("record", [True, False])
def test_a_damaged_checkpoint_is_refused_before_the_model_is_read(
    shared: Path, tmp_path: Path, record: bool
) -> None:
    run = measured(recipe_in(tmp_path, shared), metric_for_best_model="loss", greater_is_better=True)
    run = run.model_copy(update={"record": run.record.model_copy(update={"enabled": record})})
    with pytest.raises(ZeroDivisionError):
        train_recipe(run, Ending())
    checkpoints = run.output.dir / "checkpoints"
    state = json.loads((checkpoints / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 1, "the newest is not the best one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blindtune.client.training.models.BaseModel.load", _no_model_is_read)
        for name in ("checkpoint-2/optimizer.pt", "checkpoint-1/adapter_model.safetensors"):
            step, _, file = name.partition("/")
            content = (checkpoints / name).read_bytes()
            (checkpoints / name).write_bytes(bit_flipped(content))
            before = sorted(run.output.dir.rglob("*"))
            with pytest.raises(CheckpointError, match=f"{step} is damaged: {file} was changed"):
                train_recipe(run, Silent(), resume=True)
            assert sorted(run.output.dir.rglob("*")) == before
            (checkpoints / name).write_bytes(content)
    best = (checkpoints / "checkpoint-1" / "adapter_model.safetensors").read_bytes()
    train_recipe(run, Silent(), resume=True)
    assert (run.output.dir / "adapter_model.safetensors").read_bytes() == best


@pytest.mark.parametrize("gone", [False, True])
def test_a_best_checkpoint_that_is_damaged_before_the_end_is_not_the_result(
    shared: Path, tmp_path: Path, gone: bool
) -> None:
    run = measured(recipe_in(tmp_path, shared), metric_for_best_model="loss", greater_is_better=True)

    class Damaging(Silent):
        def steps(self, so_far: Callable[[], Figures]) -> TrainerCallback:
            class Damage(TrainerCallback):
                def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                    if state.global_step == 1:
                        path = Path(args.output_dir, "checkpoint-1", "adapter_model.safetensors")
                        content = path.read_bytes()
                        shutil.rmtree(path.parent) if gone else path.write_bytes(bit_flipped(content))

            return Damage()

    with pytest.raises(CheckpointError, match="checkpoint-1 is damaged: "):
        train_recipe(run, Damaging())
    assert not (run.output.dir / "adapter_model.safetensors").exists()


def test_an_adapters_configuration_lists_everything_in_order(recorded: tuple[Recipe, CrashRecorder]) -> None:
    """Sets have another order in every process, and a run that is repeated gives the same bytes."""
    for folder in (recorded[0].output.dir, recorded[0].output.dir / "checkpoints" / "checkpoint-2"):
        written = json.loads((folder / "adapter_config.json").read_text())
        assert written["target_modules"] == sorted(MODULES)
        assert written["exclude_modules"] == sorted(EXCLUDED)


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A write beyond it fails in the middle, whoever writes: in Python, C++ or Rust."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_at_any_byte_is_one_clear_error_and_leaves_nothing(
    shared: Path, tmp_path: Path
) -> None:
    trainer = trained_one_step(recipe_in(tmp_path, shared, save_strategy="no"))
    folder = Path(trainer.args.output_dir)
    trainer._save_checkpoint(trainer.model, None)
    largest = max(x.stat().st_size for x in (folder / "checkpoint-1").iterdir())
    shutil.rmtree(folder / "checkpoint-1")
    sizes = [1, 63, 64, 65, *range(100, largest, largest // 25), largest - 1]
    for size in sizes:
        with pytest.raises(ResourceError) as caught, files_no_larger_than(size):
            trainer._save_checkpoint(trainer.model, None)
        assert str(caught.value).startswith(f"the disk that holds {folder} ")
        assert "nothing incomplete was left behind" in str(caught.value)
        assert not list(folder.iterdir()), size
    with files_no_larger_than(largest):
        trainer._save_checkpoint(trainer.model, None)
    require_whole(folder / "checkpoint-1")
