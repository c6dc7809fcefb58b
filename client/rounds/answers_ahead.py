"""What operators multiply before its operand is known.

All shares but the last are masks (`MaskSource.draw_ahead`). A model asks for the same products in the same
order in every step, so while workers compute one product, the mask of the next can be on its way already,
and of its operand only the last share's answer remains to be waited for.
"""

import threading
from collections import OrderedDict

from blindtune.client.operators.operator import Pending
from blindtune.protocol.masks import Share
from blindtune.protocol.products import Product

__all__ = ["AnswersAhead", "ProductOrder"]

_MOST, _MOST_BYTES = 64, 128 << 20


class ProductOrder:
    """In which order products are asked for, as each thread goes through a model by itself."""

    def __init__(self) -> None:
        self._after: dict[Product, tuple[Product, bool]] = {}
        self._thread = threading.local()

    def following(self, product: Product, rows: int) -> Product | None:
        """Notes that this thread asks for a product.

        Returns:
            What came after it the last time, with as many rows as the product itself, unless it was something
            else the time before: with gradient checkpointing, forward products are asked for in two orders.
        """
        last: tuple[Product, int] | None = getattr(self._thread, "last", None)
        self._thread.last = product, rows
        if last is not None:
            before, _ = self._after.get(last[0], (product, True))
            self._after[last[0]] = product, before == product and last[1] == rows
        following, is_sure = self._after.get(product, (None, False))
        return following if is_sure else None


class AnswersAhead:
    """Answers that shares wait for before their operand is known.

    Args:
        most, most_bytes: of answers. Beyond it the older ones are let go of, and have to be asked for again.
    """

    def __init__(self, most: int = _MOST, most_bytes: int = _MOST_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._lock = threading.Lock()
        self._pending: OrderedDict[Share, Pending] = OrderedDict()

    def put(self, share: Share, pending: Pending) -> None:
        """Keeps what was asked for."""
        with self._lock:
            self._pending[share] = pending
            while len(self._pending) > 1 and self._are_too_many():
                self._pending.popitem(last=False)

    def take(self, share: Share) -> Pending | None:
        """What was asked for with this very share, or None."""
        with self._lock:
            return self._pending.pop(share, None)

    def clear(self) -> None:
        """Lets go of all."""
        with self._lock:
            self._pending.clear()

    def _are_too_many(self) -> bool:
        size = sum(x.nbytes for x in self._pending.values())
        return len(self._pending) > self._most or size > self._most_bytes
