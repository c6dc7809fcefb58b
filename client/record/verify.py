"""What an auditor can check: a record by itself, and against an adapter, data, a configuration, a model.

Only the last two import the libraries that read models, so that the others answer at once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blindtune.client.data.reading.records import read_records, record_digest
from blindtune.client.record.adapter import ADAPTER_FILES, CHECKPOINT_FILES, DIGESTS, digests_of, step_of
from blindtune.client.record.chain import Chain
from blindtune.client.record.commitment import Salt
from blindtune.client.record.digests import differences
from blindtune.errors import RecordError

__all__ = [
    "Output",
    "check_configuration",
    "check_data",
    "check_head",
    "check_model",
    "check_output",
    "gaps",
    "require_salt",
]

SPLITS = ("train", "validation")
RECIPE, SUMMARY, CHECKPOINTS = "recipe.yaml", "summary.json", "checkpoints"


@dataclass(frozen=True)
class Output:
    """What of a run's folder is as the record says.

    Attributes:
        adapter: whether the final adapter is; False where the record is open, and there is none.
        checkpoints: steps of the checkpoints that are there, all as recorded.
        removed: steps of those that were recorded and are not there any more.
    """

    adapter: bool
    checkpoints: Sequence[int]
    removed: Sequence[int]


def check_head(chain: Chain, head: str, where: str) -> None:
    """Checks the end of a record against what is known of it otherwise.

    Raises:
        RecordError: the record ends with another entry.
    """
    if chain.head == head:
        return
    hashes = [x.hash for x in chain.entries]
    if head in hashes:
        raise RecordError(
            f"{where} is the hash of line {hashes.index(head) + 1}, and {len(hashes)} lines are here: the "
            "record went on after that"
        )
    raise RecordError(
        f"the record ends with {chain.head}, and {where} is {head}: entries lack at the end, or it is the "
        "head of another record"
    )


def check_output(chain: Chain, folder: Path) -> Output:
    """Checks that a folder holds the adapter and the checkpoints that a record names.

    Raises:
        RecordError: a file is another one, or is not there, or the record does not name a checkpoint or an
            adapter, or the summary beside the adapter names another head.
    """
    if not folder.is_dir():
        raise RecordError(f"there is no folder {folder}")
    # First, since whatever lacks at the end of the record would be missed below.
    _check_summary(chain, folder / SUMMARY)
    known = chain.checkpoints()
    found = {step: x for x in _folders(folder / CHECKPOINTS) if (step := step_of(x)) is not None}
    for step, checkpoint in sorted(found.items()):
        if step not in known:
            raise RecordError(f"the record names no checkpoint of step {step}, and {checkpoint} is one")
        what = f"checkpoint of step {step}"
        _require_files(checkpoint, known[step], what)
        # Records of earlier versions name the adapter alone.
        if DIGESTS in known[step] and (wrong := differences(checkpoint)):
            raise RecordError(f"{checkpoint} is not the {what} in the record: {', '.join(wrong)}")
    if chain.complete:
        _require_files(folder, chain.entries[-1].body["adapter"], "adapter")
    elif there := [name for name in ADAPTER_FILES if (folder / name).exists()]:
        raise RecordError(
            f"{folder} holds an adapter ({', '.join(there)}), and the record is open and names none: entries "
            "lack at its end, or the run was cut off just before its end, or went on without this record"
        )
    return Output(chain.complete, sorted(found), sorted(set(known) - set(found)))


def check_data(chain: Chain, salt: Salt, files: Sequence[Path]) -> list[int]:
    """Checks that files hold the records that a record commits to, in their order.

    Args:
        files: the training file and, if there is one, the validation file.

    Returns:
        How many records each has.

    Raises:
        RecordError: the salt is not the record's, or a file is not what was committed to.
        DataError: a file can't be read.
    """
    require_salt(chain, salt)
    if len(files) > len(SPLITS):
        raise RecordError(f"a run has a training file and perhaps a validation file, and not {len(files)}")
    counts = []
    for name, path in zip(SPLITS, files, strict=False):
        actual = vars(salt.split(name, [record_digest(x) for x in read_records(path)]))
        for entry in chain.of("start", "resume"):
            data = entry.body["data"]
            if data is None:
                continue  # the salt was gone when the run went on, and the entry says so
            said = data[name]
            where = f"line {entry.sequence + 1}"
            if said is None:
                raise RecordError(f"{where} commits to no {name} data, and {path} was given")
            if said["records"] != actual["records"]:
                raise RecordError(
                    f"{path} holds {actual['records']:,} records, and {where} commits to {said['records']:,}"
                )
            if any(said[x] != actual[x] for x in ("root", "sorted_root")):
                # Which of the two tells whether it is the order alone.
                same = said["sorted_root"] == actual["sorted_root"]
                what = "the records in another order" if same else "other records"
                raise RecordError(f"{path} holds {what} than {where} commits to")
        counts.append(int(actual["records"]))
    return counts


def require_salt(chain: Chain, salt: Salt) -> None:
    """Checks that a salt is that of a record.

    Raises:
        RecordError: it is another one's.
    """
    if chain.start.body["salt_sha256"] != salt.digest:
        raise RecordError(f"the salt is not that of record {chain.record}: name {chain.record}.salt")


def check_configuration(chain: Chain, salt: Salt, folder: Path) -> bool:
    """Checks that a run's folder holds the configuration that was resolved to last.

    Returns:
        Whether the folder holds one.

    Raises:
        RecordError: it is another one.
    """
    from blindtune.client.recipe import load_recipe

    require_salt(chain, salt)
    if not (folder / RECIPE).is_file():
        return False
    entry = chain.of("start", "resume")[-1]
    said = entry.body["configuration"]
    said = said["commitment"] if entry.kind == "start" else said
    if said is None:
        return False
    if salt.configuration(load_recipe(folder / RECIPE).model_dump(mode="json")) != said:
        raise RecordError(
            f"{folder / RECIPE} is not the configuration that line {entry.sequence + 1} commits to"
        )
    return True


def check_model(chain: Chain, model: str, revision: str | None) -> str:
    """Checks that a model is the one that a record names; reads all of its weights.

    Returns:
        The fingerprint of its frozen layers.

    Raises:
        RecordError: it is another one.
        CheckpointError, KitError, UnsupportedError: it can't be read.
    """
    from blindtune.checkpoint import Checkpoint
    from blindtune.checkpoint.files import resolve
    from blindtune.client.kit.kit import Kit, is_kit
    from blindtune.client.kit.prepare import fingerprint
    from blindtune.protocol.weights import SCHEMES

    folder = resolve(model, revision)
    entries = chain.of("start", "resume")
    if is_kit(folder):
        actual = Kit.open(folder).description.fingerprint
    else:
        name = next(x.body["model"]["scheme"] for x in entries if x.kind == "start")
        if name not in SCHEMES:
            raise RecordError(f"the record is of quantization {name}, which this release does not know")
        actual = fingerprint(Checkpoint.open(folder, scheme=SCHEMES[name]))
    for entry in entries:
        said = entry.body["model"]["fingerprint"] if entry.kind == "start" else entry.body["fingerprint"]
        if said != actual:
            raise RecordError(
                f"{model} has fingerprint {actual}, and line {entry.sequence + 1} names a model with {said}"
            )
    return actual


def gaps(chain: Chain) -> list[str]:
    """What an auditor should know of a record whose entries are all good."""
    notes = []
    known: dict[int, Any] = {}
    time = ""
    for entry in chain.entries:
        where = f"line {entry.sequence + 1}"
        if entry.time < time:
            notes.append(f"{where}: the client's clock went back")
        time = entry.time
        if entry.kind == "checkpoint":
            known[entry.body["step"]] = entry.body["files"]
        if entry.kind == "resume":
            checkpoint = entry.body["checkpoint"]
            if checkpoint is not None and known.get(checkpoint["step"]) != checkpoint["files"]:
                notes.append(
                    f"{where}: the run went on from step {checkpoint['step']} with a checkpoint that no "
                    "entry before names: it was cut off just then, or trained for a while without a record"
                )
            if entry.body["torn"] is not None:
                notes.append(f"{where}: an entry that was cut off while it was written was taken out here")
            if entry.body["fingerprint"] != chain.start.body["model"]["fingerprint"]:
                notes.append(f"{where}: the run went on with another model")
            data = entry.body["data"]
            if data is not None and _roots(data) != _roots(chain.start.body["data"]):
                notes.append(f"{where}: the run went on with other data")
            if data is None:
                notes.append(f"{where}: the salt was gone, so nothing is said of the data from here on")
    return notes


def _check_summary(chain: Chain, path: Path) -> None:
    """Compares the head that a run wrote beside its adapter, where it is there."""
    if not path.is_file():
        return
    try:
        said = json.loads(path.read_text(encoding="utf-8"))["record"]["head"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RecordError(
            f"{path} names no head of a record: the run ended without this record, or the file was changed"
        ) from None
    check_head(chain, str(said), f"the head in {path}")


def _roots(data: Mapping[str, Any]) -> list[str | None]:
    return [None if data[name] is None else data[name]["root"] for name in SPLITS]


def _folders(path: Path) -> list[Path]:
    return [x for x in path.iterdir() if x.is_dir()] if path.is_dir() else []


def _require_files(folder: Path, said: Mapping[str, str], what: str) -> None:
    actual = digests_of(folder, CHECKPOINT_FILES if DIGESTS in said else ADAPTER_FILES)
    for name in sorted({*said, *actual}):
        if said.get(name) != actual.get(name):
            raise RecordError(f"{folder / name} is not that of the {what} in the record: it was changed")
