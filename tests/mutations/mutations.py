"""The mistakes: what somebody could do wrong in each part of the protocol."""

from mutations.kept import KEPT
from mutations.mutation import Edit, Mutation
from mutations.mutation import mutation as _one
from mutations.slips_certified import SLIPS_WITH_CERTIFICATES
from mutations.slips_masks import SLIPS_WITH_MASKS
from mutations.slips_requests import SLIPS_WITH_REQUESTS
from mutations.slips_runs import SLIPS_WITH_RUNS

__all__ = ["MUTATIONS"]

_MASKS = "tests/unit/protocol/test_masks.py"
_FUSED = "tests/unit/protocol/test_fused_shares.py"
_EXPANSION = "tests/unit/protocol/test_expansion.py"
_RESIDUES = "tests/unit/protocol/test_residues.py"
_VERIFICATION = "tests/unit/protocol/test_verification.py"
_ONCE = "tests/unit/lattice/test_lattice_once.py"
_SOURCE = "tests/unit/lattice/test_lattice_source.py"
_OPERATOR = "tests/unit/client/test_operator.py"
_BLOCKS = "tests/unit/client/test_operator_blocks.py"
_POLICY = "tests/unit/client/test_policy.py"
_SILENT = "tests/unit/client/test_operator_silence.py"
_PATIENCE = "tests/unit/client/test_policy_silence.py"
_LIMITS = "tests/unit/client/test_operator_limits.py"
_SIMULATED = "tests/simulation/test_schedules.py"
_AHEAD = "tests/unit/protocol/test_masks_ahead.py"
_ASKED_AHEAD = "tests/unit/client/test_ahead.py"
_HINTS = "tests/unit/client/test_hints.py"
_TRUST = "tests/unit/client/test_trust.py"
_KIT = "tests/unit/client/test_kit.py"
_CONFIG = "tests/unit/client/test_config.py"
_SERVICE = "tests/unit/server/test_server_service.py"
_TOKENS = "tests/unit/server/test_server_tokens.py"
_TRANSPORT = "tests/unit/server/test_server_transport.py"
_RANDOMNESS = "tests/unit/client/test_randomness.py"
_COMPARED = "tests/unit/client/test_secrets_compared.py"
_UNHIDDEN = "tests/unit/protocol/test_unhidden_operands.py"
_SILENCE = "tests/unit/protocol/test_silence.py"
_WIRE = "tests/unit/client/test_request_content.py"
_GROUP = "tests/unit/client/test_layer_group.py"

_SHARES = (
    _one(
        "shares-fixed-seed",
        "every mask comes from one fixed secret",
        "protocol/shares/source.py",
        "secret = self._random_bytes(KEY_BYTES)",
        "secret = bytes(KEY_BYTES)",
        f"{_MASKS}::test_equal_operands_of_equal_products_never_share_a_mask",
    ),
    _one(
        "shares-cached-seed",
        "the secret is drawn once and kept for all operands",
        "protocol/shares/source.py",
        "secret = self._random_bytes(KEY_BYTES)",
        'secret = self.__dict__.setdefault("_secret", self._random_bytes(KEY_BYTES))',
        f"{_MASKS}::test_equal_operands_of_equal_products_never_share_a_mask",
    ),
    _one(
        "shares-seed-of-the-operand",
        "the secret is a hash of the operand, so equal operands look equal",
        "protocol/shares/source.py",
        "        seeds, ahead = self._drawn(rows, product)\n        masked = np.empty(",
        '        secret = __import__("hashlib").sha256(operand.tobytes()).digest()\n'
        "        self._random_bytes = lambda size: secret\n"
        "        seeds, ahead = self._drawn(rows, product)\n        masked = np.empty(",
        f"{_MASKS}::test_seeds_do_not_depend_on_the_operand_and_the_last_share_is_operand_plus_masks",
        f"{_MASKS}::test_equal_operands_of_equal_products_never_share_a_mask",
        path="integers",
    ),
    _one(
        "shares-prefetched-randomness",
        "random bytes are fetched in advance, and a forked child has the same ones",
        "protocol/shares/source.py",
        "        self._random_bytes = random_bytes\n",
        "        fetched = [random_bytes(KEY_BYTES) for _ in range(100)]\n"
        "        self._random_bytes = lambda size: fetched.pop() if fetched else random_bytes(size)\n",
        f"{_MASKS}::test_a_forked_child_and_its_parent_draw_different_masks",
    ),
    _one(
        "shares-ahead-mask-stays",
        "a mask drawn ahead stays in stock and hides the next operand too",
        "protocol/shares/masks_ahead.py",
        "                    del self._waiting[place]\n",
        "",
        f"{_AHEAD}::test_a_mask_drawn_ahead_hides_one_operand",
        f"{_AHEAD}::test_threads_never_get_the_same_mask",
    ),
    _one(
        "shares-ahead-mask-of-any-product",
        "a mask drawn ahead for one product hides an operand of another",
        "protocol/shares/masks_ahead.py",
        "if (its_product, its_rows) == (product, rows):",
        "if its_rows == rows:",
        f"{_AHEAD}::test_an_operand_of_another_product_or_number_of_rows_gets_another_mask",
    ),
    _one(
        "shares-ahead-mask-of-any-rows",
        "a mask drawn ahead for some rows hides an operand of others",
        "protocol/shares/masks_ahead.py",
        "if (its_product, its_rows) == (product, rows):",
        "if its_product == product:",
        f"{_AHEAD}::test_an_operand_of_another_product_or_number_of_rows_gets_another_mask",
    ),
    _one(
        "shares-ahead-survives-a-fork",
        "a forked child hides an operand under a mask that its parent drew ahead",
        "protocol/shares/masks_ahead.py",
        "return self if self._process is this_process() else MasksAhead(self._most)",
        "return self",
        f"{_AHEAD}::test_another_process_has_none_of_the_masks",
        f"{_AHEAD}::test_a_forked_child_and_its_parent_never_use_the_same_mask_drawn_ahead",
    ),
    _one(
        "shares-ahead-answer-of-any-share",
        "the answer to whatever share was asked for last is taken for this one's",
        "client/rounds/answers_ahead.py",
        "return self._pending.pop(share, None)",
        "return self._pending.popitem()[1] if self._pending else None",
        f"{_ASKED_AHEAD}::test_a_mask_for_other_rows_waits_for_an_operand_that_has_as_many",
    ),
    _one(
        "shares-numpy-randomness",
        "secrets come from NumPy's generator, whose state a forked child inherits",
        "protocol/shares/source.py",
        "random_bytes: RandomBytes = os.urandom",
        'random_bytes: RandomBytes = __import__("numpy").random.bytes',
        f"{_MASKS}::test_a_forked_child_and_its_parent_draw_different_masks",
    ),
    _one(
        "shares-python-randomness",
        "secrets come from Python's Mersenne Twister",
        "protocol/shares/source.py",
        "random_bytes: RandomBytes = os.urandom",
        'random_bytes: RandomBytes = __import__("random").randbytes',
        f"{_RANDOMNESS}::test_masks_are_drawn_from_the_operating_system",
    ),
    _one(
        "shares-one-seed-for-all",
        "seeds are derived without the recipient, so two operators get the same one",
        "protocol/shares/source.py",
        "*label, str(recipient), product.label",
        "*label, product.label",
        f"{_MASKS}::test_one_secret_gives_every_operator_product_and_row_count_its_own_key",
    ),
    _one(
        "shares-no-product-in-the-label",
        "seeds are derived without the product",
        "protocol/shares/source.py",
        "str(recipient), product.label, str(rows)",
        "str(recipient), str(rows)",
        f"{_MASKS}::test_one_secret_gives_every_operator_product_and_row_count_its_own_key",
    ),
    _one(
        "shares-secret-sent-as-seed",
        "the secret itself is sent, and not a key derived from it",
        "protocol/shares/source.py",
        "Seed(derive_key(secret, *label, str(recipient), product.label, str(rows)), self.parameters)",
        "Seed(secret, self.parameters)",
        f"{_MASKS}::test_one_secret_gives_every_operator_product_and_row_count_its_own_key",
    ),
    _one(
        "shares-narrow-mask",
        "a mask covers the low 16 bits only",
        "protocol/shares/source.py",
        "hide(operand[some], parts, self.parameters, masked[some])",
        "hide(operand[some], [part & 0xFFFF for part in parts], self.parameters, masked[some])",
        f"{_MASKS}::test_every_share_of_a_constant_operand_looks_uniform",
        path="integers",
    ),
    _one(
        "shares-zero-rows-in-the-clear",
        "rows of zeros get no mask",
        "protocol/shares/source.py",
        "hide(operand[some], parts, self.parameters, masked[some])",
        "hide(operand[some], [x * operand[some].any(axis=1)[:, None] for x in parts], "
        "self.parameters, masked[some])",
        f"{_MASKS}::test_every_share_of_a_constant_operand_looks_uniform",
        path="integers",
    ),
    _one(
        "shares-zeros-in-the-clear",
        "single zeros get no mask",
        "protocol/shares/source.py",
        "hide(operand[some], parts, self.parameters, masked[some])",
        "hide(operand[some], [part * (operand[some] != 0) for part in parts], self.parameters, masked[some])",
        f"{_MASKS}::test_every_share_of_a_constant_operand_looks_uniform",
        path="integers",
    ),
    _one(
        "shares-both-to-one-operator",
        "the masked operand goes to the operator that holds the seed",
        "protocol/shares/source.py",
        "Share(self.operators - 1, masked, ",
        "Share(0, masked, ",
        f"{_MASKS}::test_every_operator_gets_one_share_and_only_the_last_one_without_a_seed",
    ),
    _one(
        "shares-seed-beside-the-rows",
        "the share that is to be sent as rows is the first one's seed",
        "protocol/shares/source.py",
        "Share(self.operators - 1, masked, ",
        "Share(self.operators - 1, shares[0].operand, ",
        f"{_MASKS}::test_every_operator_gets_one_share_and_only_the_last_one_without_a_seed",
    ),
    _one(
        "shares-one-operator-is-enough",
        "a single operator is accepted, and gets the operand in the clear",
        "protocol/shares/source.py",
        "if operators < 2:",
        "if operators < 1:",
        f"{_MASKS}::test_sharing_with_fewer_than_two_operators_is_refused",
    ),
    _one(
        "source-pickled",
        "a mask source can be pickled",
        "protocol/masks.py",
        'raise TypeError("a mask source cannot be pickled: a copy of it could use a mask twice")',
        "return object.__reduce_ex__(self, 2)",
        f"{_MASKS}::test_a_source_is_not_pickled_alone_or_inside_something",
        path="refusals",
    ),
    _one(
        "operand-pickled",
        "a masked operand can be pickled, mask and all",
        "protocol/masks.py",
        'raise TypeError("a masked operand cannot be pickled: it holds a mask")',
        "return object.__reduce_ex__(self, 2)",
        f"{_MASKS}::test_a_masked_operand_is_not_pickled",
        path="refusals",
    ),
    _one(
        "share-shown",
        "the words of a share are part of what is printed of it",
        "protocol/masks.py",
        'return f"Share(recipient={self.recipient}, shape={self.shape})"',
        'return f"Share(recipient={self.recipient}, residues={self.residues})"',
        f"{_MASKS}::test_nothing_that_is_printed_shows_a_secret",
        path="refusals",
    ),
    _one(
        "seed-shown",
        "a seed's key is part of what is printed of it",
        "protocol/expansion.py",
        "key: bytes = field(repr=False)",
        "key: bytes = field()",
        f"{_MASKS}::test_nothing_that_is_printed_shows_a_secret",
    ),
    _one(
        "operand-not-held",
        "the words held for a retry can be changed in between",
        "protocol/masks.py",
        "                array.flags.writeable = False\n",
        "                pass\n",
        f"{_MASKS}::test_the_residues_held_for_a_retry_cannot_be_changed",
    ),
)

