"""The record of runs in this process: what it says, what it never says, and how it goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.recipes import Silent, recipe_of, with_tokenizer, write_lines
from transformers import TrainerCallback

from blindtune.client.config.blind_config import BlindConfig
from blindtune.client.data.prepared import PreparedData
from blindtune.client.recipe import Recipe
from blindtune.client.record import verify
from blindtune.client.record.canonical import canonical
from blindtune.client.record.chain import Chain, read_chain
from blindtune.client.record.commitment import Salt
from blindtune.client.record.digests import write_digests
from blindtune.client.record.keys import VerificationKey
from blindtune.client.record.public import described_run
from blindtune.client.runs.run import train_recipe
from blindtune.client.training.figures import Figures
from blindtune.errors import (
    CheckpointError,
    ConfigurationError,
    OperatorUnavailableError,
    RecordError,
)

pytestmark = pytest.mark.hf

MARKER = "zzmarkerzz"
RECORDS = [{"text": f"{MARKER} text {i}", "label": f"{MARKER}{'xyz'[i % 3]}"} for i in range(9)]
TRAINING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}


@pytest.fixture
def make(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., Recipe]:
    """Makes recipes whose texts, labels, classes, files and folders all hold the marker."""
    folder = tmp_path / MARKER
    folder.mkdir()
    model = with_tokenizer(checkpoints["bert"], folder)
    train = write_lines(folder / f"{MARKER}.jsonl", RECORDS)
    validation = write_lines(folder / f"{MARKER}-validation.jsonl", RECORDS[:4])

    def recipe(**sections: Any) -> Recipe:
        data = {
            "task": "classification",
            "validation": str(validation),
            "labels": sorted({x["label"] for x in RECORDS}),
        }
        record = {"key": str(tmp_path / "keys" / "record.key")}
        return recipe_of(
            folder, model, train, **{"data": data, "training": TRAINING, "record": record} | sections
        )

    return recipe


class Stopping(Silent):
    """Ends a run at a step."""

    def __init__(self, step: int, error: BaseException) -> None:
        super().__init__()
        self.step, self.error = step, error

    def steps(self, so_far: Callable[[], Figures]) -> TrainerCallback:
        stopping = self

        class Callback(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                if state.global_step == stopping.step:
                    raise stopping.error

        return Callback()


def record_of(recipe: Recipe) -> Path:
    return recipe.output.dir / "record.jsonl"


def chain_of(recipe: Recipe) -> Chain:
    assert recipe.record.key is not None
    return read_chain(record_of(recipe), VerificationKey.read(recipe.record.key.with_suffix(".pub")))


def salt_of(recipe: Recipe) -> Path:
    assert recipe.record.key is not None
    (path,) = (recipe.record.key.parent / "salts").iterdir()
    return path


def test_a_run_is_recorded_and_its_results_are_those_of_the_record(make: Callable[..., Recipe]) -> None:
    run = make()
    summary = train_recipe(run, Silent())
    chain = chain_of(run)
    assert [x.kind for x in chain.entries] == ["start", *["checkpoint"] * 4, "finish"]
    assert summary["record"]["head"] == chain.head and summary["record"]["entries"] == 6
    there = verify.check_output(chain, run.output.dir)
    assert there == verify.Output(True, [3, 4], [1, 2])
    salt = Salt.read(salt_of(run))
    assert verify.check_data(chain, salt, [run.data.train, run.data.validation]) == [9, 4]
    assert verify.check_configuration(chain, salt, run.output.dir)
    said = chain.start.body
    assert verify.check_model(chain, run.model.name, None) == said["model"]["fingerprint"]
    assert said["data"]["train"]["records"] == said["data"]["train"]["used"] == 9
    assert said["configuration"]["training"]["learning_rate"] == "0.0002"
    assert said["configuration"]["data"]["classes"] == 3
    assert verify.gaps(chain) == []


def test_a_record_holds_nothing_of_the_data(make: Callable[..., Recipe]) -> None:
    run = make(adapter={"lora_alpha": 3.5})
    with pytest.raises(ZeroDivisionError):
        train_recipe(run, Stopping(2, ZeroDivisionError(f"{MARKER} in a message")))
    train_recipe(run, Silent(), resume=True)
    content = record_of(run).read_text()
    assert [x.kind for x in chain_of(run).entries][-4:] == ["resume", "checkpoint", "checkpoint", "finish"]
    assert MARKER not in content and str(run.output.dir.parent.parent) not in content
    assert salt_of(run).read_text().strip() not in content
    assert not any(MARKER in path.name for path in run.output.dir.rglob("*"))


def test_a_system_message_is_not_in_the_record(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    train = write_lines(
        tmp_path / "t.jsonl", [{"question": f"q{i} {MARKER}", "answer": "a"} for i in range(4)]
    )
    run = recipe_of(
        tmp_path,
        with_tokenizer(checkpoints["llama"], tmp_path),
        train,
        data={"system": f"{MARKER} system", "max_length": 200},
        training={"max_steps": 1},
        record={"key": str(tmp_path / "record.key")},
    )
    train_recipe(run, Silent())
    assert MARKER not in record_of(run).read_text()


def test_every_end_of_a_run_is_recorded_and_the_chain_goes_on(make: Callable[..., Recipe]) -> None:
    run = make()
    with pytest.raises(OperatorUnavailableError):
        train_recipe(run, Stopping(2, OperatorUnavailableError("gone")))
    with pytest.raises(KeyboardInterrupt):
        train_recipe(run, Stopping(3, KeyboardInterrupt()), resume=True)
    train_recipe(run, Silent(), resume=True)
    chain = chain_of(run)
    failed, interrupted = chain.of("failed", "interrupted")
    assert (failed.kind, failed.body) == (
        "failed",
        {"exit_code": 8, "error": "OperatorUnavailableError", "step": 2},
    )
    assert (interrupted.kind, interrupted.body["exit_code"], interrupted.body["step"]) == (
        "interrupted",
        130,
        3,
    )
    assert [x.body["checkpoint"]["step"] for x in chain.of("resume")] == [2, 3]
    assert chain.complete and verify.gaps(chain) == []
    assert verify.check_output(chain, run.output.dir).adapter


def test_a_changed_adapter_checkpoint_data_configuration_or_model_is_refused(
    make: Callable[..., Recipe], checkpoints: dict[str, Path]
) -> None:
    run = make()
    train_recipe(run, Silent())
    chain, output = chain_of(run), run.output.dir
    salt = Salt.read(salt_of(run))

    def refused(path: Path, words: str, check: Callable[[], object]) -> None:
        before = path.read_bytes()
        path.write_bytes(before.replace(b"\n", b" \n", 1) if path.suffix == ".yaml" else before[:-1] + b"?")
        with pytest.raises(RecordError, match=words):
            check()
        path.write_bytes(before)

    def folder() -> object:
        return verify.check_output(chain, output)

    refused(output / "adapter_model.safetensors", "is not that of the adapter in the record", folder)
    refused(output / "adapter_config.json", "is not that of the adapter in the record", folder)
    inside = output / "checkpoints" / "checkpoint-3" / "adapter_model.safetensors"
    refused(inside, "is not that of the checkpoint of step 3", folder)
    refused(inside.parent / "digests.json", "is not that of the checkpoint of step 3", folder)
    refused(inside.parent / "optimizer.pt", "checkpoint of step 3 .*: optimizer.pt was changed", folder)
    shutil.copytree(inside.parent, output / "checkpoints" / "checkpoint-9")
    with pytest.raises(RecordError, match="the record names no checkpoint of step 9"):
        folder()
    shutil.rmtree(output / "checkpoints" / "checkpoint-9")
    summary = json.loads((output / "summary.json").read_text())
    summary["record"]["head"] = "0" * 64
    (output / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(RecordError, match="the head in .*summary.json is 0000"):
        folder()
    for records, words in (
        (RECORDS[:-1], "holds 8 records, and line 1 commits to 9"),
        (RECORDS[::-1], "holds the records in another order than line 1"),
        ([{**RECORDS[0], "text": "other"}, *RECORDS[1:]], "holds other records than line 1"),
    ):
        other = write_lines(output.parent / "other.jsonl", records)
        with pytest.raises(RecordError, match=words):
            verify.check_data(chain, salt, [other])
    with pytest.raises(RecordError, match="the salt is not that of record"):
        verify.check_data(chain, Salt.drawn(), [run.data.train])
    recipe = output / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lora_alpha: 16", "lora_alpha: 17"))
    with pytest.raises(RecordError, match="is not the configuration that line 1 commits to"):
        verify.check_configuration(chain, salt, output)
    with pytest.raises(RecordError, match="names a model with"):
        verify.check_model(chain, str(checkpoints["llama"]), None)


def test_an_adapter_is_not_compared_with_a_record_that_lacks_its_end(make: Callable[..., Recipe]) -> None:
    run = make()
    train_recipe(run, Silent())
    output, path = run.output.dir, record_of(run)
    lines = path.read_bytes().splitlines(keepends=True)
    adapter, summary = output / "adapter_model.safetensors", output / "summary.json"
    kept = json.loads(summary.read_text())
    adapter.write_bytes(b"foreign")
    path.write_bytes(b"".join(lines[:-1]))
    chain = chain_of(run)
    for said, words in (
        (kept, f"the head in {summary} is {kept['record']['head']}: entries lack at the end"),
        (kept | {"record": None}, "the run ended without this record, or the file was changed"),
        # A head that fits does not help: an open record names no adapter.
        (kept | {"record": {"head": chain.head}}, "the record is open and names none: entries lack"),
        (None, "the record is open and names none: entries lack"),
    ):
        summary.unlink(missing_ok=True)
        if said is not None:
            summary.write_text(json.dumps(said))
        with pytest.raises(RecordError, match=words):
            verify.check_output(chain, output)
    adapter.unlink()
    with pytest.raises(RecordError, match="holds an adapter .adapter_config.json"):
        verify.check_output(chain, output)
    (output / "adapter_config.json").unlink()
    assert verify.check_output(chain, output) == verify.Output(False, [3, 4], [1, 2])


def _interrupted(run: Recipe) -> None:
    with pytest.raises(OperatorUnavailableError):
        train_recipe(run, Stopping(2, OperatorUnavailableError("gone")))


def test_a_run_whose_record_is_broken_gone_or_someone_elses_is_not_gone_on_with(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = make()
    _interrupted(run)
    path = record_of(run)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"step":1', b'"step":7'))
    with pytest.raises(RecordError, match=r"line 2: the signature does not fit.*record.enabled=false"):
        train_recipe(run, Silent(), resume=True)
    path.unlink()
    with pytest.raises(RecordError, match=r"cannot be read.*Restore it from a copy"):
        train_recipe(run, Silent(), resume=True)
    path.write_bytes(whole)
    with pytest.raises(RecordError, match="was signed with key"):
        train_recipe(make(record={"key": str(tmp_path / "other" / "record.key")}), Silent(), resume=True)
    observer = Silent()
    train_recipe(make(record={"enabled": False}), observer, resume=True)
    assert any("goes on without its record" in x for x in observer.said)
    assert path.read_bytes() == whole


def test_a_checkpoint_that_was_exchanged_is_not_gone_on_from(make: Callable[..., Recipe]) -> None:
    run = make()
    _interrupted(run)
    checkpoints = run.output.dir / "checkpoints"
    shutil.copy(
        checkpoints / "checkpoint-1" / "adapter_model.safetensors",
        checkpoints / "checkpoint-2" / "adapter_model.safetensors",
    )
    write_digests(checkpoints / "checkpoint-2")
    with pytest.raises(CheckpointError, match="checkpoint-2 is damaged or was exchanged"):
        train_recipe(run, Silent(), resume=True)


def test_a_torn_entry_is_said_by_the_one_that_follows(make: Callable[..., Recipe]) -> None:
    run = make()
    _interrupted(run)
    path = record_of(run)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:50])
    train_recipe(run, Silent(), resume=True)
    chain = chain_of(run)
    (resume,) = chain.of("resume")
    assert resume.body["torn"]["size"] == 50 and chain.complete
    assert any("was taken out here" in x for x in verify.gaps(chain))


@pytest.mark.parametrize("left", [b"", b'{"body":{"con'])
def test_a_run_killed_before_its_first_entry_begins_its_record_anew(
    left: bytes, make: Callable[..., Recipe]
) -> None:
    run = make()
    _interrupted(run)
    shutil.rmtree(run.output.dir / "checkpoints")
    record_of(run).write_bytes(left)
    train_recipe(run, Silent(), resume=True)
    assert [x.kind for x in chain_of(run).entries] == ["start", *["checkpoint"] * 4, "finish"]


def test_the_number_of_a_record_names_no_file_elsewhere(make: Callable[..., Recipe], tmp_path: Path) -> None:
    run = make()
    _interrupted(run)
    shutil.rmtree(run.output.dir / "checkpoints")
    record_of(run).unlink()
    state = json.loads((run.output.dir / "run.json").read_text())
    (run.output.dir / "run.json").write_text(json.dumps(state | {"record": f"../../{'0' * 32}"}))
    with pytest.raises(RecordError, match="run.json names no record"):
        train_recipe(run, Silent(), resume=True)
    assert not list(tmp_path.glob("*.salt"))


def test_a_checkpoint_that_was_never_recorded_is_noted(make: Callable[..., Recipe]) -> None:
    run = make()
    _interrupted(run)
    path = record_of(run)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    train_recipe(run, Silent(), resume=True)
    chain = chain_of(run)
    assert chain.complete
    assert any("with a checkpoint that no entry before names" in x for x in verify.gaps(chain))


def test_a_lost_salt_does_not_stop_a_run(make: Callable[..., Recipe]) -> None:
    run = make()
    _interrupted(run)
    salt_of(run).unlink()
    observer = Silent()
    train_recipe(run, observer, resume=True)
    assert any("the salt" in x and "is gone" in x for x in observer.said)
    assert any("the salt was gone" in x for x in verify.gaps(chain_of(run)))


def test_a_key_in_the_folder_that_is_given_away_is_refused_before_it_is_made(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = make()
    (tmp_path / "link").symlink_to(run.output.dir)
    for folder in (run.output.dir, run.output.dir / "keys", tmp_path / "link"):
        with pytest.raises(ConfigurationError, match="would be in the output folder"):
            train_recipe(make(record={"key": str(folder / "record.key")}), Silent())
    assert not run.output.dir.exists()


def test_a_run_without_a_record_leaves_none(make: Callable[..., Recipe], tmp_path: Path) -> None:
    run = make(record={"enabled": False, "key": str(tmp_path / "unused" / "record.key")})
    assert train_recipe(run, Silent())["record"] is None
    assert not record_of(run).exists() and not (tmp_path / "unused").exists()


def test_two_runs_share_a_key_and_no_salt(make: Callable[..., Recipe], tmp_path: Path) -> None:
    one, other = make(), make(output={"dir": str(tmp_path / "other")})
    for run in (one, other):
        train_recipe(run, Silent())
    first, second = chain_of(one), chain_of(other)
    assert first.record != second.record
    for name in ("root", "sorted_root"):
        assert first.start.body["data"]["train"][name] != second.start.body["data"]["train"][name]
    assert one.record.key is not None
    assert len(list((one.record.key.parent / "salts").iterdir())) == 2


def test_what_has_no_canonical_form_stops_no_run(make: Callable[..., Recipe]) -> None:
    run = make(adapter={"rank_pattern": {"schicht_ä": 4}, "lora_alpha": 1e300})
    run = run.model_copy(update={"data": run.data.model_copy(update={"train_examples": 10**30})})
    said = described_run(run, PreparedData(*[None] * 2, []), BlindConfig(masking="reference"), "f")  # type: ignore[arg-type]
    assert canonical(said)
    assert said["configuration"]["data"]["train_examples"] == str(10**30)
    assert said["configuration"]["adapter"]["rank_pattern"] == {"schicht_\\xe4": 4}
