"""What an attacker is taken to know, and what decides whether it was right."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blindtune.client.audit.public_model import PublicModel
from blindtune.client.audit.transcript import Operand, Transcript
from blindtune.protocol.products import Product

__all__ = ["Knowledge", "TokenRows", "token_rows", "unit_rows"]

Integers = NDArray[np.int64]
Float64 = NDArray[np.float64]

_MOST_TARGETS = 400


@dataclass(frozen=True, eq=False)
class Knowledge:
    """The public model, a part of the plaintext, and the answers that attacks are measured by.

    Attributes:
        public: the public model.
        tokens: of each row of each operand of the first forward product; -1 for padding.
        known: which of these rows the attacker knows: texts that are public or its own, and the beginning
            of every batch, where templates stand.
        last: the backward product of the last layers, which the labels are next to.
        labels: of each row of each operand of ``last``; -1 where there is none.
        known_labels: of how many of these operands the attacker knows the labels.
        vocabulary_labels: whether a label is a token, and so a column of ``last``.
        positions: how many positions of a text there are.
        noise: largest magnitude of the mask's noise in a result of the first product.
        plain: the operands in the clear, by which separated sources are recognised. Never given to an attack.
        sources: the forward product whose features are to be separated.
    """

    public: PublicModel
    tokens: Sequence[Integers]
    known: Sequence[NDArray[np.bool_]]
    last: Product
    labels: Sequence[Integers]
    known_labels: int
    vocabulary_labels: bool
    positions: int
    noise: int
    plain: Transcript
    sources: Product


@dataclass(frozen=True, eq=False)
class TokenRows:
    """All rows of the first product, one under the other.

    Attributes:
        operands: what they are from.
        words: centred residues, float64 [n, d].
        tokens, known: of each row.
        operand, row: where each row stands.
        targets: one row for each distinct token that the attacker is to find. With each token once, a
            guess that does not depend on the tokens is right for one target in ``len(targets)`` at best.
    """

    operands: Sequence[Operand]
    words: Float64
    tokens: Integers
    known: NDArray[np.bool_]
    operand: Integers
    row: Integers
    targets: Integers

    @property
    def chance(self) -> float:
        return 1 / len(self.targets)

    def right(self, guesses: Integers) -> int:
        """How many targets were guessed."""
        return int(np.count_nonzero(guesses == self.tokens[self.targets]))


def token_rows(transcript: Transcript, knowledge: Knowledge) -> TokenRows:
    """The rows of a transcript that tokens belong to.

    Raises:
        ValueError: transcript and knowledge are not of the same run.
    """
    operands = transcript.of(knowledge.public.first)
    if [x.rows for x in operands] != [len(x) for x in knowledge.tokens]:
        raise ValueError("the transcript is not of the run that the tokens are of")
    words = np.concatenate([x.centred() for x in operands])
    tokens, known = np.concatenate(knowledge.tokens), np.concatenate(knowledge.known)
    unknown = np.flatnonzero(~known & (tokens >= 0))
    distinct = np.sort(unknown[np.unique(tokens[unknown], return_index=True)[1]])
    return TokenRows(
        operands,
        words,
        tokens,
        known & (tokens >= 0),
        np.repeat(np.arange(len(operands)), [x.rows for x in operands]),
        np.concatenate([np.arange(x.rows) for x in operands]),
        distinct[:: -(-len(distinct) // _MOST_TARGETS)],
    )


def unit_rows(x: NDArray[np.generic]) -> Float64:
    """Rows of length 1; rows of zeros stay zeros."""
    x = x.astype(np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm == 0, 1, norm)