_ONE_PASS = (
    _one(
        "one-pass-narrow-mask",
        "from floating point, a mask covers the low 16 bits only",
        "protocol/shares/fused.py",
        "            row, expected = masked[r : r + 1], uint64(0)\n",
        "            row, expected = masked[r : r + 1], uint64(0)\n            masks[0] &= 0xFFFF\n",
        f"{_FUSED}::test_shares_of_constant_rows_look_uniform",
    ),
    _one(
        "one-pass-seed-of-the-operand",
        "from floating point, the secret is a hash of the operand, so equal operands look equal",
        "protocol/shares/source.py",
        "        seeds, ahead = self._drawn(rows, product)\n        masked, scales,",
        '        secret = __import__("hashlib").sha256(x.tobytes()).digest()\n'
        "        self._random_bytes = lambda size: secret\n"
        "        seeds, ahead = self._drawn(rows, product)\n        masked, scales,",
        f"{_FUSED}::test_two_operands_never_share_a_mask",
    ),
    _one(
        "one-pass-zeros-in-the-clear",
        "from floating point, rows of zeros get no mask",
        "protocol/shares/fused.py",
        "            row, expected = masked[r : r + 1], uint64(0)\n",
        "            row, expected = masked[r : r + 1], uint64(0)\n"
        "            masks[0] *= np.uint32(np.isfinite(scales[r]))\n",
        f"{_FUSED}::test_shares_of_constant_rows_look_uniform",
    ),
    _one(
        "one-pass-mask-of-the-first-rows",
        "from floating point, all rows that are expanded together begin at the mask's first row",
        "protocol/shares/fused.py",
        "expand_rows(states[0], uint64(start),",
        "expand_rows(states[0], uint64(0),",
        f"{_FUSED}::test_many_rows_in_threads_give_the_same",
    ),
    _one(
        "one-pass-expected-wraps-around",
        "from floating point, dot products are taken from int64 though it does not hold them",
        "protocol/shares/fused.py",
        "fits = dots_fit(budget, columns, parameters)",
        "fits = True",
        f"{_FUSED}::test_numbers_are_exact_on_both_sides_of_where_int64_holds_them",
    ),
    _one(
        "one-pass-beyond-q",
        "from floating point, a budget may allow for integers that no mask hides",
        "protocol/shares/fused.py",
        "if budget > parameters.half**2:",
        "if budget < 0:",
        f"{_FUSED}::test_a_budget_beyond_what_a_mask_hides_is_refused",
    ),
    _one(
        "one-pass-memory-used-too-early",
        "memory of a matrix is used again while rows of it are still referred to",
        "protocol/kernels/recycled.py",
        "weakref.finalize(array, _keep, memory)",
        "weakref.finalize(matrix := array.reshape(rows, columns), _keep, memory)",
        f"{_FUSED}::test_memory_is_not_used_again_while_any_part_of_a_matrix_is_referred_to",
    ),
)

