"""Slips with blocks, lanes, retries and memory, as one makes them when code is tidied up."""

from mutations.mutation import Edit, Mutation, mutation

__all__ = ["SLIPS_WITH_REQUESTS"]

_AHEAD = "tests/unit/client/test_ahead.py"
_KIT = "tests/unit/client/test_kit.py"
_OPERATOR = "tests/unit/client/test_operator.py"
_OPERATOR_BLOCKS = "tests/unit/client/test_operator_blocks.py"
_OPERATOR_LIMITS = "tests/unit/client/test_operator_limits.py"
_OPERATOR_SILENCE = "tests/unit/client/test_operator_silence.py"
_POLICY = "tests/unit/client/test_policy.py"
_POLICY_SILENCE = "tests/unit/client/test_policy_silence.py"
_REMOTE_LINEAR = "tests/unit/client/test_remote_linear.py"
_LATTICE_ONCE = "tests/unit/lattice/test_lattice_once.py"
_MASKS = "tests/unit/protocol/test_masks.py"
_FUSED = "tests/unit/protocol/test_fused_shares.py"
_OPERANDS = "tests/unit/protocol/test_operands.py"
_SERVER_ROTATION = "tests/unit/server/test_server_rotation.py"
_SERVER_ROWS = "tests/unit/server/test_server_rows.py"
_IN_FLIGHT = "tests/unit/training/test_in_flight.py"

