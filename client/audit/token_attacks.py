"""Which tokens went in? Rows of the first layers' operands against the public vocabulary.

What the first frozen layers read is a public function of one token (and its position). So a worker that
sees rows in the clear looks them up, and masks that keep some quantity of a row intact, or use the same
secret again, only change what is looked up.
"""

from collections.abc import Callable

import numpy as np
from sklearn.linear_model import Ridge

from blindtune.client.audit.field import outside, row_space
from blindtune.client.audit.knowledge import Float64, Integers, Knowledge, TokenRows, token_rows, unit_rows
from blindtune.client.audit.public_model import Float32
from blindtune.client.audit.statistics import Score
from blindtune.client.audit.transcript import Transcript
from blindtune.protocol.parameters import Q31
from blindtune.protocol.residues import Residues, centre, from_centred, subtract

__all__ = ["by_cosine", "by_difference", "by_gram_matrix", "by_regression", "by_sorting", "by_span"]

_RIDGE = 1e-6
_KNOWN_ROWS_FOR_A_SPAN = 24
_CHECKED_COLUMNS = 4


def by_cosine(transcript: Transcript, knowledge: Knowledge) -> Score:
    """The token whose public activation has the smallest angle to the row: scales don't matter."""
    rows = token_rows(transcript, knowledge)
    return _score("token by cosine", rows, _nearest(rows.words[rows.targets], knowledge, lambda x: x))


def by_sorting(transcript: Transcript, knowledge: Knowledge) -> Score:
    """The same with the values of each row in order of size, which no permutation of columns changes."""
    rows = token_rows(transcript, knowledge)

    def ordered(x: Float64) -> Float64:
        return np.sort(x, axis=1)

    return _score("token by sorted values", rows, _nearest(rows.words[rows.targets], knowledge, ordered))


def by_gram_matrix(transcript: Transcript, knowledge: Knowledge) -> Score:
    """The token that has the same angles to the known rows of the operand as the row has.

    Rotations leave X X^T as it is (Liu, Giannella and Kargupta 2006).
    """
    rows = token_rows(transcript, knowledge)
    if knowledge.public.positional:
        return _score("token by Gram matrix", rows, _gram(rows, knowledge, knowledge.positions))
    return _score("token by Gram matrix", rows, _gram(rows, knowledge, 1))


def by_regression(transcript: Transcript, knowledge: Knowledge) -> Score:
    """Least squares from masked to plain rows, fitted to the known ones, then as `by_cosine`."""
    rows = token_rows(transcript, knowledge)
    known = np.flatnonzero(rows.known)
    size = np.sqrt(np.mean(rows.words[known] ** 2)) or 1.0
    plain = unit_rows(_plain_rows(rows, known, knowledge))
    fit = Ridge(alpha=_RIDGE * len(known), fit_intercept=False).fit(rows.words[known] / size, plain)
    unmasked = fit.predict(rows.words[rows.targets] / size)
    return _score("token by regression", rows, _nearest(unmasked, knowledge, lambda x: x))


def by_difference(transcript: Transcript, knowledge: Knowledge) -> Score:
    """The token nearest to the difference of two rows at the same place of two operands.

    Where both have the same mask, that is the difference of two plain rows, and it points towards the
    first one.
    """
    rows = token_rows(transcript, knowledge)
    differences = np.zeros((len(rows.targets), rows.words.shape[1]))
    for i, target in enumerate(rows.targets):
        operand, row = rows.operand[target], rows.row[target]
        later = [x for k, x in enumerate(rows.operands) if k != operand and x.rows > row]
        if later:
            one = rows.operands[operand].words()[row : row + 1]
            other = later[(operand + 1) % len(later)].words()[row : row + 1]
            difference = subtract(np.ascontiguousarray(one), np.ascontiguousarray(other), Q31)
            differences[i] = centre(difference, Q31)[0]
    return _score("token by difference", rows, _nearest(differences, knowledge, lambda x: x, True))


