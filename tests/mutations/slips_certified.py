"""Mistakes with certificates: what they keep secret, when they are looked at, and what they accept."""

from mutations.mutation import Edit, Mutation, mutation

__all__ = ["SLIPS_WITH_CERTIFICATES"]

_ROWS = "tests/unit/lattice/test_certified_rows.py"
_DECODING = "tests/unit/certificate/test_decoding.py"
_PRODUCTS = "tests/unit/client/test_certified.py"
_RUN = "tests/unit/training/test_certified_run.py"

SLIPS_WITH_CERTIFICATES: tuple[Mutation, ...] = (
    mutation(
        "certificate-words-on-the-wire",
        "a request names a word u of its product's certificate",
        "client/rounds/multiplier.py",
        "            self.source.parameters.name,\n            product,\n            share,\n",
        '            f"{self.source.parameters.name} {self._kit.certificate(product).u[0]}",\n'
        "            product,\n            share,\n",
        f"{_PRODUCTS}::test_scales_and_words_are_neither_sent_nor_shown_nor_pickled",
    ),
    Mutation(
        "certificate-scale-on-the-wire",
        "how many rows an operand has follows from K",
        (
            Edit(
                "client/rounds/certified.py",
                "        masked, scales = source.hide_reals(x, product, budget,",
                "        x = np.concatenate([x, np.zeros((level, x.shape[1]), np.float32)])\n"
                "        masked, scales = source.hide_reals(x, product, budget,",
            ),
            Edit(
                "client/rounds/certified.py",
                "        return found.values\n",
                "        return found.values[: len(x) - level]\n",
            ),
        ),
        (f"{_PRODUCTS}::test_requests_at_different_scales_differ_in_their_masks_alone",),
        path="training",
    ),
    mutation(
        "certificate-instead-of-verification",
        "answers in a certified parameter set are not verified, since the certificate would notice",
        "client/rounds/multiplier.py",
        "        check = self._check_vectors(product)\n        request = WorkRequest(",
        "        check = self._check_vectors(product)\n"
        "        if self.certified is not None:\n"
        "            accepted = {'verify': lambda *a, **k: None, 'verify_expected': lambda *a, **k: None}\n"
        "            check = type('Accepting', (), {'s': check.s, 'v': check.v, **accepted})()\n"
        "        request = WorkRequest(",
        f"{_PRODUCTS}::test_what_is_asked_again_was_verified_first_at_every_operator",
    ),
    mutation(
        "certificate-scale-moves-within-a-step",
        "K follows from each operand at once, so it depends on how many are under way",
        "protocol/certificate/history.py",
        "            self._open[product.label] = max(min(part, 1.0), self._open.get(product.label, 0.0))\n",
        "            self._open[product.label] = max(min(part, 1.0), self._open.get(product.label, 0.0))\n"
        "            self._levels[product.label] = level_above(self._open[product.label])\n",
        f"{_PRODUCTS}::test_scales_follow_the_last_steps_and_stand_still_within_one",
        path="training",
    ),
    mutation(
        "certificate-scale-follows-evaluation",
        "K follows from what was computed without gradients, too",
        "client/rounds/certified.py",
        "        if counted and part > 0:\n",
        "        if part > 0:\n",
        f"{_RUN}::test_what_has_no_gradients_and_what_takes_no_step_leave_scales_alone",
        path="training",
    ),
    mutation(
        "certificate-scale-of-sixteen-operands",
        "K follows from the last step alone",
        "protocol/certificate/history.py",
        "self._steps[label], self._levels[label] = steps, level_above(max(steps))",
        "self._steps[label], self._levels[label] = steps, level_above(steps[-1])",
        f"{_PRODUCTS}::test_scales_follow_the_last_steps_and_stand_still_within_one",
        path="training",
    ),
    mutation(
        "certificate-of-one-word",
        "wraps are accepted by the word mod 2^64 alone",
        "protocol/certificate/decoding.py",
        "return (short - syndrome) % (1 << 32) == 0 and (long",
        "return (long",
        f"{_DECODING}::test_every_pattern_within_the_bounds_of_the_search_is_found",
        path="certified",
    ),
    mutation(
        "certificate-beyond-cauchy-and-schwarz",
        "wraps are accepted that no row and column of these norms can have",
        "protocol/certificate/decoding.py",
        "        (int(y[j]) + modulus * w) ** 2 <= square * int(words.column_squares[j]) for",
        "        True for",
        f"{_DECODING}::test_every_pattern_within_the_bounds_of_the_search_is_found",
        path="certified",
    ),
    mutation(
        "certificate-wraps-the-other-way",
        "wraps are taken back with the wrong sign",
        "protocol/certificate/certified.py",
        "            result[j] += modulus * times\n",
        "            result[j] -= modulus * times\n",
        f"{_ROWS}::test_every_row_that_wraps_is_corrected_or_flagged_and_never_wrong",
        path="certified",
    ),
    mutation(
        "certificate-without-the-noise",
        "in lattice, what is certified is the operand without the noise that is multiplied with it",
        "protocol/lattice/fused.py",
        "            sums = low_products(sums, words, load(image, i))\n",
        "            sums = low_products(sums, load(integers, i), load(image, i))\n",
        f"{_ROWS}::test_every_row_that_wraps_is_corrected_or_flagged_and_never_wrong",
    ),
    mutation(
        "reask-under-the-same-mask",
        "what is asked for again hides under the seeds of the first operand",
        "client/rounds/certified.py",
        "            again = self._ask_again(",
        "            from blindtune.protocol.masks import Share\n"
        "            from blindtune.protocol.operands import SeededRows\n"
        "            twice = 2 * len(found.flagged)\n"
        "            if source.operators > 1:\n"
        "                seeds = [(x.recipient, x.seed) for x in masked.shares if x.seed]\n"
        "                rows = [(i, SeededRows(seed, twice, product.contraction)) for i, seed in seeds]\n"
        "                source._ahead.put(product, twice, tuple(Share(i, x) for i, x in rows))\n"
        "            again = self._ask_again(",
        f"{_PRODUCTS}::test_a_row_is_asked_for_again_as_two_rows_of_a_new_operand_under_a_new_mask",
        path="certified",
    ),
    mutation(
        "reask-counted-after-it-was-sent",
        "more rows than allowed are asked for again before the run stops",
        "client/rounds/certified.py",
        "        self._count_reasks(len(rows))\n        masked, scales = source.hide_reals_twice(\n",
        "        masked, scales = source.hide_reals_twice(\n",
        f"{_PRODUCTS}::test_more_rows_than_may_be_asked_again_stop_the_run_before_they_are",
        path="certified",
    ),
    mutation(
        "reask-accepts-damage",
        "a row that is not certified at the proven scale is used all the same",
        "client/rounds/certified.py",
        "        if again.flagged.size:\n",
        "        if False:\n",
        f"{_PRODUCTS}::test_a_changed_hint_always_stops_the_run",
        path="certified",
    ),
    mutation(
        "reask-of-one-row",
        "what rounding left of a row that is asked for again is lost",
        "client/rounds/certified.py",
        "again.values[: len(rows)] + again.values[len(rows) :]",
        "again.values[: len(rows)]",
        f"{_PRODUCTS}::test_whatever_wraps_shares_give_the_references_bits_and_both_the_product",
        path="certified",
    ),
    mutation(
        "checkpoint-without-scales",
        "a certified run goes on from a checkpoint without scales as if it had just begun",
        "client/training/scales.py",
        "    if not path.exists():\n",
        "    if not path.exists():\n        return\n    if False:\n",
        f"{_RUN}::test_a_checkpoint_without_scales_is_refused_by_a_certified_run",
        path="certified",
    ),
)
