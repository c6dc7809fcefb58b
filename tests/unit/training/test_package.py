"""What is given away of a run is adapter, tokenizer, card and record, and tells nothing of this machine."""

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.recipes import Silent, recipe_of, with_tokenizer, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from blindtune.client.record.chain import read_chain
from blindtune.client.record.keys import VerificationKey
from blindtune.client.record.package import package
from blindtune.client.record.verify import check_output
from blindtune.client.runs.run import train_recipe
from blindtune.errors import BlindtuneError, ConfigurationError, RecordError

pytestmark = pytest.mark.hf

MARKER = "zzmarkerzz"
GIVEN_AWAY = [
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"),
    *("generation_config.json", "record.jsonl", "record.pub", "tokenizer.json", "tokenizer_config.json"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Iterator[Path]:
    """The output of a step on a model of the hub; every folder of its own machine has a name to look for."""
    folder = tmp_path_factory.mktemp(MARKER)
    base = with_tokenizer(checkpoints["llama"], folder)
    data = write_lines(folder / "data.jsonl", [{"prompt": MARKER, "completion": "cd"}] * 2)
    recipe = recipe_of(folder, "someone/model", data, training={"max_steps": 1, "save_strategy": "steps"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blindtune.checkpoint.files.snapshot_download", lambda name, **options: str(base))
        train_recipe(recipe, Silent())
    yield recipe.output.dir


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_package_is_whole_and_tells_nothing_of_this_machine(
    run: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    assert {"run.json", "recipe.yaml", "summary.json", "checkpoints"} <= {x.name for x in run.iterdir()}
    assert MARKER in (run / "recipe.yaml").read_text(), "so that there is something to find"
    out = tmp_path / "out"
    assert package(run, out).files == GIVEN_AWAY == sorted(x.name for x in out.iterdir())
    for path in out.iterdir():
        content = path.read_bytes()
        assert MARKER.encode() not in content and str(tmp_path).encode() not in content, path.name
        assert b'truncation": {' not in content and b'padding": {' not in content, path.name

    chain = read_chain(out / "record.jsonl", VerificationKey.read(out / "record.pub"))
    assert check_output(chain, out).adapter, "an auditor finds the adapter as recorded"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoints["llama"]), out)
    assert model.peft_config["default"].base_model_name_or_path == "someone/model"
    assert (
        AutoTokenizer.from_pretrained(out)("ab").input_ids
        == AutoTokenizer.from_pretrained(run)("ab").input_ids
    )


def test_the_command_says_what_it_wrote_and_what_the_record_tells(run: Path, tmp_path: Path) -> None:
    from blindtune.client.cli.main import app

    ended = CliRunner().invoke(app, ["package", str(run), "-o", str(tmp_path / "out")])
    assert ended.exit_code == 0, ended.output
    assert "adapter_model.safetensors" in ended.output and "--no-record leaves it out" in ended.output
    ended = CliRunner().invoke(app, ["package", str(run), "-o", str(tmp_path / "bare"), "--no-record"])
    assert ended.exit_code == 0 and "record" not in ended.output
    assert not (tmp_path / "bare" / "record.jsonl").exists()


def _set(name: str, value: object, file: str = "adapter_config.json") -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = run / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return change


def _linked(run: Path) -> None:
    (run / "chat_template.jinja").unlink()
    (run / "chat_template.jinja").symlink_to(run / "run.json")


def _with_notes(run: Path) -> None:
    path = run / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt", "data": "private.jsonl"})


def _with_a_tensor(run: Path) -> None:
    path = run / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "kept examples": next(iter(tensors.values())).clone()}, path, {"format": "pt"})


def _with_header(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = run / "adapter_model.safetensors"
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = content[8:end].replace(old, new, 1)
        header += b" " * (-len(header) % 8)
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])

    return change


