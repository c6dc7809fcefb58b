"""What was drawn, what travelled, and which invariant that breaks.

Watches from outside: it sees each mask as it is drawn and each request as bytes, and derives everything
else. It is the judge, so nothing in it is shared with what it judges.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from blindtune.client.operators.messages import WorkRequest
from blindtune.proto import worker_pb2
from blindtune.protocol.masks import MaskedOperand, Share
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred, Residues
from simulation.workers import SimulatedWorker

__all__ = ["INVARIANTS", "Attempt", "Ledger"]

INVARIANTS = {
    "result": "every result is the reference's",
    "verified": "every row of every answer was verified before it was read",
    "recipient": "an operand goes to the operator that it was drawn for, and nothing else goes anywhere",
    "fresh masks": "no row of a mask is used twice",
    "same bytes": "an attempt that is repeated sends the same bytes",
    "one mask": "one mask is drawn for an operand, however often it is sent",
    "quarantine": "a worker that gave a wrong answer is not asked again",
    "handed back": "memory that was handed back is read and written by nobody",
    "finite": "every request ends in bounded time",
    "bounded memory": "what is under way fits the window, and nothing is left over in the end",
    "typed error": "what fails, fails with an error of ours",
    "alive": "with an honest worker of each operator within reach, nothing fails",
    "resumable": "a run that failed or was killed goes on and ends in the reference's adapter",
    "honest workers": "a worker that answered rightly is never called a liar",
}


@dataclass(frozen=True)
class _Drawn:
    operand: int
    recipient: int
    product: str
    row: int


class Attempt:
    """A request under way."""

    def __init__(self, ledger: "Ledger", client: str, worker: SimulatedWorker, request: WorkRequest) -> None:
        self._ledger, self._client, self._worker, self._request = ledger, client, worker, request

    def arrived(self, answer: NDArray[np.uint32]) -> None:
        """The client holds the first rows of an answer."""
        operand = self._request.share.residues[: len(answer)]
        truth = self._worker.true_answer(self._request.product, operand)
        if not np.array_equal(answer, truth):
            self._ledger.liars.add((self._client, self._worker))


class Ledger:
    """Keeps the books of one schedule.

    Attributes:
        violations: invariants that were broken, with what was seen.
        attempts: requests that were sent.
        repeated: those that had been sent before.
        pieces: those that began in the middle of their operand.
        masks_ahead: masks that were drawn for an operand to come.
        liars: client and worker, for answers that were wrong.
    """

    def __init__(self) -> None:
        self.violations: list[tuple[str, str]] = []
        self.attempts = 0
        self.repeated = 0
        self.pieces = 0
        self.masks_ahead = 0
        self.liars: set[tuple[str, SimulatedWorker]] = set()
        self._mask_rows: set[bytes] = set()
        self._rows: dict[bytes, _Drawn] = {}
        self._keys: dict[bytes, _Drawn] = {}
        self._ahead: set[Share] = set()
        self._operands = 0
        self._asked = 0
        self._sent: dict[tuple[int, int, int], bytes] = {}
        self._verified: set[tuple[str, bytes]] = set()

    def broken(self, invariant: str, seen: str) -> None:
        """Notes a violation."""
        assert invariant in INVARIANTS
        self.violations.append((invariant, seen))

    def asks(self) -> None:
        """The client multiplies an operand: one mask may be drawn."""
        self._asked += 1

    def drew_ahead(self, product: Product, shares: Sequence[Share]) -> None:
        """A mask was drawn for an operand to come. Until then it has a number of its own, below 0."""
        self.masks_ahead += 1
        for share in shares:
            self._enter_key(share, _Drawn(-self.masks_ahead, share.recipient, product.label, 0))
        self._ahead.update(shares)

    def _enter_key(self, share: Share, drawn: _Drawn) -> None:
        assert share.seed is not None
        if share.seed.key in self._keys:
            self.broken("fresh masks", f"a seed was used twice ({drawn.product})")
        self._keys[share.seed.key] = drawn

    def drew(self, operand: Centred, product: Product, masked: MaskedOperand) -> None:
        """A mask was drawn."""
        self._operands += 1
        if self._operands > self._asked:
            self.broken("one mask", f"a second mask was drawn for an operand of {product.label}")
        for share in masked.shares:
            if share in self._ahead:
                self._ahead.remove(share)
                if self._keys[share.seed.key].product != product.label:  # type: ignore[union-attr]
                    self.broken("fresh masks", f"an operand of {product.label} has another product's mask")
                continue
            drawn = [
                _Drawn(self._operands, share.recipient, product.label, row)
                for row in range(len(share.residues))
            ]
            if share.seed is not None:
                self._enter_key(share, drawn[0])
                continue
            mask = (share.residues.astype(np.int64) - operand) % Q31.modulus
            for entry, sent, row in zip(drawn, share.residues, mask, strict=True):
                hidden = _digest(row)
                if hidden in self._mask_rows or not row.any():
                    self.broken("fresh masks", f"a row's mask is zero or was used before ({product.label})")
                self._mask_rows.add(hidden)
                self._rows[_digest(sent)] = entry

    def verified(self, product: Product, answer: NDArray[np.uint32]) -> None:
        """Rows of an answer passed their check."""
        self._verified.update((product.label, _digest(row)) for row in answer)

    def reads(self, product: Product, answers: Sequence[NDArray[np.uint32]]) -> None:
        """Answers are about to be unmasked."""
        for number, answer in enumerate(answers):
            unseen = [
                i for i, row in enumerate(answer) if (product.label, _digest(row)) not in self._verified
            ]
            if unseen:
                self.broken(
                    "verified", f"rows {unseen} of operator {number}'s answer were not ({product.label})"
                )

    def sent(
        self, client: str, worker: SimulatedWorker, request: WorkRequest, messages: Sequence[bytes]
    ) -> Attempt:
        """A request is on its way to a worker."""
        self.attempts += 1
        if (client, worker) in self.liars:
            self.broken("quarantine", f"{worker} lied and was asked again")
        header = worker_pb2.MultiplyRequest.FromString(messages[0]).header
        label = request.product.label
        residues = b"".join(worker_pb2.MultiplyRequest.FromString(x).residues for x in messages[1:])
        if header.HasField("seed"):
            rows = [header.seed.key] * header.rows
            drawn = self._keys.get(header.seed.key)
            entries = [drawn and replace(drawn, row=header.seed.row_offset + i) for i in range(header.rows)]
        else:
            sent = np.frombuffer(residues, "<u4").reshape(header.rows, header.columns)
            rows = [row.tobytes() for row in sent]
            entries = [self._rows.get(_digest(row)) for row in sent]
        # What is said of a row besides itself, wherever an operand is cut.
        header.ClearField("rows")
        header.seed.row_offset = 0
        said = header.SerializeToString()
        self.pieces += bool(entries[0] and entries[0].row)
        is_repeated = False
        for place, (row, entry) in enumerate(zip(rows, entries, strict=True)):
            if entry is None:
                self.broken("recipient", f"{worker} got bytes that no mask source made ({label})")
                break
            if (entry.recipient, entry.product) != (worker.operator, label):
                self.broken("recipient", f"{worker} got a share of operator {entry.recipient} ({label})")
            if entries[0] and entry.row != entries[0].row + place:
                self.broken("same bytes", f"rows of {label} travelled in another order")
            key = entry.operand, worker.operator, entry.row
            digest = hashlib.sha256(said + row).digest()
            is_repeated |= key in self._sent
            if self._sent.setdefault(key, digest) != digest:
                self.broken("same bytes", f"{worker} got other bytes than the attempt before ({label})")
        self.repeated += is_repeated
        return Attempt(self, client, worker, request)


def _digest(row: Residues | NDArray[np.int64]) -> bytes:
    return hashlib.blake2b(row.astype("<u4").tobytes(), digest_size=16).digest()
