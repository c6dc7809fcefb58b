"""Messages that carry rows and nothing else, written and read without a protobuf object.

`MultiplyRequest` and `MultiplyResponse` are, but for the header, one field of bytes:

    tag (number << 3 | 2), length (varint), the rows

A protobuf object would copy the rows into itself and out again at each end. Here they are copied once into
the message, and read where they lie. The bytes are those that protobuf writes. Whatever else protobuf would
read as the same message (fields twice, or unknown ones) is left to it.
"""

import numpy as np
from numpy.typing import NDArray

from blindtune.proto import worker_pb2

__all__ = ["REQUEST_ROWS", "RESPONSE_ROWS", "RowsField"]


class RowsField:
    """The field that holds the rows.

    Args:
        number: of the field.
    """

    def __init__(self, number: int) -> None:
        self._tag = bytes([number << 3 | 2])

    def message(self, rows: NDArray[np.uint8]) -> bytes:
        """A message of the bytes of some rows, at least one."""
        return b"".join((self._tag, _varint(rows.nbytes), rows.data.cast("B")))

    def rows(self, message: bytes) -> memoryview | None:
        """The rows' bytes inside a message, or None if it says it in any other way than `message`."""
        if message[:1] != self._tag:
            return None
        size = 0
        for place, byte in enumerate(message[1:5]):
            size |= (byte & 127) << 7 * place
            if byte < 128:
                start = 2 + place
                return memoryview(message)[start:] if len(message) - start == size else None
        return None


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


REQUEST_ROWS = RowsField(worker_pb2.MultiplyRequest.RESIDUES_FIELD_NUMBER)
RESPONSE_ROWS = RowsField(worker_pb2.MultiplyResponse.RESIDUES_FIELD_NUMBER)
