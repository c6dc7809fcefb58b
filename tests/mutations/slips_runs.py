"""Slips with checkpoints and with runs that go on, as one makes them when code is tidied up."""

from mutations.mutation import mutation

__all__ = ["SLIPS_WITH_RUNS"]

_BATCHES = "tests/unit/training/test_batches.py"
_CHECKPOINTS = "tests/unit/training/test_checkpoints.py"
_RUN = "tests/unit/training/test_run.py"

SLIPS_WITH_RUNS = (
    mutation(
        "best-checkpoint-removed",
        "the best checkpoint is removed like any older one",
        "client/training/checkpoints.py",
        "kept = {final.name, Path(best or final).name}",
        "kept = {final.name}",
        f"{_CHECKPOINTS}::test_a_damaged_checkpoint_is_refused_before_the_model_is_read",
    ),
    mutation(
        "figures-without-this-process",
        "a checkpoint's figures lack what this process has trained",
        "client/training/trainer.py",
        "vars(self._so_far() + self.trained)",
        "vars(self._so_far())",
        f"{_RUN}::test_a_run_that_fails_in_the_middle_of_a_step_ends_as_if_it_had_not",
    ),
    mutation(
        "order-from-a-generator",
        "the order of an epoch follows from where a generator is, and not from its number",
        "client/training/batches.py",
        'chance = random.Random(f"{self._seed} {self._epoch}")  # noqa: S311 - it protects nothing',
        'chance = self.__dict__.setdefault("_chance", random.Random(f"{self._seed}"))  # noqa: S311',
        f"{_BATCHES}::test_only_the_last_batch_is_short",
    ),
    mutation(
        "measuring-draws-numbers",
        "measuring leaves the random number generators elsewhere than it found them",
        "client/training/trainer.py",
        "            self.args.dataloader_drop_last = drop_last\n            before.restore()\n",
        "            self.args.dataloader_drop_last = drop_last\n",
        f"{_RUN}::test_a_run_that_fails_in_the_middle_of_a_step_ends_as_if_it_had_not",
        path="measuring",
    ),
)
