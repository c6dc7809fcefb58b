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

_MOST_BYTES = 128 << 20


class ProductOrder:
    """In which order products are asked for, as each thread goes through a model by itself."""

    def __init__(self) -> None:
        self._after: dict[Product, Product | None] = {}
        self._thread = threading.local()

    def following(self, product: Product, rows: int) -> Product | None:
        """Notes that this thread asks for a product.

        Returns:
            What came after it the last time, if that had as many rows as the product itself.
        """
        last: tuple[Product, int] | None = getattr(self._thread, "last", None)
        self._thread.last = product, rows
        if last is not None:
            self._after[last[0]] = product if last[1] == rows else None
        return self._after.get(product)


class AnswersAhead:
    """Answers that shares wait for before their operand is known.

    Args:
        most_bytes: of answers. Beyond it the older ones are let go of, and have to be asked for again.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._pending: OrderedDict[Share, Pending] = OrderedDict()

    def put(self, share: Share, pending: Pending) -> None:
        """Keeps what was asked for."""
        with self._lock:
            self._pending[share] = pending
            while len(self._pending) > 1 and self._bytes() > self._most_bytes:
                self._pending.popitem(last=False)

    def take(self, share: Share) -> Pending | None:
        """What was asked for with this very share. None, too, if that failed: it may be asked for again."""
        with self._lock:
            pending = self._pending.pop(share, None)
        return None if pending is None or pending.has_failed else pending

    def _bytes(self) -> int:
        return sum(x.nbytes for x in self._pending.values())