_UNIFORMITY = (
    _one(
        "words-mod-q",
        "words are reduced mod q, and not rejected: small residues are twice as likely",
        "protocol/expansion.py",
        "        elif key_stream(state, words, bits, read, written, at) >= q:\n",
        "        elif key_stream(state, words, bits, read, written, at) >= 0:\n"
        "            for i in range(words.shape[0]):\n"
        "                words[i] %= q\n",
        f"{_EXPANSION}::test_rows_with_rejected_words_follow_the_definition_element_by_element",
    ),
    _one(
        "top-bit-not-cleared",
        "words have 32 bits and not 31",
        "protocol/parameters.py",
        "np.uint32((1 << self.modulus.bit_length()) - 1)",
        "np.uint32(0xFFFFFFFF)",
        f"{_EXPANSION}::test_expand_gives_the_keystream_of_rfc_8439",
    ),
    _one(
        "rejection-off-by-one",
        "q itself counts as a residue",
        "protocol/expansion.py",
        "        if words[i] >= q:\n",
        "        if words[i] > q:\n",
        f"{_EXPANSION}::test_a_word_equal_to_q_is_rejected_and_q_minus_1_is_kept",
    ),
    _one(
        "mask-of-24-bits",
        "masks are narrower than q on both sides, so that results are right",
        "protocol/expansion.py",
        "        elif key_stream(state, words, bits, read, written, at) >= q:\n",
        "        elif key_stream(state, words, bits & uint32(0x7FFFFF), read, written, at) >= q:\n",
        f"{_MASKS}::test_every_share_of_a_constant_operand_looks_uniform",
    ),
    _one(
        "mask-of-16-bits",
        "masks have 16 bits on both sides",
        "protocol/expansion.py",
        "        elif key_stream(state, words, bits, read, written, at) >= q:\n",
        "        elif key_stream(state, words, bits & uint32(0xFFFF), read, written, at) >= q:\n",
        f"{_MASKS}::test_every_share_of_a_constant_operand_looks_uniform",
    ),
    _one(
        "mask-in-floating-point",
        "masks are drawn in float32 and rounded, which leaves their low bits zero",
        "protocol/expansion.py",
        "        elif key_stream(state, words, bits, read, written, at) >= q:\n",
        "        elif key_stream(state, words, bits, read, written, at) >= 0:\n"
        "            for i in range(words.shape[0]):\n"
        "                words[i] = uint32(np.float32(words[i]) * np.float32((2147389441 - 129) / 2**31))\n",
        f"{_MASKS}::test_every_share_of_a_constant_operand_looks_uniform",
    ),
    _one(
        "one-mask-for-all-rows",
        "the row is missing from the nonce, so all rows of an operand have one mask",
        "protocol/expansion.py",
        "uint64(first_row) + uint64(r), (np.int64(first_row) + r) * columns\n",
        "uint64(0), (np.int64(first_row) + r) * columns\n",
        f"{_MASKS}::test_equal_operands_of_equal_products_never_share_a_mask",
    ),
    _one(
        "labels-run-together",
        "the parts of a label are hashed without their lengths, so that different labels collide",
        "protocol/expansion.py",
        'info.update(len(encoded).to_bytes(8, "little") + encoded)',
        "info.update(encoded)",
        f"{_EXPANSION}::test_labels_that_read_alike_give_different_keys",
    ),
    _one(
        "another-modulus",
        "q is the Mersenne prime 2^31 - 1",
        "protocol/parameters.py",
        "modulus=2147389441",
        "modulus=2147483647",
        f"{_RESIDUES}::test_the_modulus_is_the_31_bit_prime_of_the_design",
    ),
    _one(
        "operand-beyond-q",
        "integers that no mask hides are masked nevertheless",
        "protocol/shares/source.py",
        "        if exposed:\n",
        "        if False:\n",
        f"{_UNHIDDEN}::test_an_integer_that_no_mask_hides_is_refused",
        path="integers",
    ),
)

