"""The output folder of a run: one run at a time, and what says whether it can be gone on with.

OUTPUT/recipe.yaml            the configuration with everything that it resolved to
OUTPUT/run.json               what makes the run this one: the base model's fingerprint, digests of the
                              data, and the figures before training
OUTPUT/checkpoints/           checkpoint-STEP folders
OUTPUT/adapter_model.safetensors, adapter_config.json, tokenizer ...   the result
OUTPUT/summary.json           written last: the run is complete
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from blindtune.client.data.prepared import PreparedData
from blindtune.client.data.records import digest
from blindtune.client.disk import disk_errors_are_clear, make_folder
from blindtune.client.recipe import Recipe, load_recipe, write_recipe
from blindtune.client.training.checkpoints import forget_unfinished, newest, read_json, write_json
from blindtune.client.training.digests import require_whole
from blindtune.client.training.trainer import CHECKPOINTS
from blindtune.protocol.errors import ConfigurationError

__all__ = ["RECIPE", "STATE", "SUMMARY", "RunFolder"]

RECIPE, STATE, SUMMARY, LOCK = "recipe.yaml", "run.json", "summary.json", ".lock"
_COMPUTING = ("blindtune", "torch", "transformers", "peft", "accelerate", "numpy")
# Who multiplies, and where the results go, may change between two parts of a run.
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
            ConfigurationError: the folder holds something already.
        """
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

    def begin(self, recipe: Recipe, data: PreparedData, fingerprint: str | None) -> None:
        """Writes down what makes this run the one it is.

        Args:
            fingerprint: of the base model; None for a run that is not private, which needs none.
        """
        write_recipe(recipe, self.path / RECIPE)
        self.keep(
            versions=_versions(), model_fingerprint=fingerprint, **_digests(data), labels=list(data.labels)
        )
        self._own_checkpoints()

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

    def require_same(self, recipe: Recipe, data: PreparedData, fingerprint: str | None) -> None:
        """Checks that going on would finish the run that was begun here.

        Args:
            fingerprint: of the base model; None for a run that is not private.

        Raises:
            ConfigurationError: there is none, or the configuration, the data or the base model differ.
        """
        state = self.state
        if not state:
            raise ConfigurationError(f"{self.path} holds no run to resume: start it without --resume")
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
        for name, value in _digests(data).items():
            if state.get(name) != value:
                what = name.removesuffix("_sha256")
                raise ConfigurationError(
                    f"{self.path}: the {what} data is not what the run began with: restore it, or choose "
                    "another output.dir"
                )
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


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _COMPUTING}


def _values(recipe: Recipe, section: str) -> dict[str, Any]:
    return dict(getattr(recipe, section).model_dump(mode="json"))


def _digests(data: PreparedData) -> dict[str, str | None]:
    def of(rows: Sequence[dict[str, Any]] | None) -> str | None:
        return None if rows is None else digest(rows)

    return {
        "train_sha256": of(data.train.rows),
        "validation_sha256": of(None if data.validation is None else data.validation.rows),
    }