SLIPS_WITH_REQUESTS = (
    mutation(
        "seed-rows-of-a-block-cut-twice",
        "a block that is cut again begins at its seed's first row",
        "protocol/operands.py",
        "row_offset=self.seed.row_offset + (start if stop > start else 0)",
        "row_offset=start if stop > start else 0",
        f"{_MASKS}::test_a_block_of_a_shares_rows_goes_to_the_same_operator_and_expands_to_the_same_residues",
    ),
    mutation(
        "last-row-of-a-block-forgotten",
        "a single row that a worker does not take is not asked for",
        "client/operators/lanes.py",
        "            if rest < stop:\n",
        "            if rest < stop - 1:\n",
        f"{_OPERATOR_LIMITS}::test_rows_that_failed_at_a_worker_go_on_in_pieces_to_one_that_takes_fewer",
    ),
    mutation(
        "errors-of-other-lanes-lost",
        "what fails in any lane but the first goes unnoticed, and memory is read as its answer",
        "client/operators/lanes.py",
        "return next((error for error in errors if error is not None), None)",
        "return errors[0]",
        f"{_OPERATOR_BLOCKS}::test_all_blocks_have_ended_when_one_of_them_fails_and_no_other_begins",
    ),
    mutation(
        "lanes-not-awaited-after-an-error",
        "an error of the first lane is raised while others are under way",
        "client/operators/lanes.py",
        "        errors = [first.exception()]\n",
        "        errors = [first.exception()]\n"
        "        if errors[0] is not None:\n"
        "            return errors[0]\n",
        f"{_OPERATOR_BLOCKS}::test_all_blocks_have_ended_when_one_of_them_fails_and_no_other_begins",
    ),
    mutation(
        "worker-block-smaller-than-its-rest",
        "a worker's next block has room for what is still to come, without what the last message holds of it",
        "server/rows.py",
        "missing = remaining + len(chunk)",
        "missing = remaining",
        f"{_SERVER_ROWS}::test_a_word_that_is_no_residue_is_refused_in_every_block",
        path="worker",
    ),
    mutation(
        "scales-of-the-first-span",
        "gradients of a long product's later spans are multiplied by the scales of its first one",
        "client/model/layer_group.py",
        "self._multiply(part, step, self._scales[columns], None)",
        "self._multiply(part, step, self._scales[: part.shape[1]], None)",
        f"{_REMOTE_LINEAR}::test_a_head_wider_than_one_product_is_cut_and_added_up",
    ),
    mutation(
        "bound-of-the-first-span",
        "all spans of a long layer are bounded by the columns of its first one",
        "client/kit/kit.py",
        'self._array(s.layer, f"{name}_{what}")[s.start // MAX_CONTRACTION].astype(np.int64)',
        'self._array(s.layer, f"{name}_{what}")[0].astype(np.int64)',
        f"{_KIT}::test_the_bounds_are_those_of_the_columns_of_every_product",
    ),
    mutation(
        "hedge-of-more-rows-than-a-worker-takes",
        "a replica is asked early for more rows than it takes, and is out for refusing",
        "client/operators/policy.py",
        "and i not in request.failed and request.rows <= request.most[i]:",
        "and i not in request.failed:",
        f"{_POLICY_SILENCE}::test_a_replica_that_is_busy_out_silent_pausing_or_too_small_is_not_asked_early",
    ),
    mutation(
        "gradients-added-as-they-come",
        "gradients of micro-batches in flight are added up in the order in which they end",
        "client/training/in_flight.py",
        "        while (number := len(self._results)) in self._done:\n"
        "            result, gradients = self._done.pop(number)",
        "        while self._done:\n            result, gradients = self._done.pop(next(iter(self._done)))",
        f"{_IN_FLIGHT}::test_results_are_those_of_one_at_a_time_although_the_last_one_ends_first",
    ),
    mutation(
        "seed-columns-of-the-first-part",
        "a part of a part of a seed's columns begins where the first part does",
        "protocol/operands.py",
        "first_column=self.first_column + left",
        "first_column=left",
        f"{_OPERANDS}::test_a_part_of_a_part_is_that_of_the_array",
    ),
    mutation(
        "failed-hedge-accepted",
        "what a replica that was asked early left of an answer is taken though its request failed",
        "client/operators/asking.py",
        "            if not answered and hedge.answered:\n",
        "            if not answered:\n",
        f"{_OPERATOR_SILENCE}::test_when_both_of_the_two_fail_nothing_of_their_answers_is_used",
    ),
    mutation(
        "hedge-after-the-end",
        "an attempt that has ended is looked at, and may be repeated when nobody waits any more",
        "client/operators/asking.py",
        "            if running.has_ended:\n                return\n",
        "",
        f"{_OPERATOR_SILENCE}::test_a_look_that_is_due_as_its_attempt_ends_neither_repeats_it_nor_looks_again",
    ),
    mutation(
        "stop-before-the-call-lost",
        "a stop that comes before the call is made ends nothing",
        "client/operators/transport.py",
        "            called = self.called\n        if called:\n            ends()\n",
        "",
        f"{_OPERATOR_SILENCE}::test_a_request_that_was_stopped_before_it_was_made_ends_when_it_is",
    ),
    mutation(
        "other-operators-not-awaited",
        "when one operator fails the others' requests are still under way as the caller goes on",
        "client/rounds/multiplier.py",
        "                errors = [error for answer in answers if (error := answer.exception())]\n",
        "                errors = [next((e for answer in answers if (e := answer.exception())), None)]\n"
        "                errors = [error for error in errors if error]\n",
        f"{_OPERATOR}::test_no_request_is_left_under_way_when_another_one_fails",
    ),
    mutation(
        "overtaken-stays-in-flight",
        "a worker that was overtaken counts as busy for ever",
        "client/operators/policy.py",
        "        self._workers[attempt.worker].in_flight -= 1\n        return None if attempt.acknowledged",
        "        return None if attempt.acknowledged",
        f"{_POLICY_SILENCE}::test_who_is_overtaken_counts_as_silent_only_if_it_said_nothing",
    ),
    mutation(
        "failed-share-ahead-not-repeated",
        "a share that was asked for ahead and failed is not asked for again",
        "client/rounds/multiplier.py",
        "                    if asked is not None and asked.exception():\n",
        "                    if asked is not None and asked.exception() and not place:\n",
        f"{_AHEAD}::test_what_failed_ahead_is_asked_for_again_with_the_same_bytes",
    ),
    mutation(
        "old-connection-closed-at-once",
        "calls that still run on a connection end when another one takes its place",
        "client/operators/transport.py",
        "            self._retired.append(failed)\n",
        "            failed.close()\n",
        f"{_SERVER_ROTATION}::test_a_request_that_runs_while_the_client_changes_its_connection_is_finished",
        path="failures",
    ),
    mutation(
        "incompatible-again-and-again",
        "a worker that refuses a request for good is asked again until patience ends",
        "client/operators/policy.py",
        "if failure in (Failure.LIED, Failure.INCOMPATIBLE):\n            state.excluded",
        "if failure is Failure.LIED:\n            state.excluded",
        f"{_POLICY}::test_when_all_lied_or_serve_something_else_the_request_ends_at_once",
    ),
    mutation(
        "sleep-counts-against-a-worker",
        "time in which the client's machine slept counts as a worker's silence",
        "client/operators/policy.py",
        "            attempt.started += jump\n            attempt.heard += jump\n",
        "            attempt.started += jump\n",
        f"{_POLICY_SILENCE}::test_time_asleep_is_held_against_no_worker",
        path="failures",
    ),
    mutation(
        "acknowledgement-unheard",
        "a worker that acknowledges a request is heard only when rows come",
        "client/operators/asking.py",
        "                    self._policy.heard(attempt, arrived, started)\n"
        "                    if arrived == verified:\n"
        "                        continue\n",
        "                    if arrived == verified:\n"
        "                        continue\n"
        "                    self._policy.heard(attempt, arrived, started)\n",
        f"{_OPERATOR_SILENCE}::test_a_worker_that_acknowledged_a_request_has_time_to_compute",
    ),
    mutation(
        "attempt-interrupted-stays-in-flight",
        "a worker whose request was interrupted on this side counts as busy for ever",
        "client/operators/asking.py",
        "            # Interrupted: the worker did nothing wrong, but the request is no longer in flight.\n"
        "            with self._lock:\n"
        "                self._policy.abandoned(attempt)\n"
        "            raise\n",
        "            raise\n",
        f"{_OPERATOR}::test_an_interrupted_request_does_not_count_against_the_worker",
        path="failures",
    ),
    mutation(
        "answers-released-before-decoding",
        "memory of answers is handed back before they are decoded",
        "client/rounds/multiplier.py",
        "        result = decode([answer.result() for answer in answers])\n"
        "        for answer in answers:\n"
        "            answer.release()\n"
        "        return result\n",
        "        results = [answer.result() for answer in answers]\n"
        "        for answer in answers:\n"
        "            answer.release()\n"
        "        return decode(results)\n",
        f"{_OPERATOR_BLOCKS}::test_results_of_earlier_products_do_not_change_with_later_ones",
    ),
    mutation(
        "memory-of-another-shape",
        "memory that was handed back serves answers of the same size and another shape",
        "client/operators/buffers.py",
        "if self._kept[place].shape == (rows, columns):",
        "if self._kept[place].size == rows * columns:",
        f"{_OPERATOR}::test_products_at_the_same_time_do_not_get_each_others_answers",
    ),
    Mutation(
        "hedge-memory-back-before-the-copy",
        "memory of a hedge's answer is handed back before the answer is copied from it",
        (
            Edit(
                "client/operators/asking.py",
                "        if hedge is not None and hedge.answer is not None:\n"
                "            if not answered and hedge.answered:\n",
                "        if hedge is not None and hedge.answer is not None:\n"
                "            self._buffers.give(hedge.answer)\n"
                "            if not answered and hedge.answered:\n",
            ),
            Edit(
                "client/operators/asking.py",
                "                    self._statistics.hedges_won += 1\n"
                "            self._buffers.give(hedge.answer)\n",
                "                    self._statistics.hedges_won += 1\n",
            ),
        ),
        (f"{_OPERATOR_SILENCE}::test_a_replica_answers_the_same_bytes_while_the_first_worker_is_silent",),
    ),
    mutation(
        "stale-outputs-in-inference-mode",
        "in inference mode, outputs of a group are handed out though their input was changed meanwhile",
        "client/model/remote_linear.py",
        "self._content = x.clone() if x.is_inference() else None",
        "self._content = x if x.is_inference() else None",
        f"{_REMOTE_LINEAR}::test_a_tensor_that_was_changed_in_place_is_asked_for_again",
    ),
    mutation(
        "memory-of-views-used-again",
        "memory of a large matrix serves the next one while views of the matrix remain",
        "protocol/kernels/recycled.py",
        "    array = np.frombuffer(memory.data, dtype, rows * columns, -memory.ctypes.data % _LINE)\n"
        "    weakref.finalize(array, _keep, memory).atexit = False\n"
        "    return array.reshape(rows, columns)\n",
        "    array = np.frombuffer(memory.data, dtype, rows * columns, -memory.ctypes.data % _LINE)\n"
        "    array = array.reshape(rows, columns)\n"
        "    weakref.finalize(array, _keep, memory).atexit = False\n"
        "    return array\n",
        f"{_FUSED}::test_memory_is_not_used_again_while_any_part_of_a_matrix_is_referred_to",
    ),
    mutation(
        "wide-kept-rows-forgotten-in-the-limit",
        "rows kept for later operands are counted as if they had one column",
        "protocol/lattice/stock.py",
        "if 4 * rows * columns <= room else 0",
        "if 4 * rows <= room else 0",
        f"{_LATTICE_ONCE}::test_kept_rows_stay_within_their_limit_and_go_with_their_blocks",
    ),
    mutation(
        "gradients-mixed-in-flight",
        "a micro-batch that goes on finds the gradients of the one that ran meanwhile",
        "client/training/in_flight.py",
        "        if own is not None:\n            own.restore(self._parameters)\n        else:",
        "        if own is not None:\n            own._random.restore()\n        else:",
        f"{_IN_FLIGHT}::test_gradients_that_a_micro_batch_has_already_wait_with_it",
    ),
    mutation(
        "old-answers-kept-in-memory",
        "memory that is handed back stays beyond its limit, since the newest is counted out",
        "client/operators/buffers.py",
        "            while sum(x.nbytes for x in self._kept) > self._most_bytes:",
        "            while sum(x.nbytes for x in self._kept[:-1]) > self._most_bytes:",
        f"{_OPERATOR_BLOCKS}::test_only_so_much_memory_is_kept_for_answers_and_the_oldest_goes_first",
    ),
    Mutation(
        "lost-hedge-gives-its-memory-back-early",
        "memory of a hedge that lost is handed back while its answer still arrives",
        (
            Edit(
                "client/operators/asking.py",
                "            hedge.overtaken = True\n            hedge.stop()\n",
                "            hedge.overtaken = True\n"
                "            hedge.stop()\n"
                "            if hedge.answer is not None:\n"
                "                self._buffers.give(hedge.answer)\n",
            ),
            Edit(
                "client/operators/asking.py",
                "                    self._statistics.hedges_won += 1\n"
                "            self._buffers.give(hedge.answer)\n",
                "                    self._statistics.hedges_won += 1\n"
                "            if not hedge.overtaken:\n"
                "                self._buffers.give(hedge.answer)\n",
            ),
        ),
        (f"{_OPERATOR_SILENCE}::test_the_first_worker_wins_if_it_answers_before_its_replica",),
    ),
)