_BLOCK_SECRET = "block = _Block(self._parameters, product, self._random_bytes(KEY_BYTES))"
_LATTICE = (
    _one(
        "lattice-row-twice",
        "the last row of an operand is handed out again",
        "protocol/lattice/stock.py",
        "block.drawn += run.count",
        "block.drawn += run.count - 1",
        f"{_ONCE}::test_short_operands_get_the_rows_of_a_block_in_order",
    ),
    _one(
        "lattice-block-twice",
        "a block begins anew when it is used up",
        "protocol/lattice/stock.py",
        "block.drawn += run.count\n                block.shared = row >= own\n"
        "                if block.shared and block.drawn < DEGREE:\n",
        "block.drawn = (block.drawn + run.count) % DEGREE\n                block.shared = row >= own\n"
        "                if block.shared:\n",
        f"{_ONCE}::test_operands_across_block_borders_get_each_row_once",
    ),
    _one(
        "lattice-leftover-rows-for-everyone",
        "rows left over of an operand's own blocks mask the next operand, which may depend on their noise",
        "protocol/lattice/stock.py",
        "if row >= own else None",
        "if rows else None",
        f"{_ONCE}::test_whole_blocks_and_last_ones_with_little_left_serve_one_operand",
    ),
    _one(
        "lattice-fixed-secret",
        "every block has the same secret",
        "protocol/lattice/stock.py",
        _BLOCK_SECRET,
        "block = _Block(self._parameters, product, bytes(KEY_BYTES))",
        f"{_ONCE}::test_operands_across_block_borders_get_each_row_once",
    ),
    Mutation(
        "lattice-secret-from-the-public-seed",
        "S and E are expanded from the public seed, with a counter",
        (
            Edit(
                "protocol/lattice/source.py",
                "self._stock = Stock(parameters, random_bytes, kept_bytes)",
                "calls = iter(range(1 << 60))\n"
                "        self._stock = Stock(\n"
                "            parameters, lambda n: derive_key(public_seed, str(next(calls))), kept_bytes\n"
                "        )",
            ),
            Edit(
                "protocol/lattice/source.py",
                "import RandomBytes\n",
                "import RandomBytes, derive_key\n",
            ),
        ),
        (f"{_ONCE}::test_two_sources_with_one_public_seed_share_nothing",),
    ),
    _one(
        "lattice-numpy-randomness",
        "secrets come from NumPy's generator, whose state a forked child inherits",
        "protocol/lattice/source.py",
        "random_bytes: RandomBytes = os.urandom",
        "random_bytes: RandomBytes = np.random.bytes",
        f"{_RANDOMNESS}::test_masks_are_drawn_from_the_operating_system",
    ),
    _one(
        "lattice-zero-noise",
        "E is zero, so that S follows by linear algebra",
        "protocol/lattice/source.py",
        "run.noise(noise[run.rows])",
        "noise[run.rows] = 0",
        f"{_SOURCE}::test_the_masked_operand_is_the_operand_and_a_s_and_e",
        path="integers",
    ),
    _one(
        "lattice-reals-zero-noise",
        "from floating point, no noise is added: A S is a linear system",
        "protocol/lattice/fused.py",
        "            scales[r] = quantize_row(",
        "            noise[:] = 0\n            scales[r] = quantize_row(",
        f"{_SOURCE}::test_real_numbers_are_hidden_like_the_integers_they_are_rounded_to",
    ),
    _one(
        "lattice-reals-noise-of-each-operand-alike",
        "from floating point, E is drawn from its first row on for every operand of a block",
        "protocol/lattice/fused.py",
        "uint32((runs[run, 1] + r - runs[run, 0]) * width * LANES)",
        "uint32((r - runs[run, 0]) * width * LANES)",
        f"{_SOURCE}::test_real_numbers_are_hidden_like_the_integers_they_are_rounded_to",
    ),
    _one(
        "lattice-noise-for-new-rows-only",
        "rows whose mask was computed along with earlier ones get no E",
        "protocol/lattice/source.py",
        "run.noise(noise[run.rows])",
        'noise[run.rows] = 0\n            if run.block.kept("mask", run.first, run.count) is None:\n'
        "                run.noise(noise[run.rows])",
        f"{_ONCE}::test_kept_and_computed_rows_give_the_same_bytes_and_results",
        f"{_ONCE}::test_short_operands_get_the_rows_of_a_block_in_order",
        path="integers",
    ),
    _one(
        "lattice-kept-rows-without-a-mask",
        "rows whose mask was computed along with earlier ones get only its noise",
        "protocol/lattice/source.py",
        "masks[rows] = kept",
        "masks[rows] = 0",
        f"{_ONCE}::test_kept_and_computed_rows_give_the_same_bytes_and_results",
    ),
    _one(
        "lattice-real-numbers-without-noise",
        "from floating point, operands get no E",
        "protocol/lattice/fused.py",
        "words = add(load(integers, i), load_bytes(noise, i))",
        "words = load(integers, i)",
        f"{_SOURCE}::test_real_numbers_are_hidden_like_the_integers_they_are_rounded_to",
    ),
    _one(
        "lattice-expected-of-the-first-vector",
        "what is expected of answers is computed with the first verification vector for ever",
        "protocol/lattice/source.py",
        "if known is None or not np.array_equal(known, v):",
        "if known is None:",
        f"{_SOURCE}::test_another_vector_gives_other_numbers_even_in_the_same_memory",
    ),
    _one(
        "lattice-expected-of-a-vector-that-changes",
        "the vector that numbers belong to is compared with itself",
        "protocol/lattice/source.py",
        "known = v.copy()",
        "known = v",
        f"{_SOURCE}::test_another_vector_gives_other_numbers_even_in_the_same_memory",
    ),
    _one(
        "lattice-expected-wraps-around",
        "dot products with noisy integers are taken from int64 though it does not hold them",
        "protocol/lattice/source.py",
        "noisy_dots_fit(budget, eta, columns, self.parameters)",
        "noisy_dots_fit(1, eta, columns)",
        f"{_SOURCE}::test_what_is_expected_is_exact_up_to_the_largest_budget_for_it",
    ),
    _one(
        "lattice-small-noise",
        "E has eta = 2, which is too little",
        "protocol/lattice/parameters.py",
        "    rank=5,\n    eta=21,",
        "    rank=5,\n    eta=2,",
        "tests/unit/lattice/test_lattice_parameters.py"
        "::test_the_stated_core_svp_figures_are_those_of_the_primal_attack",
        "tests/unit/lattice/test_lattice_parameters.py"
        "::test_no_set_but_the_published_ones_can_be_selected_by_name",
        "tests/unit/lattice/test_lattice_parameters.py::test_rank_4_and_eta_2_are_weaker_than_what_is_offered",
    ),
    _one(
        "lattice-small-secret",
        "S is drawn with eta = 1",
        "protocol/lattice/stock.py",
        "parameters.rank, DEGREE, parameters.eta)",
        "parameters.rank, DEGREE, 1)",
        f"{_SOURCE}::test_the_masked_operand_is_the_operand_and_a_s_and_e",
    ),
    _one(
        "lattice-one-noise-for-all-blocks",
        "the key of E does not depend on the block's secret, so two blocks have the same E",
        "protocol/lattice/stock.py",
        'self.noise_key = derive_key(secret, *label, "E")',
        'self.noise_key = derive_key(bytes(KEY_BYTES), *label, "E")',
        f"{_SOURCE}::test_the_masked_operand_is_the_operand_and_a_s_and_e",
        f"{_ONCE}::test_short_operands_get_the_rows_of_a_block_in_order",
    ),
    _one(
        "lattice-noise-of-each-operand-alike",
        "E is drawn from its first row on for every operand of a block",
        "protocol/lattice/stock.py",
        "centred_binomial(self.block.noise_key, self.first, ",
        "centred_binomial(self.block.noise_key, 0, ",
        f"{_ONCE}::test_short_operands_get_the_rows_of_a_block_in_order",
        path="integers",
    ),
    _one(
        "lattice-one-key-for-s-and-e",
        "S and E are expanded from one key",
        "protocol/lattice/stock.py",
        'derive_key(secret, *label, "E")',
        'derive_key(secret, *label, "S")',
        f"{_SOURCE}::test_the_masked_operand_is_the_operand_and_a_s_and_e",
    ),
    _one(
        "lattice-no-direction-in-the-label",
        "under a secret that repeats, S is the same forward and backward",
        "protocol/lattice/stock.py",
        'label = "lattice", parameters.name, product.label',
        'label = "lattice", parameters.name, product.label.partition(" ")[2]',
        f"{_ONCE}::test_every_product_has_blocks_of_its_own",
    ),
    Mutation(
        "lattice-block-for-both-directions",
        "forward and backward products of a layer take rows of one block, under one S",
        (
            Edit(
                "protocol/lattice/stock.py",
                "self._blocks.pop(product, None)",
                "self._blocks.pop(product.spans[0].layer, None)",
            ),
            Edit(
                "protocol/lattice/stock.py",
                "self._blocks[product] = block",
                "self._blocks[product.spans[0].layer] = block",
            ),
        ),
        (f"{_ONCE}::test_every_product_has_blocks_of_its_own",),
    ),
    _one(
        "seed-rows-of-the-first-block",
        "a worker multiplies a seed's first rows in place of later ones",
        "protocol/operands.py",
        "row_offset=self.seed.row_offset + (start if stop > start else 0)",
        "row_offset=self.seed.row_offset",
        f"{_SERVICE}::test_4097_rows_of_a_seed_are_those_of_one_expansion",
    ),
    _one(
        "lattice-stock-survives-a-fork",
        "a forked child takes rows out of its parent's blocks",
        "protocol/lattice/stock.py",
        "if self._process is this_process():",
        "if self._process:",
        f"{_ONCE}::test_a_forked_child_takes_nothing_from_its_parents_stock",
    ),
    Mutation(
        "lattice-fork-goes-unnoticed",
        "nothing tells a forked child from its parent",
        (
            Edit(
                "protocol/kernels/process.py",
                "    os.register_at_fork(after_in_child=_become_another)\n",
                "    pass\n",
            ),
            Edit("protocol/kernels/process.py", "if os.getpid() != _number:", "if False:"),
        ),
        (f"{_ONCE}::test_a_forked_child_takes_nothing_from_its_parents_stock",),
    ),
    Mutation(
        "lattice-stock-copied",
        "a deep copy has blocks of its own, with the same rows left",
        (
            Edit(
                "protocol/masks.py",
                "    def __deepcopy__(self, memo: object) -> Self:\n        return self\n",
                "    def __deepcopy__(self, memo: object) -> Self:\n"
                '        copy = __import__("copy")\n'
                "        twin = object.__new__(type(self))\n"
                "        twin.__dict__ |= self.__dict__\n"
                '        if stock := self.__dict__.get("_stock"):\n'
                "            twin._stock = copy.copy(stock)\n"
                "            twin._stock._blocks = {k: copy.copy(v) for k, v in stock._blocks.items()}\n"
                "        return twin\n",
            ),
        ),
        (f"{_ONCE}::test_a_deep_copy_takes_from_the_same_stock",),
        path="refusals",
    ),
    _one(
        "lattice-source-pickled",
        "a mask source can be pickled, its stock too",
        "protocol/masks.py",
        'raise TypeError("a mask source cannot be pickled: a copy of it could use a mask twice")',
        'return type(self), (self.lattice, self._public._seed.key, self._hints), {"_stock": None}',
        f"{_SOURCE}::test_neither_source_nor_masked_operand_is_pickled",
        path="refusals",
    ),
    _one(
        "lattice-unmasked-twice",
        "an operand can be unmasked again, with another answer",
        "protocol/lattice/source.py",
        "runs, self._runs = self._runs, None",
        "runs = self._runs",
        f"{_SOURCE}::test_an_operand_is_unmasked_once_and_its_secrets_go_with_it",
    ),
    _one(
        "lattice-operand-beyond-q",
        "integers that no mask hides are masked nevertheless",
        "protocol/lattice/source.py",
        "        if not add_operand(operand, noise, self.parameters, masked):\n",
        "        if add_operand(operand, noise, self.parameters, masked) is None:\n",
        f"{_UNHIDDEN}::test_an_integer_that_no_mask_hides_is_refused",
        path="integers",
    ),
    Mutation(
        "lattice-rows-given-back",
        "an operand that failed gives its rows back, though they were sent",
        (
            Edit(
                "client/rounds/multiplier.py",
                "            if errors:\n",
                "            if errors:\n"
                '                for run in getattr(masked, "_runs", None) or ():\n'
                "                    run.block.drawn = run.first\n"
                "                    masked._stock._blocks[product] = run.block\n",
            ),
        ),
        ("tests/e2e/test_lattice.py::test_an_operand_that_failed_for_good_does_not_give_its_rows_back",),
    ),
)

