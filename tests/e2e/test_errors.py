"""What goes wrong around a run is one clear error, on the command line and in a script."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support import small_disk
from support.operators import RunningOperators
from support.recipes import with_tokenizer, write_lines
from transformers import AutoModelForCausalLM, PreTrainedModel

from blindtune.checkpoint import Checkpoint
from blindtune.client import BlindConfig
from blindtune.client.cli import main
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import prepare
from blindtune.client.process.exit_codes import ExitCode
from blindtune.errors import (
    BlindtuneError,
    ConfigurationError,
    KitError,
    OperatorUnavailableError,
)

pytestmark = pytest.mark.hf

Load = Callable[..., PreTrainedModel]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
PATIENCE = 120


def _can_mount() -> bool:
    try:
        command = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not _can_mount(), reason="file systems can't be mounted here")
def test_a_disk_that_fills_up_at_any_point_leaves_nothing_behind(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    model = with_tokenizer(checkpoints["llama"], tmp_path)
    train = write_lines(tmp_path / "train.jsonl", [{"prompt": "ab", "completion": "c"}])
    ended = subprocess.run(
        [*NAMESPACE, sys.executable, small_disk.__file__, model, train, str(tmp_path / "disk")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": str(Path(small_disk.__file__).parents[1])},
    )
    assert ended.returncode == 0, ended.stderr
    outcomes = [json.loads(line) for line in ended.stdout.splitlines()]
    for how in ("prepare", "first use", "checkpoint"):
        *full, fits = [outcome for outcome in outcomes if outcome["how"] == how]
        assert fits["error"] is None
        assert len(full) > 5
        for outcome in full:
            assert outcome["error"] == "ResourceError", outcome
            assert f"the disk that holds {tmp_path / 'disk'}" in outcome["message"]
            assert " is full" in outcome["message"]
            assert outcome["left"] == 0, outcome


@pytest.mark.skipif(not _can_mount(), reason="file systems can't be mounted here")
def test_the_command_says_in_one_line_that_the_disk_is_full(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=16k tmpfs {disk}"
    prepare = f"{sys.executable} -m blindtune.client.cli prepare {checkpoints['llama']} --output {disk}/kit"
    ended = subprocess.run(
        [*NAMESPACE, "sh", "-c", f"{mount} && {prepare}; status=$?; ls -A {disk}; exit $status"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == ExitCode.RESOURCE
    assert ended.stdout == "", "nothing is left behind"
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("blindtune")]
    assert line.startswith(f"blindtune: the disk that holds {disk} is full: ")
    assert "Traceback" not in ended.stderr


def test_preparing_into_a_folder_that_is_in_use_is_one_line_and_changes_nothing(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    arguments = ["blindtune", "prepare", str(checkpoints["llama"]), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == ExitCode.CONFIGURATION
    line = f"blindtune: {tmp_path} exists and is not empty: choose another output folder\n"
    assert capsys.readouterr().err == line
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_kit_whose_model_files_are_damaged_is_refused(
    operators: RunningOperators, load: Load, checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    kit = prepare(Checkpoint.open(checkpoints["llama"]), tmp_path / "kit")
    file = kit.folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    # config.json is read by transformers before anything of ours.
    with pytest.raises((BlindtuneError, OSError), match=str(kit.folder)):
        load("llama", operators=operators.operators("llama"), folder=kit.folder)


@pytest.mark.parametrize("name", ["kit.json", "layers.safetensors", "verification.key"])
def test_a_damaged_kit_is_refused_before_any_worker_is_asked(
    load: Load, operators: RunningOperators, checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    kit = prepare(Checkpoint.open(checkpoints["llama"]), tmp_path / "kit")
    file = kit.folder / "blindtune" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    chosen = operators.operators("llama")
    for number, worker in enumerate(operators.workers):
        worker.record(tmp_path / "recorded" / str(number))
    with pytest.raises(KitError, match="blindtune prepare MODEL --output"):
        load("llama", operators=chosen, folder=kit.folder)
    assert [x.read_text() for x in tmp_path.glob("recorded/*/parts.jsonl")] == [""] * 4


def test_a_cached_kit_that_is_damaged_is_made_again_and_says_so(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BLINDTUNE_CACHE", str(tmp_path))
    load("llama", masking="reference")
    (folder,) = (tmp_path / "kits").iterdir()
    (folder / "blindtune" / "verification.key").write_bytes(b"")
    load("llama", masking="reference")
    assert "making the cached kit again" in caplog.text
    assert Kit.open(folder).layers
    assert list((tmp_path / "kits").iterdir()) == [folder]


def test_a_head_that_the_kit_left_out_can_not_be_computed_here(
    operators: RunningOperators, load: Load, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    kit = prepare(Checkpoint.open(checkpoints["llama"]), tmp_path / "kit", "remote")
    with pytest.raises(ConfigurationError, match="head='local' .*blindtune prepare --head local"):
        load("llama", operators=operators.operators("llama"), folder=kit.folder, head="local")


def test_a_checkpoint_without_weights_is_refused(
    load: Load, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copy(checkpoints["llama"] / "config.json", tmp_path)
    with pytest.raises((BlindtuneError, OSError), match=str(tmp_path)):
        load("llama", masking="reference", folder=tmp_path)


def test_an_unreachable_operator_is_an_error_and_not_a_model_that_computes_nothing(
    operators: RunningOperators, load: Load, checkpoints: dict[str, Path]
) -> None:
    alpha, beta = operators.operators("llama", [0])
    nobody = replace(beta, workers=["127.0.0.2:9"])
    config = BlindConfig(operators=[alpha, nobody], allow_one_machine=True, progress=False, retry_seconds=1.0)
    with pytest.raises(OperatorUnavailableError, match="no worker of operator beta answers"):
        AutoModelForCausalLM.from_pretrained(checkpoints["llama"], quantization_config=config)