def _twice(run: Path) -> None:
    path = run / "adapter_config.json"
    path.write_text(path.read_text().replace("{", '{"r": "of a patient",', 1))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file of the user's": (lambda x: (x / "notes.txt").write_text(""), "notes.txt, which no run writes"),
    "a folder": (lambda x: (x / "runs").mkdir(), "runs, which no run writes"),
    "pickled arguments": (
        lambda x: (x / "training_args.bin").write_bytes(b""),
        "training_args.bin, which no run",
    ),
    "predictions": (lambda x: (x / "predictions.jsonl").write_text(""), "predictions.jsonl, which no run"),
    "a hidden file": (lambda x: (x / ".salt").write_text(""), ".salt, which no run writes"),
    "a link": (_linked, "chat_template.jinja is no plain file"),
    "not finished": (lambda x: (x / "summary.json").unlink(), "not the output folder of a finished run"),
    "a local base": (_set("base_model_name_or_path", "/home/me/model"), "--base-model OWNER/NAME"),
    "a relative base": (_set("base_model_name_or_path", "../model"), "--base-model OWNER/NAME"),
    "an unknown setting": (_set("note", None), "sets note, which no run writes"),
    "a path in a setting": (_set("revision", "/home/me/model"), "path of this machine in revision"),
    "more than LoRA": (_set("use_dora", True), "sets use_dora, which is more than plain LoRA"),
    "code for a tokenizer": (
        _set("auto_map", {"AutoTokenizer": "x.Y"}, "tokenizer_config.json"),
        "names code of its own",
    ),
    "a path in a tokenizer": (
        _set("extra", [{"file": "/home/me/data.jsonl"}], "tokenizer_config.json"),
        "path of this machine in extra.file",
    ),
    "notes in the weights": (_with_notes, "carries notes"),
    "a tensor of no adapter": (_with_a_tensor, "'kept examples', which is no tensor of an adapter"),
    "notes at a tensor": (_with_header(b'"dtype"', b'"note":"x","dtype"'), "more of a tensor than its type"),
    "a note that readers pass over": (_with_header(b'"format"', b'"format":"x","format"'), "is damaged"),
    "a setting that readers pass over": (_twice, "adapter_config.json is damaged"),
    "a path as a name": (_set("alpha_pattern", {"/home/me/data": 1}), "path of this machine in the names in"),
    "text of no encoding": (_set("extra", "\ud800", "tokenizer_config.json"), "is damaged"),
    "pickled weights": (
        lambda x: (x / "adapter_model.safetensors").write_bytes(pickle.dumps({"a": 1})),
        "is no safetensors file",
    ),
    "a pickle as a tokenizer": (
        lambda x: (x / "tokenizer.model").write_bytes(pickle.dumps({"a": 1})),
        "is no SentencePiece model",
    ),
    "a damaged tokenizer": (lambda x: (x / "tokenizer.json").write_text("{}"), "tokenizer.json is damaged"),
    "bytes for a template": (lambda x: (x / "chat_template.jinja").write_bytes(b"\xff"), "is damaged"),
    "another adapter": (_set("lora_alpha", 17), "is not the one that"),
    "an open record": (
        lambda x: (x / "record.jsonl").write_bytes(
            b"".join((x / "record.jsonl").read_bytes().splitlines(keepends=True)[:-1])
        ),
        "is open",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_must_not_be_given_away_is_refused_and_nothing_is_written(
    run: Path, tmp_path: Path, what: str
) -> None:
    change, message = WRONG[what]
    change(run)
    with pytest.raises(BlindtuneError) as refused:
        package(run, tmp_path / "out")
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert [x.name for x in tmp_path.iterdir()] == ["run"], "nothing unfinished is left"


def test_a_folders_adapter_gets_a_public_name_and_the_note_that_the_record_has_another(
    run: Path, tmp_path: Path
) -> None:
    found = package(run, tmp_path / "out", base_model="other/name")
    assert any("differs from the recorded one" in x for x in found.notes)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "other/name"
    )
    assert "base_model: other/name" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigurationError, match="--base-model"):
        package(run, tmp_path / "again", base_model="/home/me/model")


def test_a_package_goes_to_a_folder_of_its_own(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="in the output folder itself"):
        package(run, run / "out")
    with pytest.raises(ConfigurationError, match="is not empty"):
        package(run, tmp_path)
    with pytest.raises(ConfigurationError, match="no class names"):
        package(run, tmp_path / "out", labels=True)
    (run / "record.pub").unlink()
    with pytest.raises((RecordError, ConfigurationError)):
        package(run, tmp_path / "out")
    card = tmp_path / "card.md"
    card.write_text("# mine\n")
    package(run, tmp_path / "out", record=False, card=card)
    assert (tmp_path / "out" / "README.md").read_text() == "# mine\n"
