"""``blindtune audit transcript``: what one's own worker could know."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.transcripts import write_transcript

from blindtune.client.audit.lab import LabResult
from blindtune.client.audit.transcript import Operand, Transcript, read_transcript
from blindtune.client.audit.weak_masks import (
    GaussianNoise,
    NoMask,
    Permutation,
    ReusedMask,
    Rotation,
    SmallBasis,
    hide,
)
from blindtune.client.cli.main import main
from blindtune.client.process.exit_codes import ExitCode
from blindtune.protocol.expansion import Seed
from blindtune.protocol.parameters import Q24, Q31
from blindtune.protocol.residues import centre, from_centred
from blindtune.server.cli import main as serve

pytestmark = pytest.mark.hf
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; status, stdout, stderr."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["blindtune", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return run_command


@pytest.fixture(scope="module")
def transcripts(small_lab: LabResult, lab_folder: Path) -> Path:
    return lab_folder / "language_model-transcripts"


@pytest.fixture(scope="module")
def plain(transcripts: Path) -> Transcript:
    """The operands in the clear, as two colluding operators have them."""
    rows, seeds = (read_transcript(transcripts / name) for name in ("rows", "seeds"))
    return rows.combined_with(seeds)


@pytest.mark.parametrize("model", ["language_model", "classifier"])
@pytest.mark.parametrize("name", ["seeds", "rows", "lattice"])
def test_recordings_of_real_workers_give_nothing_away(
    run: Run, small_lab: LabResult, lab_folder: Path, model: str, name: str
) -> None:
    recording = lab_folder / f"{model}-transcripts" / name
    code, out, _ = run("audit", "transcript", recording, "--model", lab_folder / model, "--json")
    found = {x["attack"]: x for x in json.loads(out)}
    assert code == 0, found
    assert {"uniformity of words", "token by cosine", "label by largest entry", "rank of the rows"} <= set(
        found
    )
    assert ("uniformity of keys" in found) == (name == "seeds")
    assert all(x["trials"] > 10 for attack, x in found.items() if attack != "uniformity of keys")


@pytest.mark.parametrize("hidden", [True, False])
def test_words_of_another_parameter_set_are_judged_by_its_modulus(
    run: Run, plain: Transcript, lab_folder: Path, tmp_path: Path, hidden: bool
) -> None:
    random, operands = np.random.default_rng(3), []
    for x in plain.operands:
        words = from_centred(centre(x.words(), Q31) >> 7, Q24)
        if hidden:
            words = random.integers(0, Q24.modulus, words.shape, np.uint32)
        operands.append(Operand(x.product, x.rows, x.columns, Q24, words))
    found = _found(run, write_transcript(tmp_path / "t", operands), lab_folder / "language_model")
    assert found == set() if hidden else {"token by cosine", "uniformity of words"} <= found


def test_a_recording_of_two_clients_with_different_parameter_sets_is_refused(
    run: Run, plain: Transcript, lab_folder: Path, tmp_path: Path
) -> None:
    x = plain.operands[0]
    other = Operand(x.product, x.rows, x.columns, Q24, np.zeros_like(x.words()))
    folder = write_transcript(tmp_path / "t", [x, other])
    code, _, err = run("audit", "transcript", folder, "--model", lab_folder / "language_model")
    assert code == ExitCode.DATA and "holds operands of q24 and q31: record one client at a time" in err


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        (NoMask, {"uniformity of words", "token by cosine", "token by sorted values", "small differences"}),
        (Permutation, {"uniformity of words", "token by sorted values", "label by largest entry"}),
        (Rotation, {"uniformity of words", "correlation of words", "small differences"}),
    ],
)
def test_recordings_that_leak_are_seen(
    run: Run, plain: Transcript, lab_folder: Path, tmp_path: Path, mask: type, seen: set[str]
) -> None:
    broken = hide(plain, mask(np.random.default_rng(3)))
    folder = write_transcript(tmp_path / "t", broken.operands, broken.fingerprint)
    arguments = ("audit", "transcript", folder, "--model", lab_folder / "language_model")
    code, out, err = run(*arguments, "--json")
    found = {x["attack"] for x in json.loads(out) if x["above_chance"]}
    assert code == ExitCode.FINDINGS
    assert seen <= found
    assert "gives something away" in err


def _found(run: Run, folder: Path, model: Path) -> set[str]:
    """What is above chance in a recording."""
    code, out, _ = run("audit", "transcript", folder, "--model", model, "--json")
    found = {x["attack"] for x in json.loads(out) if x["above_chance"]}
    assert code == (ExitCode.FINDINGS if found else 0)
    return found


def test_a_single_row_that_is_sent_twice_is_seen(
    run: Run, transcripts: Path, lab_folder: Path, tmp_path: Path
) -> None:
    """Even where no word is anything but uniform."""
    operands = list(read_transcript(transcripts / "rows").operands)
    one, later = (x for x in (operands[0], operands[-9]))
    words = later.words().copy()
    words[3, : one.columns] = one.words()[5, : later.columns]
    assert later.columns == one.columns
    operands[-9] = Operand(later.product, later.rows, later.columns, Q31, words)
    folder = write_transcript(tmp_path / "t", operands)
    assert _found(run, folder, lab_folder / "language_model") == {"rows that came before"}


def test_a_seed_that_serves_two_operands_is_seen(
    run: Run, transcripts: Path, lab_folder: Path, tmp_path: Path
) -> None:
    operands = list(read_transcript(transcripts / "seeds").operands)
    product = operands[4].product
    operands[4] = Operand(product, operands[4].rows, operands[4].columns, Q31, seed=operands[3].seed)
    assert operands[3].product != product
    folder = write_transcript(tmp_path / "t", operands)
    assert "rows that came before" in _found(run, folder, lab_folder / "language_model")


@pytest.mark.parametrize("name", ["seeds", "rows"])
def test_a_mask_that_comes_back_for_the_next_operand_of_its_product_is_seen(
    run: Run, transcripts: Path, lab_folder: Path, tmp_path: Path, name: str
) -> None:
    """As after a restored snapshot: the same product and as many rows, a step later."""
    operands = list(read_transcript(transcripts / name).operands)
    places = [i for i, x in enumerate(operands) if x.product == operands[0].product][:3]
    operands[places[2]] = operands[places[0]]
    folder = write_transcript(tmp_path / "t", operands)
    assert "rows that came before" in _found(run, folder, lab_folder / "language_model")


def test_rows_of_a_seed_that_serve_twice_in_part_are_seen(
    run: Run, transcripts: Path, lab_folder: Path, tmp_path: Path
) -> None:
    operands = list(read_transcript(transcripts / "seeds").operands)
    places = [i for i, x in enumerate(operands) if x.product == operands[0].product]
    seed = operands[places[0]].seed
    assert seed
    again = operands[places[1]]
    operands[places[1]] = Operand(
        again.product,
        again.rows,
        again.columns,
        Q31,
        seed=Seed(seed.key, Q31, seed.row_offset + again.rows - 1),
    )
    folder = write_transcript(tmp_path / "t", operands)
    assert "rows that came before" in _found(run, folder, lab_folder / "language_model")


def test_a_worker_that_gets_both_shares_is_seen(
    run: Run, transcripts: Path, lab_folder: Path, tmp_path: Path
) -> None:
    rows, seeds = (read_transcript(transcripts / name).operands for name in ("rows", "seeds"))
    both = [x for pair in zip(seeds, rows, strict=True) for x in pair]
    folder = write_transcript(tmp_path / "t", both)
    assert "shares that meet" in _found(run, folder, lab_folder / "language_model")


@pytest.mark.parametrize(
    ("mask", "seen"), [(ReusedMask, "small differences"), (GaussianNoise, "token by cosine")]
)
def test_other_broken_masks_leave_a_trace(
    run: Run, plain: Transcript, lab_folder: Path, tmp_path: Path, mask: type, seen: str
) -> None:
    broken = hide(plain, mask(np.random.default_rng(3)))
    folder = write_transcript(tmp_path / "t", broken.operands, broken.fingerprint)
    assert seen in _found(run, folder, lab_folder / "language_model")


def test_masks_of_low_rank_are_seen_where_operands_are_zero(
    run: Run, transcripts: Path, lab_folder: Path, tmp_path: Path
) -> None:
    """Over operands of full rank it takes known plaintext to see them."""
    mask = SmallBasis(np.random.default_rng(3))
    operands = list(read_transcript(transcripts / "rows").operands)
    first = operands[0].product
    for place, x in enumerate(operands):
        if x.product == first:
            zeros = np.zeros((x.rows, x.columns), np.int32)
            operands[place] = Operand(x.product, x.rows, x.columns, Q31, mask.hide(zeros, x.product))
    folder = write_transcript(tmp_path / "t", operands)
    assert "rank of the rows" in _found(run, folder, lab_folder / "language_model")


def test_a_request_that_was_cut_off_and_asked_for_again_is_no_finding(
    run: Run, transcripts: Path, lab_folder: Path, tmp_path: Path
) -> None:
    operands = list(read_transcript(transcripts / "rows").operands)
    whole = operands[4]
    cut = Operand(whole.product, whole.rows, whole.columns, Q31, whole.words()[:-1])
    folder = write_transcript(tmp_path / "t", [*operands[:4], cut, *operands[4:]])
    assert _found(run, folder, lab_folder / "language_model") == set()


@pytest.mark.parametrize("name", ["seeds", "rows"])
def test_an_operand_that_is_asked_for_again_is_no_finding(
    run: Run, transcripts: Path, lab_folder: Path, tmp_path: Path, name: str
) -> None:
    operands = read_transcript(transcripts / name).operands
    folder = write_transcript(tmp_path / "t", [*operands[:5], operands[4], operands[5], *operands[5:]])
    assert _found(run, folder, lab_folder / "language_model") == set()


def test_mistakes_are_named(
    run: Run, transcripts: Path, lab_folder: Path, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    model = lab_folder / "language_model"
    code, _, err = run("audit", "transcript", tmp_path, "--model", model)
    assert code == ExitCode.DATA
    assert "is no transcript of a worker" in err
    code, _, err = run("audit", "transcript", transcripts / "rows", "--model", checkpoints["llama"])
    assert code == ExitCode.CONFIGURATION
    assert "serves another model" in err
    empty = write_transcript(tmp_path / "empty", list[Operand]())
    code, _, err = run("audit", "transcript", empty, "--model", model)
    assert code == ExitCode.DATA
    assert "holds no operand" in err


def test_a_worker_that_records_says_so_loudly(transcripts: Path) -> None:
    said = (transcripts / "rows.log").read_text()
    plain, *events = said.splitlines()  # before anything else, loading included
    assert "WARNING: this worker keeps a copy of everything that its clients send" in plain
    warnings = [x for x in map(json.loads, events) if x["level"] == "warning"]
    assert [x["event"] for x in warnings] == ["recording"]


def test_the_table_says_what_was_found(run: Run, transcripts: Path, lab_folder: Path) -> None:
    code, out, _ = run("audit", "transcript", transcripts / "rows", "--model", lab_folder / "language_model")
    assert code == 0
    assert "token by cosine" in out
    assert "above chance" not in out


def test_a_worker_refuses_a_folder_that_holds_something(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    arguments = ["serve", "--insecure", "--listen", "127.0.0.1:0", "--model", str(checkpoints["llama"])]
    monkeypatch.setattr("sys.argv", ["blindtune-worker", *arguments, "--record", str(tmp_path)])
    monkeypatch.setattr("blindtune.server.cli.configure_logging", lambda log_format: None)
    monkeypatch.setattr("blindtune.server.cli.forbid_core_dumps", lambda: None)
    with pytest.raises(SystemExit, match="1"):
        serve()
    assert "it is not empty: choose a new folder" in capsys.readouterr().err
