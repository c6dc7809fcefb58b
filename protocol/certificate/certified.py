"""From verified answers to corrected real numbers.

    revealed    the centred results y^ of all rows as real numbers, and D of each
    corrected   of the rows with D other than 0: y = y^ + q w, if w is found

A row of zeros has an infinite scale, and is zero whatever came back for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from blindtune.protocol.certificate.decoding import decode
from blindtune.protocol.certificate.syndromes import long_syndromes, syndromes
from blindtune.protocol.certificate.words import CertificateWords
from blindtune.protocol.fixed_point import Float32, Float64
from blindtune.protocol.kernels.low_sums import row_sums
from blindtune.protocol.masks import MaskedOperand
from blindtune.protocol.residues import Residues

__all__ = ["Certified", "correct", "reveal_certified"]


@dataclass(eq=False)
class Certified:
    """Real values of a product, with what is known of their wraps.

    Attributes:
        values: float32 [rows, outputs]. Those of ``flagged`` rows are wrong until they are corrected.
        peaks: the largest magnitude of a true result in each row, int64 [rows]; 0 in rows of zeros.
        flagged: the rows that wrapped or were damaged, and are not corrected, int64.
        wraps: how many rows were corrected.
    """

    values: Float32 = field(repr=False)
    peaks: NDArray[np.int64] = field(repr=False)
    flagged: NDArray[np.int64] = field(repr=False)
    wraps: int = 0


def reveal_certified(
    masked: MaskedOperand,
    responses: Sequence[Residues],
    scales: Float64,
    column_scale: Float32 | None,
    words: CertificateWords,
    modulus: int,
) -> Certified:
    """The values of all rows, and which of them need a correction.

    Args:
        masked: hidden with ``words.image``.
        responses: verified answers, as for `MaskedOperand.reveal_reals`.
        scales, column_scale: likewise.
        words: of the product.
        modulus: q.

    Raises:
        ValueError: the operand was hidden without the words.
    """
    if masked.expected_sums is None:
        raise ValueError("the operand was hidden without the words of a certificate")
    revealed = masked.reveal_reals_with_sums(responses, scales, column_scale, words.u)
    wrong = syndromes(masked.expected_sums, revealed.sums, modulus) != 0
    peaks = revealed.peaks.astype(np.int64)
    of_zeros = np.isinf(scales)
    peaks[of_zeros] = 0
    return Certified(revealed.values, peaks, np.flatnonzero(wrong & ~of_zeros))


def correct(
    certified: Certified,
    masked: MaskedOperand,
    responses: Sequence[Residues],
    scales: Float64,
    column_scale: Float32 | None,
    words: CertificateWords,
    modulus: int,
    most: int,
) -> None:
    """Takes back the wraps that are found; the other rows stay flagged.

    Args:
        certified: what `reveal_certified` returned for the other arguments.
        most: how many rows may stay flagged. Beyond it nothing more is looked for: nobody will use the rest.
    """
    rows = certified.flagged
    if not rows.size:
        return
    z, y = masked.rows_again(responses, rows)
    short = syndromes(row_sums(z, words.image), row_sums(y, words.u), modulus)
    long = long_syndromes(z, y, words, modulus)
    left: list[int] = []
    for place, row in enumerate(rows.tolist()):
        if len(left) > most:
            left.append(row)
            continue
        square = sum(int(x) ** 2 for x in z[place])
        wraps = decode(int(short[place]), int(long[place]), y[place], square, words, modulus)
        if wraps is None:
            left.append(row)
            continue
        result = y[place].astype(np.int64)
        for j, times in wraps.items():
            result[j] += modulus * times
        certified.peaks[row] = np.abs(result).max()
        certified.values[row] = _real_values(result, scales[row], column_scale)
        certified.wraps += 1
    certified.flagged = np.array(left, np.int64)
    certified.peaks[certified.flagged] = 0


def _real_values(y: NDArray[np.int64], scale: np.float64, column_scale: Float32 | None) -> Float32:
    """As `dequantize_rows` rounds them: float64 holds the integers."""
    values = y.astype(np.float64) * (1.0 / scale)
    return (values if column_scale is None else values * column_scale).astype(np.float32)
