"""The record of a run while it goes on: what `blindtune.client.runs.run` tells, and when.

A checkpoint is recorded once it is whole on disk, and wrong answers after the step in which they came.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blindtune.client.data.prepared import PreparedData
from blindtune.client.process.disk import file_written_at_once
from blindtune.client.process.exit_codes import ExitCode, exit_code
from blindtune.client.recipe import Recipe
from blindtune.client.record.adapter import CHECKPOINT_FILES, digests_of, step_of
from blindtune.client.record.chain import Chain
from blindtune.client.record.commitment import Salt
from blindtune.client.record.keys import RecordKey, default_key
from blindtune.client.record.log import RecordLog, Torn
from blindtune.client.record.public import described_operators, described_run, described_split
from blindtune.client.rounds.multiplier import PrivateMultiplier
from blindtune.client.runs.facts import Privacy, RunFacts
from blindtune.client.training.folder import STATE
from blindtune.errors import (
    BlindtuneError,
    CheckpointError,
    ConfigurationError,
    InterruptedRunError,
    RecordError,
)

__all__ = ["RECORD", "RunRecord", "record_key"]

RECORD, PUBLIC_KEY = "record.jsonl", "record.pub"
_NUMBER = re.compile(r"[0-9a-f]{32}")
_STOP = (InterruptedRunError, KeyboardInterrupt)


class RunRecord:
    """The record of one run, or none where the recipe wants none: then all of this does nothing.

    Args:
        log: is written to.
        step: the last step so far.
        known: digests of each checkpoint, by step, as the record says so far.
    """

    def __init__(
        self, log: RecordLog | None = None, step: int = 0, known: dict[int, dict[str, str]] | None = None
    ) -> None:
        self._log = log
        self._step = step
        self._known = known or {}
        self._checkpoints: Path | None = None
        self._multiplier: PrivateMultiplier | None = None
        self._told: dict[str, int] = {}
        self._finished = False

    @classmethod
    def of(
        cls,
        key: RecordKey | None,
        facts: RunFacts,
        say: Callable[[str], None],
    ) -> "RunRecord":
        """The record of a run that begins or goes on.

        Args:
            key: signs; None for a run without a record.
            facts: of the run, whose folder says what it is. A run that is not private has no record.
            say: is told of warnings.

        Raises:
            RecordError, CheckpointError, ConfigurationError: see `begun` and `continued`.
        """
        folder = facts.folder
        record, checkpoint = folder.state.get("record"), folder.newest_checkpoint()
        if key is None or facts.privacy is None:
            if record is not None:
                say(f"warning: the run goes on without its record: {folder.path / RECORD} stays open")
            return cls()
        if record is not None and not (isinstance(record, str) and _NUMBER.fullmatch(record)):
            # It becomes the name of a file.
            raise RecordError(f"{folder.path / STATE} names no record: it was changed. {_WHAT_TO_DO}")
        if record is None and checkpoint is not None:
            say("warning: this run began without a record, and goes on without one")
            return cls()
        if record is None:
            record = os.urandom(16).hex()
            folder.keep(record=record)
        if checkpoint is None and not _has_entry(folder.path / RECORD):
            return cls.begun(key, record, facts, facts.privacy)
        return cls.continued(key, record, facts, facts.privacy, checkpoint, say)

    @classmethod
    def begun(cls, key: RecordKey, record: str, facts: RunFacts, privacy: Privacy) -> "RunRecord":
        """Begins a record.

        Args:
            key: signs.
            record: the record's random number, in hex.
            facts, privacy: of the run.

        Raises:
            ConfigurationError: the folder of the salts can't be written to.
        """
        folder, recipe = facts.folder.path, facts.recipe
        salt = Salt.drawn()
        salt.write(_salt_path(key, record))
        file_written_at_once(folder / PUBLIC_KEY, lambda file: file.write(key.verification.pem))
        (folder / RECORD).unlink(missing_ok=True)  # a part of a first entry, from a process that was killed
        log = RecordLog(folder / RECORD, key, record, None)
        said = described_run(recipe, facts.data, privacy.config, privacy.fingerprint)
        said["configuration"]["commitment"] = salt.configuration(recipe.model_dump(mode="json"))
        body = {
            "software": {"blindtune": version("blindtune")},
            **said,
            "data": _data(facts.data, salt),
            "salt_sha256": salt.digest,
            "tag_key_sha256": salt.tag_key_digest,
            "public_key": key.verification.raw.hex(),
        }
        log.append("start", body)
        return cls(log)

    @classmethod
    def continued(
        cls,
        key: RecordKey,
        record: str,
        facts: RunFacts,
        privacy: Privacy,
        checkpoint: Path | None,
        say: Callable[[str], None],
    ) -> "RunRecord":
        """Goes on with the record of a run.

        Args:
            checkpoint: that the run goes on from; None for its start.
            say: is told of warnings.

        Raises:
            RecordError: the record is gone or broken, was signed with another key, or is another run's.
            CheckpointError: the record says something else of the checkpoint.
        """
        folder = facts.folder.path
        try:
            log, chain, torn = RecordLog.reopened(folder / RECORD, key)
            if chain.record != record:
                raise RecordError(f"{folder / RECORD} is the record of another run")
        except RecordError as error:
            raise RecordError(f"{error}. {_WHAT_TO_DO}") from None
        except OSError as error:
            raise RecordError(
                f"this run has a record, and {folder / RECORD} cannot be read ({error.strerror}). "
                + _WHAT_TO_DO
            ) from None
        going_on = None if checkpoint is None else _checkpoint(checkpoint)
        known = chain.checkpoints()
        if checkpoint is not None and going_on is not None:
            said = known.get(going_on["step"])
            if said not in (None, going_on["files"]):
                raise CheckpointError(
                    f"{checkpoint} is damaged or was exchanged: it is not the one that "
                    f"{folder / RECORD} names. Restore it; or delete the checkpoint, and the run goes on "
                    "from the one before"
                )
            known[going_on["step"]] = going_on["files"]
        log.append("resume", _resumed(facts, privacy, going_on, torn, chain, key, say))
        return cls(log, 0 if going_on is None else going_on["step"], known)

    def follow(self, checkpoints: Path, multiplier: PrivateMultiplier | None) -> TrainerCallback:
        """What a trainer tells of its steps and checkpoints.

        Args:
            checkpoints: the folder that they are in.
            multiplier: whose workers are watched.
        """
        self._checkpoints = checkpoints
        self._multiplier = multiplier
        return _Follower(self)

    @contextmanager
    def kept_to_the_end(self) -> Iterator[None]:
        """Records how the run ended, if it does not finish."""
        try:
            yield
        except BaseException as error:
            try:
                self._ended(error)
            except (BlindtuneError, OSError) as second:
                error.add_note(f"the record could not say so: {second}")
            raise

    def on_step(self, step: int) -> None:
        """A step was done."""
        self._step = step
        self._workers()

    def on_checkpoint(self, folder: Path) -> None:
        """A checkpoint is complete; one that the record has already is not said again."""
        if self._log is None or not folder.is_dir():
            return
        found = _checkpoint(folder)
        if self._known.get(found["step"]) != found["files"]:
            self._known[found["step"]] = found["files"]
            self._log.append("checkpoint", found)

    def finish(self, adapter: Path, steps: int, verified_responses: int, lies: int) -> dict[str, Any] | None:
        """Ends the record.

        Args:
            adapter: folder of the final adapter.
            steps, verified_responses, lies: of the whole run.

        Returns:
            What the summary says of the record; None where there is none.
        """
        if self._log is None:
            return None
        self._workers()
        self._log.append(
            "finish",
            {
                "adapter": digests_of(adapter),
                "steps": steps,
                "verified_responses": verified_responses,
                "lies": lies,
            },
        )
        self._finished = True
        return {"head": self._log.head, "entries": self._log.entries, "key": self._log.key_id}

    def _ended(self, error: BaseException) -> None:
        if self._log is None or self._finished:
            return
        if self._checkpoints is not None and self._checkpoints.is_dir():
            # What is saved while workers fail comes after the trainer has told of its last checkpoint.
            steps = {step: x for x in self._checkpoints.iterdir() if (step := step_of(x)) is not None}
            if steps and max(steps) not in self._known:
                self.on_checkpoint(steps[max(steps)])
        self._workers()
        body = {"exit_code": _exit_code(error), "error": _name(error), "step": self._step}
        self._log.append("interrupted" if isinstance(error, _STOP) else "failed", body)

    def _workers(self) -> None:
        """Tells of workers that were excluded since this was last called."""
        if self._log is None or self._multiplier is None:
            return
        for name, figures in self._multiplier.statistics().items():
            for found in figures.excluded[self._told.get(name, 0) :]:
                body = {
                    "operator": name,
                    "worker": found.worker,
                    "event": found.failure.value,
                    "product": found.product,
                    "excluded": True,
                    "step": self._step,
                }
                self._log.append("worker", body)
                self._told[name] = self._told.get(name, 0) + 1


class _Follower(TrainerCallback):
    def __init__(self, record: RunRecord) -> None:
        self._record = record

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._record.on_step(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._record.on_checkpoint(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


_WHAT_TO_DO = "Restore it from a copy; or move it away and go on without a record: --set record.enabled=false"


def record_key(recipe: Recipe) -> RecordKey | None:
    """The key that signs the record of a recipe's run, made at first use; None where it wants no record.

    Raises:
        ConfigurationError: the key can't be read or made, or is in the folder that is given away.
    """
    if not recipe.record.enabled:
        return None
    path = recipe.record.key or default_key()
    if path.resolve().is_relative_to(recipe.output.dir.resolve()):
        raise ConfigurationError(
            f"the record's key {path} would be in the output folder {recipe.output.dir}, with its salts, and "
            "go wherever that goes: name another file in record.key"
        )
    return RecordKey.obtained(path)


def _has_entry(path: Path) -> bool:
    """Whether a record has been begun. A killed process may leave a file with a part of the first entry."""
    return path.exists() and b"\n" in path.read_bytes()


def _salt_path(key: RecordKey, record: str) -> Path:
    return key.salts / f"{record}.salt"


def _checkpoint(folder: Path) -> dict[str, Any]:
    step = step_of(folder)
    if step is None:
        raise ConfigurationError(f"{folder} is no checkpoint of a run")
    return {"step": step, "files": digests_of(folder, CHECKPOINT_FILES)}


def _data(data: PreparedData, salt: Salt) -> dict[str, Any]:
    return {
        name: None if split is None else {**described_split(split), **vars(salt.split(name, split.digests))}
        for name, split in (("train", data.train), ("validation", data.validation))
    }


def _resumed(
    facts: RunFacts,
    privacy: Privacy,
    checkpoint: dict[str, Any] | None,
    torn: Torn | None,
    chain: Chain,
    key: RecordKey,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The body of an entry ``resume``: what may differ from the start."""
    body: dict[str, Any] = {
        "software": {"blindtune": version("blindtune")},
        "fingerprint": privacy.fingerprint,
        "operators": described_operators(privacy.config),
        "checkpoint": checkpoint,
        "torn": None if torn is None else vars(torn),
        "configuration": None,
        "data": None,
    }
    path = _salt_path(key, chain.record)
    try:
        salt = Salt.read(path)
    except ConfigurationError:
        say(f"warning: the salt {path} is gone: what the record commits to can't be shown any more")
        return body
    if salt.digest != chain.start.body["salt_sha256"]:
        raise RecordError(f"{path} is not the salt of this run's record: restore it from a copy")
    body["configuration"] = salt.configuration(facts.recipe.model_dump(mode="json"))
    body["data"] = _data(facts.data, salt)
    return body


def _exit_code(error: BaseException) -> int:
    if isinstance(error, _STOP):
        return int(ExitCode.INTERRUPTED)
    return int(exit_code(error)) if isinstance(error, BlindtuneError) else int(ExitCode.UNEXPECTED)


def _name(error: BaseException) -> str:
    """The class of an error of ours. Nothing else: a message may quote what nobody foresaw."""
    return type(error).__name__ if isinstance(error, BlindtuneError | KeyboardInterrupt) else "unexpected"