def by_span(transcript: Transcript, knowledge: Knowledge) -> Score:
    """The token with which a row's mask lies in the span of the masks of a few known rows.

    Masks of known rows are known. If more of them than a basis has vectors are drawn from its span,
    their rank over Z_q shows it, and the span tells right tokens from wrong ones exactly.
    """
    rows = token_rows(transcript, knowledge)
    known = np.flatnonzero(rows.known)
    # Rows of one token could have one mask, which would look like a small basis.
    known = known[np.sort(np.unique(rows.tokens[known], return_index=True)[1])[:_KNOWN_ROWS_FOR_A_SPAN]]
    masks = subtract(_residues(rows, known), _candidates(_plain_rows(rows, known, knowledge), knowledge), Q31)
    basis, pivots = row_space(masks, Q31.modulus)
    guesses = np.full(len(rows.targets), -1)
    if len(basis) < len(masks):
        free = np.setdiff1d(np.arange(masks.shape[1]), pivots)[:_CHECKED_COLUMNS]
        columns = [*pivots, *free]
        narrow, leading = basis[:, columns], list(range(len(pivots)))
        targets = _residues(rows, rows.targets)[:, columns].astype(np.int64)
        for position in range(knowledge.positions if knowledge.public.positional else 1):
            candidates = _candidates(knowledge.public.vocabulary(position), knowledge)[:, columns]
            for i, target in enumerate(targets):
                rest = outside(target - candidates, narrow, leading, Q31.modulus)
                match = np.flatnonzero(~rest.any(axis=1))
                if match.size:
                    guesses[i] = match[0]
    return _score("token by span", rows, guesses)


def _score(attack: str, rows: TokenRows, guesses: Integers) -> Score:
    return Score(attack, "distinct tokens", rows.right(guesses), len(rows.targets), rows.chance)


def _nearest(
    x: Float64, knowledge: Knowledge, view: Callable[[Float64], Float64], centred: bool = False
) -> Integers:
    """For each row the token whose activation, at any position, is nearest in angle."""
    unit = unit_rows(view(x))
    best, guesses = np.full(len(x), -np.inf), np.zeros(len(x), np.int64)
    for position in range(knowledge.positions if knowledge.public.positional else 1):
        vocabulary = unit_rows(view(knowledge.public.vocabulary(position).astype(np.float64)))
        if centred:
            vocabulary = unit_rows(vocabulary - vocabulary.mean(axis=0))
        cosines = unit @ vocabulary.T
        nearest = cosines.argmax(axis=1)
        value = cosines[np.arange(len(x)), nearest]
        guesses = np.where(value > best, nearest, guesses)
        best = np.maximum(best, value)
    return guesses


def _gram(rows: TokenRows, knowledge: Knowledge, positions: int) -> Integers:
    best, guesses = np.full(len(rows.targets), np.inf), np.zeros(len(rows.targets), np.int64)
    for position in range(positions):
        vocabulary = unit_rows(knowledge.public.vocabulary(position))
        for operand in range(len(rows.operands)):
            here = np.flatnonzero(rows.operand[rows.targets] == operand)
            anchors = np.flatnonzero(rows.known & (rows.operand == operand))
            if not here.size or not anchors.size:
                continue
            seen = unit_rows(rows.words[rows.targets[here]]) @ unit_rows(rows.words[anchors]).T
            expected = vocabulary @ unit_rows(_plain_rows(rows, anchors, knowledge)).T
            squares = np.square(expected).sum(axis=1) - 2 * seen @ expected.T
            nearest = squares.argmin(axis=1)
            value = squares[np.arange(len(here)), nearest]
            better = value < best[here]
            guesses[here[better]] = nearest[better]
            best[here] = np.minimum(best[here], value)
    return guesses


def _plain_rows(rows: TokenRows, which: Integers, knowledge: Knowledge) -> Float32:
    """The public activations of rows whose tokens the attacker knows."""
    if not knowledge.public.positional:
        return knowledge.public.vocabulary()[rows.tokens[which]]
    # A row's place in its text is public: operands are batches of padded texts.
    places = rows.row[which] % knowledge.positions
    plain = np.empty((len(which), rows.words.shape[1]), np.float32)
    for position in np.unique(places):
        here = places == position
        plain[here] = knowledge.public.vocabulary(int(position))[rows.tokens[which][here]]
    return plain


def _residues(rows: TokenRows, which: Integers) -> Residues:
    return from_centred(rows.words[which].astype(np.int32), Q31)


def _candidates(plain: Float32, knowledge: Knowledge) -> Residues:
    """The residues that the client would send for rows, were there no mask."""
    return from_centred(knowledge.public.integers(np.ascontiguousarray(plain), knowledge.noise), Q31)
