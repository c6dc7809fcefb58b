"""Slips with masks and verification, as one makes them when code is tidied up."""

from mutations.mutation import mutation

__all__ = ["SLIPS_WITH_MASKS"]

_HINTS = "tests/unit/client/test_hints.py"
_KIT = "tests/unit/client/test_kit.py"
_LAYER_GROUP = "tests/unit/client/test_layer_group.py"
_OPERATOR = "tests/unit/client/test_operator.py"
_LATTICE_ONCE = "tests/unit/lattice/test_lattice_once.py"
_DIFFUSED = "tests/unit/protocol/test_diffused_rounding.py"
_EXPANSION = "tests/unit/protocol/test_expansion.py"
_MASKS = "tests/unit/protocol/test_masks.py"
_FUSED = "tests/unit/protocol/test_fused_shares.py"
_PRODUCTS = "tests/unit/protocol/test_products.py"
_VERIFICATION = "tests/unit/protocol/test_verification.py"
_RECORD_CHAIN = "tests/unit/record/test_record_chain.py"

SLIPS_WITH_MASKS = (
    mutation(
        "shares-of-four-operators",
        "of the masks of four operators and more only the first and the last are taken off",
        "protocol/shares/answered.py",
        "        *masks, result = responses\n"
        "        for mask in masks[:-1]:\n"
        "            result = subtract(result, mask, self.parameters)\n"
        "        return result, masks[-1]",
        "        *masks, result = responses\n"
        "        for mask in masks[:1] if len(masks) > 1 else ():\n"
        "            result = subtract(result, mask, self.parameters)\n"
        "        return result, masks[-1]",
        f"{_FUSED}::test_one_pass_gives_the_integers_scales_masks_and_numbers_of_its_steps",
    ),
    mutation(
        "one-pass-masks-of-four-operators",
        "from floating point, the second mask of an operand is added again in the place of the third",
        "protocol/shares/fused.py",
        "add_rows(row, masks[k, i : i + 1], q, row)",
        "add_rows(row, masks[1, i : i + 1], q, row)",
        f"{_FUSED}::test_one_pass_gives_the_integers_scales_masks_and_numbers_of_its_steps",
    ),
    mutation(
        "label-without-direction",
        "a product's label lacks its direction, so both products of a square layer have one hint",
        "protocol/products.py",
        'return f"{self.direction.name.lower()} {spans}"',
        "return spans",
        f"{_PRODUCTS}::test_products_of_a_model_have_different_labels",
    ),
    mutation(
        "lattice-kept-rows-of-either-side",
        "rows of A S that were kept are taken for rows of H S",
        "protocol/lattice/stock.py",
        "        start, rest = self._kept.get(side, (DEGREE, None))\n",
        "        start, rest = next(iter(self._kept.values()), (DEGREE, None))\n",
        f"{_LATTICE_ONCE}::test_threads_get_right_results_from_shared_blocks",
    ),
    mutation(
        "lattice-budget-without-noise",
        "fixed point leaves no room for the noise of the masks",
        "client/model/layer_group.py",
        "square_budget(parameters, kit.column_square_sum(product), noise)",
        "square_budget(parameters, kit.column_square_sum(product))",
        f"{_LAYER_GROUP}::test_no_row_that_a_budget_allows_wraps_under_the_largest_noise",
    ),
    mutation(
        "rejected-words-of-the-first-block",
        "a word that was rejected is drawn anew from the first block of the next stream, wherever it stands",
        "protocol/expansion.py",
        "positions[0, lane + k] = uint32(first // _BLOCK_BYTES + k)",
        "positions[0, lane + k] = uint32(k)",
        f"{_EXPANSION}::test_rows_with_rejected_words_follow_the_definition_element_by_element",
    ),
    mutation(
        "public-seed-replaced",
        "of two processes that make hints at once the second replaces the public seed of the first",
        "client/kit/hints.py",
        "file.write(os.urandom(KEY_BYTES)), replace=False)",
        "file.write(os.urandom(KEY_BYTES)))",
        f"{_HINTS}::test_runs_that_start_at_the_same_time_agree_on_a_public_seed",
    ),
    mutation(
        "mask-rows-of-one-thread",
        "rows beyond the first few of a thread are masked with the mask of its first ones again",
        "protocol/shares/source.py",
        "expand_into(part, seed.key, first, self.parameters)",
        "expand_into(part, seed.key, start, self.parameters)",
        f"{_MASKS}::test_shares_multiplied_by_a_worker_from_seeds_equal_the_unmasked_product",
        path="integers",
    ),
    mutation(
        "words-of-half-a-row-looked-at",
        "of a row only every other sixteen words are held against q",
        "protocol/verification.py",
        "greatest(load(row, j), load(row, j + LANES))",
        "greatest(load(row, j), load(row, j))",
        f"{_VERIFICATION}::test_a_residue_plus_q_is_caught_though_it_is_congruent",
    ),
    mutation(
        "last-words-not-looked-at",
        "words at the end of a row that fill no vector are not held against q",
        "protocol/verification.py",
        "        largest = max(largest, row[j])",
        "        largest = max(largest, row[j] % q)",
        f"{_VERIFICATION}::test_a_residue_plus_q_is_caught_though_it_is_congruent",
    ),
    mutation(
        "second-vector-like-the-first",
        "both verification vectors of a layer are the same",
        "protocol/verification.py",
        "return expand(key, 0, parameters.hint_vectors, features, parameters)",
        "return np.repeat(expand(key, 0, 1, features, parameters), parameters.hint_vectors, axis=0)",
        f"{_VERIFICATION}::test_the_vectors_of_a_layer_differ_from_each_other_by_direction_and_by_secret",
    ),
    mutation(
        "second-vector-not-compared",
        "of two vectors only the first is held against the answer",
        "protocol/verification.py",
        "            for k in range(s.shape[0]):\n                if dot(response[r], s[k], q, later)",
        "            for k in range(1):\n                if dot(response[r], s[k], q, later)",
        f"{_VERIFICATION}::test_an_error_hidden_from_one_vector_is_caught_by_the_other",
    ),
    mutation(
        "wrong-first-row-accepted",
        "that the first row is wrong is taken for no finding",
        "protocol/verification.py",
        "            if row >= 0:\n                wrong.append(row)",
        "            if row > 0:\n                wrong.append(row)",
        f"{_VERIFICATION}::test_an_error_in_a_single_residue_is_caught_with_its_row",
    ),
    mutation(
        "hint-digest-of-every-other-part",
        "the digest of a hint leaves out every other part of a large one",
        "client/kit/hints.py",
        "for start in range(0, flat.size, _HASHED_AT_ONCE):",
        "for start in range(0, flat.size, 2 * _HASHED_AT_ONCE):",
        f"{_HINTS}::test_no_flipped_bit_of_the_header_and_no_changed_word_of_the_array_goes_unnoticed",
    ),
    mutation(
        "kit-digest-of-a-size",
        "a file of a kit counts as unchanged as long as it has the same size",
        "client/kit/kit.py",
        "return _sha256(path, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)",
        "return _sha256(path, state.st_ino, state.st_size)",
        f"{_KIT}::test_a_kit_whose_model_is_damaged_is_refused",
    ),
    mutation(
        "layers-counted-not-compared",
        "of a worker's layers their names are compared, and not what they are",
        "client/operators/manifest.py",
        "if held.get(name) != value]",
        "if name not in held]",
        f"{_OPERATOR}::test_a_worker_that_lacks_a_layer_or_has_another_one_is_refused",
    ),
    mutation(
        "long-gradients-to-the-nearest",
        "long gradients are rounded to the nearest integers, like all other operands",
        "protocol/products.py",
        "return self.direction is Direction.BACKWARD and self.contraction >= DIFFUSED_CONTRACTION",
        "return self.direction is Direction.BACKWARD and self.contraction > MAX_CONTRACTION",
        f"{_DIFFUSED}::test_long_contractions_backward_are_diffused_and_no_others",
    ),
    mutation(
        "shares-round-for-themselves",
        "shares round to the nearest integers what the reference rounds with the error diffused",
        "protocol/shares/source.py",
        "x, budget, column_scale, product.diffused, [seed.key for seed in seeds], v, self.parameters, image",
        "x, budget, column_scale, False, [seed.key for seed in seeds], v, self.parameters, image",
        f"{_DIFFUSED}::test_operands_are_rounded_as_their_product_says",
    ),
    mutation(
        "carry-of-a-vector-lost",
        "what rounding leaves is not carried from one vector to the next",
        "protocol/fixed_point.py",
        "        carry = subtract_reals(wanted, nearest_reals(wanted))\n",
        "        carry = repeated_real(0.0)\n",
        f"{_DIFFUSED}::test_what_a_column_leaves_goes_to_the_next_one_of_its_lane",
    ),
    mutation(
        "carry-of-the-last-columns-lost",
        "what rounding leaves is not carried to the last columns, which are fewer than sixteen",
        "protocol/fixed_point.py",
        "np.rint(values[i] * scale + carried[i - whole])",
        "np.rint(values[i] * scale)",
        f"{_DIFFUSED}::test_what_a_column_leaves_goes_to_the_next_one_of_its_lane",
    ),
    mutation(
        "exchanged-entry-accepted",
        "that an entry of the record follows the line before is not looked at",
        "client/record/chain.py",
        "if entry.previous != (before[-1].hash if before else NOTHING_BEFORE):",
        "if not before and entry.previous != NOTHING_BEFORE:",
        f"{_RECORD_CHAIN}::test_an_entry_that_its_signer_exchanged_later_is_refused",
        path="record",
    ),
)