_RETRIES = (
    Mutation(
        "retry-with-fresh-noise",
        "a repeated request has noise drawn anew under the same secret, and their difference tells",
        (
            Edit(
                "client/operators/asking.py",
                "                self._statistics.retries += bool(wanted.failed)\n",
                "                self._statistics.retries += bool(wanted.failed)\n"
                "            if wanted.failed and request.share.seed is None:\n"
                "                fresh = np.random.default_rng().integers(-21, 22, request.share.shape)\n"
                "                fresh = (fresh + request.share.residues) % 2147389441\n"
                "                share = Share(request.share.recipient, fresh.astype(np.uint32))\n"
                "                question = replace(question, request=replace(request, share=share))\n",
            ),
        ),
        (f"{_OPERATOR}::test_a_retry_sends_the_same_bytes_to_every_worker",),
    ),
    _one(
        "retry-with-a-new-mask",
        "an operand whose operators failed is masked again by the multiplier",
        "client/rounds/multiplier.py",
        "                raise errors[0]\n",
        "                from blindtune.protocol.residues import centre, subtract\n\n"
        "                operand = masked.shares[-1].residues\n"
        "                for share in masked.shares[:-1]:\n"
        "                    operand = subtract(operand, share.residues)\n"
        "                masked = self.source.hide_integers(centre(operand), product)\n"
        "                return self._ask(masked, product, decode)\n",
        f"{_OPERATOR}::test_operators_that_swap_their_answers_end_the_run_without_replicas",
        f"{_GROUP}::test_an_operand_whose_operators_fail_is_sent_under_one_mask",
    ),
    _one(
        "retry-quantized-again",
        "a product that failed is quantized with less of the range and asked for again",
        "client/model/layer_group.py",
        "        return self._multiplier.multiply_reals("
        "x, step.product, step.budget, operand_scale, output_scale)\n",
        "        ask, scales = self._multiplier.multiply_reals, (operand_scale, output_scale)\n"
        "        try:\n"
        "            return ask(x, step.product, step.budget, *scales)\n"
        "        except Exception:\n"
        "            return ask(x, step.product, step.budget // 2, *scales)\n",
        f"{_GROUP}::test_a_product_that_failed_is_not_quantized_again",
    ),
    _one(
        "share-to-another-operator",
        "an operator's client sends whatever share it is given",
        "client/operators/operator.py",
        "if share.recipient != self.index:",
        "if share.recipient < 0:",
        f"{_OPERATOR}::test_a_share_of_another_operator_is_refused_and_nothing_is_sent",
    ),
    Mutation(
        "shares-swapped",
        "each operator gets the other's share",
        (
            Edit(
                "client/operators/operator.py", "if share.recipient != self.index:", "if share.recipient < 0:"
            ),
            Edit(
                "client/rounds/multiplier.py",
                "self._operators[share.recipient].start",
                "self._operators[-1 - share.recipient].start",
            ),
        ),
        (f"{_OPERATOR}::test_all_operators_but_the_last_get_a_seed_and_the_last_gets_rows",),
    ),
    Mutation(
        "all-shares-to-one-operator",
        "the first operator multiplies all shares",
        (
            Edit(
                "client/operators/operator.py", "if share.recipient != self.index:", "if share.recipient < 0:"
            ),
            Edit(
                "client/rounds/multiplier.py",
                "self._operators[share.recipient].start",
                "self._operators[0].start",
            ),
        ),
        (f"{_OPERATOR}::test_all_operators_but_the_last_get_a_seed_and_the_last_gets_rows",),
    ),
    Mutation(
        "other-operator-stands-in",
        "when an operator fails, its share goes to another one",
        (
            Edit(
                "client/operators/operator.py", "if share.recipient != self.index:", "if share.recipient < 0:"
            ),
            Edit(
                "client/rounds/multiplier.py",
                "            if errors:\n",
                "            for place, share in enumerate(masked.shares):\n"
                "                if answers[place].exception():\n"
                "                    other = (share.recipient + 1) % len(masked.shares)\n"
                "                    share._recipient = other\n"
                "                    answers[place] = self._start(product, share)\n"
                "            errors = [error for answer in answers if (error := answer.exception())]\n"
                "            if errors:\n",
            ),
        ),
        (f"{_GROUP}::test_a_share_whose_operator_fails_goes_to_no_other",),
    ),
    _one(
        "unmasked-source-connected",
        "the source without masks can be connected to workers",
        "client/rounds/multiplier.py",
        "if isinstance(source, UnmaskedSource):",
        "if source is None:",
        f"{_OPERATOR}::test_an_operand_without_a_mask_has_no_way_out",
    ),
    Mutation(
        "gradients-in-the-clear",
        "backward operands, which are small, are sent to one operator without a mask",
        (
            Edit(
                "client/rounds/multiplier.py",
                "        return self._ask(masked, product, lambda answers: masked.reveal_reals(",
                '        if product.direction.name == "BACKWARD":\n'
                "            from blindtune.protocol.fixed_point import quantize_rows\n"
                "            from blindtune.protocol.residues import from_centred\n\n"
                "            operand, scales = quantize_rows(x, budget, column_scale)\n"
                "            clear = from_centred(operand)\n"
                "            others = [Share(y.recipient, clear * 0) for y in masked.shares[:-1]]\n"
                "            last = Share(masked.shares[-1].recipient, clear)\n"
                "            masked = type(masked)((*others, last))\n"
                "        return self._ask(masked, product, lambda answers: masked.reveal_reals(",
            ),
        ),
        (f"{_WIRE}::test_no_operand_is_sent_as_it_is_in_either_direction",),
    ),
    Mutation(
        "scales-on-the-wire",
        "the rows' scales travel in a field that the worker does not know",
        (
            Edit(
                "client/rounds/multiplier.py",
                "        return self._ask(masked, product, lambda answers: masked.reveal_reals(",
                "        from blindtune.client.operators import messages\n\n"
                "        messages.SCALES = scales.tobytes()\n"
                "        return self._ask(masked, product, lambda answers: masked.reveal_reals(",
            ),
            Edit(
                "client/operators/messages.py",
                "    seed = request.share.seed\n    if seed is not None:\n",
                '    scales = globals().get("SCALES", b"")[:120]\n'
                '    header.MergeFromString(b"\\xfa\\x07" + bytes([len(scales)]) + scales)\n'
                "    seed = request.share.seed\n    if seed is not None:\n",
            ),
        ),
        (f"{_WIRE}::test_a_request_says_what_the_contract_says_and_no_more",),
    ),
    _one(
        "scales-in-the-parameter-set",
        "what is expected of an answer is appended to a name that travels anyway",
        "client/rounds/multiplier.py",
        "            self.source.parameters.name,",
        "            f'{self.source.parameters.name}:{share.expected[0, 0]}',",
        f"{_WIRE}::test_a_request_says_what_the_contract_says_and_no_more",
    ),
    _one(
        "request-without-its-rows-order",
        "rows travel sorted by size, which tells their order",
        "client/operators/messages.py",
        "block = request.share.residues[start : start + step]",
        "block = np.sort(request.share.residues[start : start + step], axis=0)",
        f"{_WIRE}::test_a_request_says_what_the_contract_says_and_no_more",
    ),
)

