"""Slips with checkpoints and with runs that go on, as one makes them when code is tidied up."""

from mutations.mutation import mutation

__all__ = ["SLIPS_WITH_RUNS"]

_FUZZ_RUN_FOLDER = "tests/fuzz/test_fuzz_run_folder.py"
_KIT = "tests/unit/client/test_kit.py"
_RECORD_CHAIN = "tests/unit/record/test_record_chain.py"
_BATCHES = "tests/unit/training/test_batches.py"
_CHECKPOINTS = "tests/unit/training/test_checkpoints.py"
_DATA_TAG = "tests/unit/training/test_data_tag.py"
_IN_FLIGHT = "tests/unit/training/test_in_flight.py"
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
    mutation(
        "resume-with-another-adapter-section",
        "a run goes on with another adapter section than it began with",
        "client/training/folder.py",
        '_SAME = ("model", "quantization", "adapter", "data", "training")',
        '_SAME = ("model", "quantization", "data", "training")',
        f"{_DATA_TAG}::test_no_setting_of_what_a_run_computes_can_be_changed_when_it_goes_on",
    ),
    mutation(
        "newest-checkpoint-by-its-name",
        "checkpoints are in the order of their names, so that 9 comes after 10",
        "client/training/checkpoints.py",
        "return [steps[step] for step in sorted(steps)]",
        "return [steps[step] for step in sorted(steps, key=str)]",
        f"{_FUZZ_RUN_FOLDER}::test_the_newest_checkpoint_is_found_among_folders_of_any_name",
    ),
    mutation(
        "file-flushed-too-early",
        "a file is flushed to the disk before what Python holds back is written to it",
        "client/process/disk.py",
        "                file.flush()\n                os.fsync(file.fileno())\n",
        "                os.fsync(file.fileno())\n",
        f"{_CHECKPOINTS}::test_a_crash_at_any_moment_leaves_the_old_checkpoint_or_the_new_one_and_a_run_to_go_on_with",
    ),
    mutation(
        "files-in-folders-not-flushed",
        "of what appears at once only the files that lie in no folder of it are flushed",
        "client/process/disk.py",
        '    for path in folder.rglob("*"):\n        sync(path)\n    sync(folder)\n',
        '    for path in folder.glob("*"):\n        sync(path)\n    sync(folder)\n',
        f"{_KIT}::test_a_crash_while_a_kit_is_written_leaves_a_whole_one_or_none",
    ),
    mutation(
        "record-name-not-flushed",
        "a record that was begun is gone after a loss of power, though checkpoints name it",
        "client/record/log.py",
        "        if created:\n",
        "        if not created:\n",
        f"{_RECORD_CHAIN}::test_an_entry_that_was_added_survives_any_crash",
    ),
    mutation(
        "parameters-in-the-order-of-a-set",
        "the optimizer's parameters are in the order of a set, and a run that goes on has state of others",
        "client/training/trainer.py",
        "            return super().create_optimizer(*args, **options)\n",
        "            optimizer = super().create_optimizer(*args, **options)\n"
        "            for group in optimizer.param_groups:\n"
        '                group["params"] = sorted(set(group["params"]), key=lambda x: (x.shape, id(x)))\n'
        "            return optimizer\n",
        f"{_RUN}::test_a_run_that_fails_in_the_middle_of_a_step_ends_as_if_it_had_not",
    ),
    mutation(
        "stop-before-the-epoch-is-measured",
        "a run that stops at the end of an epoch saves before the epoch is measured",
        "client/runs/stopping.py",
        "        if not (state.epoch or 0.0).is_integer():\n            self._stop(state, control)\n",
        "        self._stop(state, control)\n",
        f"{_RUN}::test_a_stop_comes_after_what_belongs_to_the_end_of_an_epoch_and_not_after_the_last_step",
    ),
    mutation(
        "one-step-more-after-the-last",
        "a run that goes on from its last step takes one more",
        "client/training/trainer.py",
        "        if self.state.global_step < self.state.max_steps:\n"
        "            super()._run_epoch(*args, **options)\n",
        "        super()._run_epoch(*args, **options)\n",
        f"{_RUN}::test_a_run_killed_after_its_last_step_takes_no_step_more",
    ),
    mutation(
        "resume-skips-the-scheduler",
        "the learning rate begins anew when a run goes on",
        "client/training/trainer.py",
        "            super()._load_optimizer_and_scheduler(checkpoint)\n",
        "            scheduler = self.lr_scheduler.state_dict()\n"
        "            super()._load_optimizer_and_scheduler(checkpoint)\n"
        "            self.lr_scheduler.load_state_dict(scheduler)\n",
        f"{_RUN}::test_a_run_that_fails_in_the_middle_of_a_step_ends_as_if_it_had_not",
        path="resume",
    ),
    mutation(
        "validation-data-not-compared",
        "a run goes on with other validation data than it began with",
        "client/training/data_tag.py",
        '    return {"train": data.train.rows, "validation": validation}\n',
        '    return {"train": data.train.rows, "validation": validation and data.train.rows}\n',
        f"{_DATA_TAG}::test_changed_data_is_refused",
    ),
    mutation(
        "numpy-state-not-restored",
        "where numpy's random numbers are is not put back",
        "client/training/checkpoints.py",
        "        np.random.set_state(self._numpy)\n",
        "",
        f"{_IN_FLIGHT}::test_results_are_those_of_one_at_a_time_although_the_last_one_ends_first",
    ),
    mutation(
        "measurement-that-failed-forgotten",
        "a checkpoint is saved though the measurement that decides failed, and the run goes on without it",
        "client/training/trainer.py",
        "            before.restore()\n        self._measuring = False\n",
        "            before.restore()\n            self._measuring = False\n",
        f"{_RUN}::test_no_checkpoint_lacks_a_measurement_that_decides",
        path="measuring",
    ),
    mutation(
        "figures-before-training-lost",
        "what was spent before the first checkpoint is lost when a run goes on",
        "client/runs/run.py",
        "self._folder.keep(before=before, so_far=vars(self._this_process()))",
        "self._folder.keep(before=before)",
        f"{_RUN}::test_a_run_that_fails_in_the_middle_of_a_step_ends_as_if_it_had_not",
    ),
)
