"""The output folder of a run: one run at a time, and what says whether it can be gone on with.

OUTPUT/recipe.yaml            the configuration with everything that it resolved to
OUTPUT/run.json               what makes the run this one: digests, and the figures before training
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

from blindtune.client.data.prepared import PreparedData
from blindtune.client.data.records import digest
from blindtune.client.disk import disk_errors_are_clear
from blindtune.client.recipe import Recipe, load_recipe, write_recipe
from blindtune.client.training.checkpoints import forget_unfinished, newest, read_json, write_json
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

        Raises:
            ConfigurationError: another process uses it, or it can't be written to.
        """
        with disk_errors_are_clear(path):
            try:
                # What was learned is as private as the data.
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except FileExistsError:
                raise ConfigurationError(f"{path} is a file: choose another output.dir") from None
            lock = FileLock(path / LOCK)
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

    def begin(self, recipe: Recipe, data: PreparedData) -> None:
        """Writes down what makes this run the one it is."""
        write_recipe(recipe, self.path / RECIPE)
        self.keep(versions=_versions(), **_digests(data), labels=list(data.labels))

    def differing_versions(self) -> list[str]:
        """Libraries that have changed since the run began, which may change what they compute."""
        begun = self.state.get("versions", {})
        return [
            f"{name} {begun.get(name)} -> {now}"
            for name, now in _versions().items()
            if begun.get(name) != now
        ]

    def require_same(self, recipe: Recipe, data: PreparedData) -> None:
        """Checks that going on would finish the run that was begun here.

        Raises:
            ConfigurationError: there is none, or the configuration or the data differ.
        """
        state = self.state
        if not state:
            raise ConfigurationError(f"{self.path} holds no run to resume: start it without --resume")
        begun = load_recipe(self.path / RECIPE)
        changed = [
            f"{section}.{name}"
            for section in _SAME
            for name, value in _values(recipe, section).items()
            if _values(begun, section).get(name) != value
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
        write_recipe(recipe, self.path / RECIPE)
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