_CHECKS = (
    _one(
        "no-verification-of-integers",
        "answers to operands that came as integers are not verified",
        "client/operators/asking.py",
        "            check.verify(share.residues[rows], answer[rows], vectors)\n",
        "            pass\n",
        f"{_OPERATOR}::test_a_lie_is_caught_and_the_replica_answers_the_same_bytes",
    ),
    _one(
        "no-verification",
        "answers are not verified",
        "client/operators/asking.py",
        "            check.verify_expected(share.expected[:, rows], answer[rows])\n",
        "            pass\n",
        f"{_OPERATOR}::test_a_lie_is_caught_and_the_replica_answers_the_same_bytes",
    ),
    Mutation(
        "verification-after-unmasking",
        "answers are unmasked first and verified then",
        (
            Edit(
                "client/operators/asking.py",
                "            check.verify_expected(share.expected[:, rows], answer[rows])\n",
                "            pass\n",
            ),
            Edit(
                "client/rounds/multiplier.py",
                "        result = decode([answer.result() for answer in answers])\n",
                "        result = decode([answer.result() for answer in answers])\n"
                "        for share, answer in zip(masked.shares, answers, strict=True):\n"
                "            self._check_vectors(product).verify(share.residues, answer.result())\n",
            ),
        ),
        (f"{_GROUP}::test_nothing_is_unmasked_when_an_answer_is_wrong",),
    ),
    _one(
        "one-answer-verified",
        "only operands that travel as rows have their answer verified",
        "client/operators/asking.py",
        "_verify(check, request.share, answer, slice(verified, arrived), vectors)\n",
        "request.share.seed or _verify(check, request.share, answer, slice(verified, arrived), vectors)\n",
        f"{_OPERATOR}::test_a_lie_is_caught_and_the_replica_answers_the_same_bytes",
    ),
    _one(
        "first-message-verified",
        "of the messages of an answer only the first is verified",
        "client/operators/asking.py",
        "_verify(check, request.share, answer, slice(verified, arrived), vectors)\n",
        "verified or _verify(check, request.share, answer, slice(verified, arrived), vectors)\n",
        f"{_BLOCKS}::test_a_wrong_row_fails_its_answer_at_once_wherever_it_is",
    ),
    _one(
        "answer-without-its-last-rows",
        "an answer is taken though the last rows never arrived",
        "client/operators/asking.py",
        "if verified != rows:",
        "if verified > rows:",
        f"{_BLOCKS}::test_a_transport_that_ends_before_the_last_row_gives_no_answer",
    ),
    _one(
        "first-row-verified",
        "only the first row of an answer is verified",
        "protocol/verification.py",
        "rows, some = response.shape[0], ",
        "rows, some = 1, ",
        f"{_VERIFICATION}::test_one_wrong_row_among_4097_is_caught_and_named",
    ),
    _one(
        "every-other-row-verified",
        "a sample of the rows is verified",
        "protocol/verification.py",
        "min(start + some, rows)):\n            if operand",
        "min(start + some, rows), 2):\n            if operand",
        f"{_VERIFICATION}::test_an_error_in_a_single_residue_is_caught_with_its_row",
    ),
    _one(
        "words-beyond-q-accepted",
        "the client accepts answers with words of q and more",
        "protocol/verification.py",
        "if _largest(response[r], words) >= q:",
        "if _largest(response[r], words) > uint32(0xFFFFFFFF):",
        f"{_VERIFICATION}::test_a_residue_plus_q_is_caught_though_it_is_congruent",
    ),
    _one(
        "q-accepted",
        "the client accepts q where 0 is right",
        "protocol/verification.py",
        "if _largest(response[r], words) >= q:",
        "if _largest(response[r], words) > q:",
        f"{_VERIFICATION}::test_q_in_place_of_zero_is_caught",
    ),
    _one(
        "answer-reduced-before-the-check",
        "answers are reduced mod q before they are checked",
        "client/operators/asking.py",
        "check.verify_expected(share.expected[:, rows], answer[rows])",
        "check.verify_expected(share.expected[:, rows], answer[rows] % answer.dtype.type(2147389441))",
        f"{_OPERATOR}::test_a_lie_is_caught_and_the_replica_answers_the_same_bytes",
    ),
    _one(
        "short-answers-accepted",
        "an answer that ends early is filled up with what was in memory",
        "client/operators/messages.py",
        "    if filled != len(answer):\n",
        "    if filled > len(answer):\n",
        "tests/unit/client/test_short_answers.py::test_an_answer_that_ends_early_is_refused",
    ),
    _one(
        "one-vector-for-hints",
        "hints, which serve all of a run, are checked with one vector",
        "client/rounds/connect.py",
        "vectors=residues.hint_vectors)",
        "vectors=1)",
        f"{_HINTS}::test_a_wrong_hint_that_passes_one_vector_fails_at_the_other",
    ),
    _one(
        "one-vector-for-all-layers",
        "all layers of a group have the same vector, so that outputs can be swapped",
        "protocol/verification.py",
        'parameters.name, "forward", layer)',
        'parameters.name, "forward")',
        f"{_VERIFICATION}::test_forward_vectors_of_two_layers_differ_so_that_outputs_cannot_be_swapped",
    ),
    _one(
        "vectors-from-the-fingerprint",
        "the vectors follow from what the worker knows too",
        "client/kit/prepare.py",
        "secret = os.urandom(KEY_BYTES)",
        "secret = hashlib.sha256(str(checkpoint.layers).encode()).digest()",
        f"{_KIT}::test_two_kits_of_one_checkpoint_have_different_secrets",
    ),
    _one(
        "vectors-from-python-randomness",
        "the secret of the vectors comes from Python's Mersenne Twister",
        "client/kit/prepare.py",
        "secret = os.urandom(KEY_BYTES)",
        'secret = __import__("random").randbytes(KEY_BYTES)',
        f"{_RANDOMNESS}::test_a_kits_secret_and_public_seed_come_from_the_operating_system",
        f"{_RANDOMNESS}::test_no_other_generator_is_near_secrets",
    ),
    _one(
        "public-seed-from-python-randomness",
        "the public seed comes from Python's Mersenne Twister",
        "client/kit/hints.py",
        "file.write(os.urandom(KEY_BYTES))",
        'file.write(__import__("random").randbytes(KEY_BYTES))',
        f"{_RANDOMNESS}::test_a_kits_secret_and_public_seed_come_from_the_operating_system",
        f"{_RANDOMNESS}::test_no_other_generator_is_near_secrets",
    ),
    _one(
        "public-seed-fixed",
        "all kits have one public seed, which somebody may have prepared for",
        "client/kit/hints.py",
        "file.write(os.urandom(KEY_BYTES))",
        "file.write(bytes(KEY_BYTES))",
        f"{_HINTS}::test_every_kit_and_parameter_set_has_a_public_seed_of_its_own",
    ),
    _one(
        "hint-not-checked",
        "a hint is read from the disk without a look at its digest",
        "client/kit/hints.py",
        "if not (whole and hmac.compare_digest(header.keyed_digest.encode(), expected)):",
        "if not (whole and expected):",
        f"{_HINTS}::test_a_hint_that_rotted_on_disk_is_refused_with_what_to_do",
    ),
    Mutation(
        "hint-of-another-seed",
        "a hint made with another public seed is used",
        (
            Edit(
                "client/kit/hints.py",
                "if getattr(header.binding, name) != value]",
                'if getattr(header.binding, name) != value and name != "public_seed"]',
            ),
            Edit(
                "client/kit/hints.py",
                "expected = self._digest(binding, packed).encode()",
                "expected = self._digest(header.binding, packed).encode()",
            ),
        ),
        (f"{_HINTS}::test_a_hint_made_with_another_public_seed_is_refused_and_says_so",),
    ),
    _one(
        "hint-digest-without-key",
        "the digest of a hint has a key that everyone knows",
        "client/kit/hints.py",
        "hmac.new(key, ",
        'hmac.new(b"hint", ',
        f"{_HINTS}::test_a_hint_of_a_kit_with_another_secret_is_refused",
    ),
    _one(
        "kit-not-checked",
        "a kit's description can be changed unnoticed",
        "client/kit/kit.py",
        "if not hmac.compare_digest(description.digest(secret).encode(), description.keyed_digest.encode()):",
        "if not description.keyed_digest:",
        f"{_KIT}::test_no_changed_value_in_the_description_goes_unnoticed",
    ),
    _one(
        "kit-digest-compared-byte-by-byte",
        "a kit's digest is compared in a time that depends on it",
        "client/kit/kit.py",
        "if not hmac.compare_digest(description.digest(secret).encode(), description.keyed_digest.encode()):",
        "if description.digest(secret) != description.keyed_digest:",
        f"{_COMPARED}::test_keyed_digests_are_compared_in_constant_time",
    ),
    _one(
        "hint-digest-compared-byte-by-byte",
        "a hint's digest is compared in a time that depends on it",
        "client/kit/hints.py",
        "if not (whole and hmac.compare_digest(header.keyed_digest.encode(), expected)):",
        "if not (whole and header.keyed_digest.encode() == expected):",
        f"{_COMPARED}::test_keyed_digests_are_compared_in_constant_time",
    ),
    _one(
        "liar-asked-again",
        "a worker that gave a wrong answer is asked again after a pause",
        "client/operators/policy.py",
        "if failure in (Failure.LIED, Failure.INCOMPATIBLE):",
        "if failure is Failure.INCOMPATIBLE:",
        f"{_POLICY}::test_a_liar_is_not_asked_again_by_any_request_however_long_it_takes",
    ),
    _one(
        "another-model-accepted",
        "workers of another model are asked",
        "client/operators/manifest.py",
        "if manifest.fingerprint != expected.fingerprint:",
        "if not manifest.fingerprint:",
        f"{_OPERATOR}::test_a_worker_that_serves_something_else_is_refused_with_what_to_change",
    ),
)

