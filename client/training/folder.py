"""The output folder of a run: one run at a time, and what says whether it can be gone on with.

OUTPUT/recipe.yaml            the configuration with everything that it resolved to
OUTPUT/run.json               what makes the run this one: the base model's fingerprint, keyed digests of
                              the data, when it began, and the figures before training
OUTPUT/checkpoints/           checkpoint-STEP folders
OUTPUT/adapter_model.safetensors, adapter_config.json, tokenizer ...   the result
OUTPUT/summary.json           written last: the run is complete
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from blindtune.client.data.prepared import PreparedData
from blindtune.client.process.disk import disk_errors_are_clear, make_folder
from blindtune.client.recipe import Recipe, load_recipe, write_recipe
from blindtune.client.record.digests import require_whole
from blindtune.client.training.checkpoints import (
    damage_is_clear,
    forget_unfinished,
    newest,
    read_json,
    write_json,
)
from blindtune.client.training.data_tag import differing, new_tags, plain_digests
from blindtune.client.training.trainer import CHECKPOINTS
from blindtune.client.trust.links import require_own_files
from blindtune.errors import ConfigurationError

__all__ = ["RECIPE", "STATE", "SUMMARY", "RunFolder"]

RECIPE, STATE, SUMMARY, LOCK = "recipe.yaml", "run.json", "summary.json", ".lock"
_COMPUTING = ("blindtune", "torch", "transformers", "peft", "accelerate", "numpy")
# Who multiplies, and where the results go, may change between two parts of a run.
_PLAIN_DIGESTS = ("train_sha256", "validation_sha256")  # of earlier versions
_SAME = ("model", "quantization", "adapter", "data", "training")


@dataclass(frozen=True)
class RunFolder:
    """A run's output folder, held by this process."""

    path: Path

    @classmethod
    @contextmanager
    def held(cls, path: Path) -> Iterator["RunFolder"]:
        """Makes the folder, and keeps other processes from using it.

        Everything that a run writes is its owner's alone; a folder that was there keeps its mode.

        Raises:
            ConfigurationError: another process uses it, or it can't be written to.
        """
        with disk_errors_are_clear(path):
            try:
                make_folder(path)
            except FileExistsError as error:
                raise ConfigurationError(f"{error.filename} is a file: choose another output.dir") from None
            lock = FileLock(path / LOCK, mode=0o600)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise ConfigurationError(
                    f"{path} is in use by another blindtune train: wait for it, or choose another output.dir"
                ) from None
        try:
            yield cls(path)
        finally:
            lock.release()

    @property
    def complete(self) -> bool:
        """Whether the run has ended."""
        return (self.path / SUMMARY).exists()

    @property
    def state(self) -> dict[str, Any]:
        """What was kept of the run's start."""
        return read_json(self.path / STATE)

    def keep(self, **state: Any) -> None:
        """Keeps more of it."""
        write_json(self.path / STATE, self.state | state)

    def newest_checkpoint(self) -> Path | None:
        """Where a run that was interrupted goes on."""
        return newest(self.path / CHECKPOINTS)

    @property
    def began(self) -> datetime | None:
        """When the run began, which chat templates that write the date are told; None where nothing says so.

        Raises:
            CheckpointError: what says so is damaged.
        """
        with damage_is_clear(self.path / STATE):
            began = self.state.get("began")
            return None if began is None else datetime.fromisoformat(began)

    @property
    def labels(self) -> list[str]:
        """The class names; none for a language model.

        Raises:
            CheckpointError: what says so is damaged.
        """
        with damage_is_clear(self.path / STATE):
            labels = self.state.get("labels", [])
            if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
                raise TypeError("labels are no list of texts")
            return labels

    def start(self, resume: bool) -> datetime:
        """Checks that a run may start or go on here, and says when it began, or begins.

        Raises:
            ConfigurationError: the folder holds something already, no run to go on with, or a link that
                leads out of it.
        """
        now = datetime.now().replace(microsecond=0)
        require_own_files(self.path)
        if resume:
            self._require_begun()
            return self.began or now
        self.require_unused()
        return now

    def _require_begun(self) -> None:
        if not self.state:
            raise ConfigurationError(f"{self.path} holds no run to resume: start it without --resume")

    def require_whole_checkpoint(self, recipe: Recipe) -> None:
        """Checks that the checkpoint to go on from is whole, and the best one, where that will be the result.

        Raises:
            CheckpointError: one of them is damaged.
        """
        checkpoint = self.newest_checkpoint()
        if checkpoint is None or self.complete:
            return
        require_whole(checkpoint)
        best = read_json(checkpoint / TRAINER_STATE_NAME).get("best_global_step")
        if recipe.training.load_best_model_at_end and best:
            require_whole(checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{best}"))

    def require_unused(self) -> None:
        """Checks that a new run may start here.

        Raises:
            ConfigurationError: the folder holds something already, or is a file.
        """
        if not self.path.is_dir():
            if self.path.exists():
                raise ConfigurationError(f"{self.path} is a file: choose another output.dir")
            return
        if (self.path / STATE).exists():
            raise ConfigurationError(
                f"{self.path} holds a run already: go on with it with --resume, or choose another output.dir"
            )
        # A process that was killed at its very start leaves nothing that matters.
        others = [x for x in os.listdir(self.path) if not x.startswith(".") and x != RECIPE]
        if others:
            raise ConfigurationError(
                f"{self.path} is not empty ({', '.join(sorted(others)[:3])}): choose another output.dir"
            )

    def begin(self, recipe: Recipe, data: PreparedData, fingerprint: str | None, now: datetime) -> list[str]:
        """Writes down what makes this run the one it is.

        Args:
            fingerprint: of the base model; None for a run that is not private, which needs none.
            now: when it begins, as the data was prepared.

        Returns:
            Warnings.
        """
        write_recipe(recipe, self.path / RECIPE)
        tags, warnings = _tags(data)
        self.keep(
            versions=_versions(),
            model_fingerprint=fingerprint,
            data=tags,
            labels=list(data.labels),
            began=now.isoformat(),
        )
        self._own_checkpoints()
        return warnings

    def _own_checkpoints(self) -> None:
        checkpoints = self.path / CHECKPOINTS
        make_folder(checkpoints)
        checkpoints.chmod(0o700)  # Hugging Face may have made it, in an earlier version

    def differing_versions(self) -> list[str]:
        """Libraries that have changed since the run began, which may change what they compute."""
        begun = self.state.get("versions")
        begun = begun if isinstance(begun, dict) else {}
        return [
            f"{name} {begun.get(name)} -> {now}"
            for name, now in _versions().items()
            if begun.get(name) != now
        ]

    @property
    def knows_model(self) -> bool:
        """Whether it says which base model the run began with; earlier versions did not write that down."""
        return self.state.get("model_fingerprint") is not None

    def require_same(self, recipe: Recipe, data: PreparedData, fingerprint: str | None) -> list[str]:
        """Checks that going on would finish the run that was begun here.

        Args:
            fingerprint: of the base model; None for a run that is not private.

        Returns:
            Warnings.

        Raises:
            ConfigurationError: there is none, or the configuration, the data or the base model differ.
        """
        self._require_begun()
        state = self.state
        begun = load_recipe(self.path / RECIPE)
        # The fingerprint tells whether it is the same model, so a branch that moved can be pinned.
        tells = {"model.revision"} if self.knows_model and fingerprint is not None else set()
        changed = [
            f"{section}.{name}"
            for section in _SAME
            for name, value in _values(recipe, section).items()
            if _values(begun, section).get(name) != value and f"{section}.{name}" not in tells
        ]
        if changed:
            raise ConfigurationError(
                f"{self.path} holds a run with another {', '.join(changed)} (see {RECIPE} there): resume it "
                "as it was, or choose another output.dir"
            )
        untold = self._require_same_data(state, data)
        if list(data.labels) != state.get("labels"):
            raise ConfigurationError(
                f"{self.path}: the labels are not those that the run began with: restore them"
            )
        known = state.get("model_fingerprint")
        if known is not None and fingerprint is not None and fingerprint != known:
            raise ConfigurationError(
                f"{self.path}: the run began with a base model of fingerprint {str(known)[:16]}, and "
                f"{recipe.model.name} now has {fingerprint[:16]}: restore it, name the commit that it was "
                "on the hub with --set model.revision=COMMIT, or begin anew in another output.dir"
            )
        write_recipe(recipe, self.path / RECIPE)
        self._own_checkpoints()
        forget_unfinished(self.path / CHECKPOINTS)
        if not untold and "data" in state:
            return []
        tags, warnings = _tags(data)
        kept = {name: x for name, x in state.items() if name not in _PLAIN_DIGESTS}
        write_json(self.path / STATE, kept | {"data": tags})
        return untold + warnings

    def _require_same_data(self, state: dict[str, Any], data: PreparedData) -> list[str]:
        """Warnings, where whether the data is the same can't be told."""
        try:
            if any(name in state for name in _PLAIN_DIGESTS):
                changed = [x for x, value in plain_digests(data).items() if state.get(x) != value]
                what = changed[0].removesuffix("_sha256") if changed else None
            else:
                what = differing(state.get("data"), data)
        except ConfigurationError as error:
            return [f"warning: whether the data is what the run began with can't be told: {error}"]
        if what is not None:
            raise ConfigurationError(
                f"{self.path}: the {what} data is not what the run began with: restore it, or choose "
                "another output.dir"
            )
        return []


def _tags(data: PreparedData) -> tuple[dict[str, Any] | None, list[str]]:
    """What is kept of the data, and warnings."""
    try:
        return new_tags(data), []
    except ConfigurationError as error:  # a container without a settings folder of its own
        return None, [f"warning: --resume will not notice if the data changes: {error}"]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _COMPUTING}


def _values(recipe: Recipe, section: str) -> dict[str, Any]:
    return dict(getattr(recipe, section).model_dump(mode="json"))