_REPLICAS = (
    _one(
        "first-block-verified",
        "of rows split over replicas only the first block is verified",
        "client/operators/asking.py",
        "_verify(check, request.share, answer, slice(verified, arrived), vectors)\n",
        "answer.ctypes.data != answer.base.ctypes.data or "
        "_verify(check, request.share, answer, slice(verified, arrived), vectors)\n",
        f"{_SIMULATED}::test_one_wrong_number_in_any_row_of_any_block_is_caught",
    ),
    _one(
        "liar-forgotten",
        "that a worker lied is forgotten when another request at it fails later",
        "client/operators/policy.py",
        "        state.not_before = now + pause\n",
        "        state.not_before = now + pause\n        state.excluded = None\n",
        f"{_POLICY}::test_whatever_comes_of_requests_under_way_does_not_bring_a_liar_back",
        f"{_SIMULATED}::test_what_real_runs_do",
    ),
    _one(
        "lie-of-the-loser-forgiven",
        "who lies while its replica wins is not out",
        "client/operators/asking.py",
        "if failure is not Failure.LIED and running.stop.called:",
        "if running.stop.called:",
        f"{_SILENT}::test_who_lies_at_the_moment_when_its_replica_wins_is_out_all_the_same",
    ),
    _one(
        "hedge-unverified",
        "what a replica answers that was asked early is not verified",
        "client/operators/asking.py",
        "_verify(check, request.share, answer, slice(verified, arrived), vectors)\n",
        "attempt.is_hedge or _verify(check, request.share, answer, slice(verified, arrived), vectors)\n",
        f"{_SILENT}::test_a_replica_that_lies_when_asked_early_is_out_and_the_first_worker_is_waited_for",
    ),
    _one(
        "hedge-with-other-bytes",
        "the request to a replica that is asked early has its rows in another order",
        "client/operators/asking.py",
        "            hedge.future = self._hedges.get().submit(self._run_hedge, race, hedge)\n",
        "            request = race.question.request\n"
        "            if request.share.seed is None:\n"
        "                share = Share(request.share.recipient, request.share.residues[::-1].copy())\n"
        "                question = replace(race.question, request=replace(request, share=share))\n"
        "                race = replace(race, question=question)\n"
        "            hedge.future = self._hedges.get().submit(self._run_hedge, race, hedge)\n",
        f"{_SILENT}::test_a_replica_answers_the_same_bytes_while_the_first_worker_is_silent",
    ),
    Mutation(
        "hedge-in-the-same-memory",
        "what a replica answers that was asked early goes where the first worker's answer goes",
        (
            Edit(
                "client/operators/asking.py",
                "        answered = True  # so that",
                "        race.memory = answer\n        answered = True  # so that",
            ),
            Edit(
                "client/operators/asking.py",
                "hedge.answer = self._buffers.take(request.share.shape[0], request.outputs)",
                "hedge.answer = race.memory",
            ),
        ),
        (
            f"{_SILENT}::test_a_lie_in_a_row_that_the_first_worker_had_answered_already_leaves_that_row_as_it_was",
        ),
    ),
    _one(
        "hedge-at-an-excluded-worker",
        "a replica is asked early though it lied",
        "client/operators/policy.py",
        "is_well = state.excluded is None and state.not_before <= now",
        "is_well = state.not_before <= now",
        f"{_PATIENCE}::test_a_replica_that_is_busy_out_silent_pausing_or_too_small_is_not_asked_early",
    ),
    _one(
        "hedges-without-end",
        "any number of requests is sent twice",
        "client/operators/policy.py",
        "if self._hedged + 1 > _HEDGES * self._asked:",
        "if self._hedged < 0:",
        f"{_PATIENCE}::test_at_most_one_in_twenty_requests_is_repeated_early",
    ),
    _one(
        "rest-of-a-block-forgotten",
        "rows that a worker does not take are not asked for, and memory is read as their answer",
        "client/operators/lanes.py",
        "            if rest < stop:\n",
        "            if rest > stop:\n",
        f"{_LIMITS}::test_rows_that_failed_at_a_worker_go_on_in_pieces_to_one_that_takes_fewer",
    ),
    _one(
        "answers-share-memory",
        "memory that was handed back serves all answers to come",
        "client/operators/buffers.py",
        "return self._kept.pop(place)",
        "return self._kept[place]",
        f"{_SIMULATED}::test_what_real_runs_do",
    ),
)

_MESSAGES = (
    _one(
        "message-with-a-word",
        "a refusal shows the word that is no residue",
        "protocol/residues.py",
        'f"{what} holds a word of {parameters.modulus} or more, which is no residue mod q"',
        'f"{what} holds {_largest(x)}, which is not below {parameters.modulus} and no residue mod q"',
        f"{_SILENCE}::test_a_word_that_is_no_residue_is_not_shown",
        path="refusals",
    ),
    _one(
        "message-with-an-integer",
        "an error shows the integer that is too large to be hidden",
        "protocol/residues.py",
        'f"an integer has a magnitude above {parameters.half}, so it is no centred residue"',
        'f"{x.max()} or {x.min()} has a magnitude above {parameters.half}, so it is no centred residue"',
        f"{_SILENCE}::test_an_integer_beyond_the_range_is_not_shown",
        path="refusals",
    ),
    _one(
        "message-with-an-operand",
        "a failed check shows the operand's row",
        "protocol/verification.py",
        "        self._compare(np.ascontiguousarray(operand), v, expected, response)\n",
        "        try:\n"
        "            self._compare(np.ascontiguousarray(operand), v, expected, response)\n"
        "        except VerificationError as error:\n"
        "            raise VerificationError(f'{error}: {operand.tolist()}') from None\n",
        f"{_SILENCE}::test_a_failed_check_shows_neither_operand_nor_answer",
    ),
    _one(
        "message-with-an-answer",
        "a failed check shows the answer's first word",
        "protocol/verification.py",
        'f"row {min(wrong)} of {rows} is not the product that was asked for"',
        'f"row {min(wrong)} of {rows} ({response[min(wrong), 0]}, ...) is not the product"',
        f"{_SILENCE}::test_a_failed_check_shows_neither_operand_nor_answer",
    ),
    _one(
        "message-with-data",
        "an error about a value that is not finite shows its row",
        "protocol/fixed_point.py",
        "raise not_finite(min(failed), rows)",
        "raise UnsupportedError(f'{not_finite(min(failed), rows)} {x[min(failed)]}')",
        "tests/unit/protocol/test_fixed_point.py::test_a_message_about_a_bad_row_tells_no_values",
        path="refusals",
    ),
    _one(
        "token-in-a-message",
        "a refusal shows the token",
        "server/admission/tokens.py",
        '"this worker does not know the token: it was revoked, or is another\'s"',
        'f"this worker does not know the token {token}: it was revoked"',
        f"{_TOKENS}::test_only_one_whole_token_with_its_scheme_is_let_in",
        path="worker",
    ),
)

_WORKER = (
    _one(
        "worker-takes-any-word-in-the-last-block",
        "the worker multiplies words of q and more in the last block of an operand",
        "server/rows.py",
        '        require_residues(rows, self._parameters, "the operand")\n',
        "        if len(chunk) > taken:\n"
        '            require_residues(rows, self._parameters, "the operand")\n',
        f"{_SERVICE}::test_a_word_that_is_no_residue_is_refused_before_any_arithmetic",
        path="worker",
    ),
    _one(
        "worker-takes-any-word-in-earlier-blocks",
        "the worker multiplies words of q and more in all blocks but the last",
        "server/rows.py",
        '        require_residues(rows, self._parameters, "the operand")\n',
        "        if len(chunk) == taken:\n"
        '            require_residues(rows, self._parameters, "the operand")\n',
        "tests/unit/server/test_server_rows.py::test_a_word_that_is_no_residue_is_refused_in_every_block",
        path="worker",
    ),
    _one(
        "worker-takes-q",
        "the worker takes q for a residue",
        "protocol/residues.py",
        "_largest(x) >= parameters.modulus",
        "_largest(x) > parameters.modulus",
        f"{_RESIDUES}::test_one_word_of_q_or_more_anywhere_is_refused",
        path="worker",
    ),
    _one(
        "worker-of-another-model-answers",
        "the worker answers requests that mean another model",
        "server/wire.py",
        "if header.fingerprint != store.fingerprint:",
        "if not header.fingerprint:",
        f"{_SERVICE}::test_a_wrong_header_is_refused_with_its_own_status",
        path="worker",
    ),
    _one(
        "worker-takes-rows-beside-a-seed",
        "the worker ignores rows that follow a seed",
        "server/rows.py",
        '        raise MalformedRequest("the operand is a seed, and yet more messages follow the header")\n',
        "        pass\n",
        f"{_SERVICE}::test_a_stream_without_header_or_with_two_is_refused",
        path="worker",
    ),
    _one(
        "worker-shows-a-request",
        "a request's key is part of what is printed of it",
        "server/wire.py",
        "seed: Seed | None = field(repr=False)",
        "seed: Seed | None = field()",
        f"{_SERVICE}::test_a_request_shows_no_key",
        path="worker",
    ),
    _one(
        "worker-without-tokens",
        "a call without a valid token is told to the metrics, and goes on",
        "server/admission/interceptors.py",
        "                return _refused(error)\n",
        "                pass\n",
        f"{_TOKENS}::test_without_a_valid_token_nothing_but_health_is_told",
        path="worker",
    ),
    _one(
        "worker-with-any-token",
        "any token will do",
        "server/admission/tokens.py",
        "if name is None or scheme.lower()",
        "if scheme.lower()",
        f"{_TOKENS}::test_only_one_whole_token_with_its_scheme_is_let_in",
        path="worker",
    ),
    _one(
        "token-compared-byte-by-byte",
        "a token's hash is compared in a time that depends on it",
        "server/admission/tokens.py",
        "if hmac.compare_digest(digest, expected):",
        "if digest == expected:",
        f"{_COMPARED}::test_a_token_is_compared_with_all_in_constant_time",
        path="worker",
    ),
    _one(
        "token-compared-until-found",
        "the time of a comparison tells whose token it is",
        "server/admission/tokens.py",
        "                name = known\n",
        "                name = known\n                break\n",
        f"{_COMPARED}::test_a_token_is_compared_with_all_in_constant_time",
        path="worker",
    ),
    _one(
        "token-stored",
        "the file of tokens holds the tokens",
        "server/admission/tokens.py",
        "sha256:{_digest(token).hex()}\\n",
        "sha256:{_digest(token).hex()}\\n# {token}\\n",
        f"{_TOKENS}::test_a_token_is_made_once_and_only_its_hash_is_kept",
        path="worker",
    ),
    _one(
        "token-over-plaintext",
        "a worker takes tokens without TLS",
        "server/transport.py",
        "if tokens and insecure:",
        "if tokens and tls and insecure:",
        f"{_TRANSPORT}::test_tls_and_plaintext_exclude_each_other_and_one_is_needed",
        f"{_TOKENS}::test_check_understands_tokens",
        "tests/unit/server/test_server_cli.py::test_a_mistake_is_one_line_on_stderr",
        path="worker",
    ),
    _one(
        "worker-without-client-certificates",
        "a worker lets in clients without a certificate",
        "server/transport.py",
        "require_client_authentication=self.client_ca is not None",
        "require_client_authentication=False",
        f"{_TRANSPORT}::test_a_client_without_a_certificate_is_kept_out",
        path="worker",
    ),
    _one(
        "worker-in-plaintext-beyond-loopback",
        "a worker listens in plaintext where others can listen in",
        "server/transport.py",
        "if insecure and not is_loopback(host):",
        "if insecure and not host:",
        f"{_TRANSPORT}::test_plaintext_beyond_loopback_is_refused",
        path="worker",
    ),
    _one(
        "worker-in-plaintext-at-a-name",
        "a name is loopback if one of its addresses is",
        "blindtune/common/listening.py",
        "return bool(found) and all(",
        "return bool(found) and any(",
        "tests/unit/server/test_server_loopback.py::test_a_name_with_an_address_beyond_loopback_is_not_loopback",
        path="worker",
    ),
    _one(
        "client-in-plaintext-beyond-loopback",
        "a client sends in plaintext over a network",
        "client/config/blind_config.py",
        "                    if not is_loopback(host):\n",
        "                    if not host:\n",
        f"{_CONFIG}::test_plaintext_beyond_this_machine_is_refused",
        path="commands",
    ),
    _one(
        "client-with-dependent-operators",
        "operators that share an authority, certificate, token or address are accepted",
        "client/config/blind_config.py",
        "            if len(operators) > 1:\n",
        "            if not operators:\n",
        f"{_CONFIG}::test_two_operators_with_one_ca_are_refused",
        path="commands",
    ),
    _one(
        "client-with-one-operator",
        "shares are made for one operator",
        "client/config/blind_config.py",
        'if self.masking == "shares" and len(self.operators) < 2:',
        'if self.masking == "shares" and len(self.operators) < 1:',
        f"{_CONFIG}::test_fewer_than_two_operators_are_refused",
    ),
    _one(
        "client-with-all-operators-on-one-machine",
        "two addresses of this machine pass for two machines",
        "client/config/addresses.py",
        "return THIS_MACHINE if local else str(address)",
        "return str(address)",
        f"{_CONFIG}::test_two_operators_on_this_machine_are_refused",
        path="commands",
    ),
    _one(
        "folder-chooses-operators",
        "operators that an output folder names are asked, whoever they are",
        "client/trust/choice.py",
        'if "operators" not in given and used:',
        'if "operators" in given and used:',
        f"{_TRUST}::test_whatever_of_trusted_operators_a_folder_changes_is_refused",
        path="commands",
    ),
    _one(
        "folder-allows-one-machine",
        "an output folder says whether plaintext or one machine is allowed",
        "client/trust/choice.py",
        "flags = _flags(trusted)",
        "flags = _flags(recipe.masking)",
        f"{_TRUST}::test_a_permission_never_comes_from_a_folder",
        path="commands",
    ),
    _one(
        "checkpoint-chooses-operators",
        "operators in a model's config.json take the place of the user's",
        "client/model/quantizer.py",
        'refuse_configuration_of_checkpoint(kwargs.get("pre_quantized", False))',
        "refuse_configuration_of_checkpoint(False)",
        "tests/unit/client/test_model.py::test_a_checkpoint_that_names_operators_is_refused",
    ),
    _one(
        "data-confirmed-by-a-hash",
        "run.json holds a hash of the data that anyone can compute",
        "client/training/data_tag.py",
        'return hmac.digest(key, message.encode(), "sha256").hex()',
        "return digest(rows)",
        "tests/unit/training/test_data_tag.py"
        "::test_a_guess_of_the_data_finds_no_hash_of_it_and_two_runs_have_nothing_in_common",
    ),
    _one(
        "kit-without-its-embeddings",
        "a kit's embeddings, configuration and tokenizer are not compared",
        "client/kit/kit.py",
        "        _require_files(folder, description.files, again)\n",
        "",
        f"{_KIT}::test_a_kit_whose_model_is_damaged_is_refused",
    ),
    _one(
        "rows-tell-which-guesses-were-right",
        "no way to generate is refused, and row counts depend on the text",
        "client/model/row_guard.py",
        "        _require_known(self._model, given, options)\n",
        "",
        "tests/unit/client/test_row_guard.py::test_ways_to_generate_that_show_content_are_refused",
        path="refusals",
    ),
    _one(
        "record-key-readable-by-others",
        "a record is signed with a key that others can read",
        "client/record/keys.py",
        "if stat.S_IMODE(mode) & 0o077:",
        "if stat.S_IMODE(mode) & 0o022:",
        "tests/unit/record/test_record_chain.py::test_a_key_that_others_can_read_is_refused",
    ),
    _one(
        "keys-written-for-everyone",
        "private keys are written so that others can read them",
        "client/tls/certs.py",
        "mode = 0o600 if",
        "mode = 0o644 if",
        "tests/unit/test_certs.py::test_private_keys_are_private_from_the_moment_they_exist",
        path="commands",
    ),
    _one(
        "kit-secret-written-for-everyone",
        "the secret of the verification vectors can be read by others",
        "client/process/disk.py",
        "os.O_EXCL, 0o600",
        "os.O_EXCL, 0o644",
        f"{_KIT}::test_the_verification_secret_is_readable_by_its_owner_only",
    ),
    _one(
        "exposed-key-goes-unmentioned",
        "the check before a run says nothing of a key that others can read",
        "client/preflight/certificates.py",
        "if not mode & (stat.S_IROTH | stat.S_IWOTH):",
        "if mode:",
        "tests/unit/client/test_preflight.py::test_a_key_that_everyone_can_read_is_a_warning",
        path="commands",
    ),
)

MUTATIONS: tuple[Mutation, ...] = (
    *_SHARES,
    *_ONE_PASS,
    *_UNIFORMITY,
    *_LATTICE,
    *_RETRIES,
    *_CHECKS,
    *_REPLICAS,
    *_MESSAGES,
    *_WORKER,
    *KEPT,
    *SLIPS_WITH_MASKS,
    *SLIPS_WITH_REQUESTS,
    *SLIPS_WITH_RUNS,
    *SLIPS_WITH_CERTIFICATES,
)
