"""Requests to a worker as bytes: valid ones, damaged ones, and headers with anything in them."""

from collections.abc import Sequence

import numpy as np
from fuzzing import spoiled
from hypothesis import strategies as st

from blindtune.proto import PROTOCOL_VERSION, worker_pb2
from blindtune.protocol.expansion import Seed
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Product

__all__ = ["MARK", "streams", "valid_request"]

MARK = b"SECR"
"""A residue that every operand here is full of; no message may hold it."""
_KEY = MARK * 8
_NUMBERS = st.sampled_from([0, 1, 2, 5, 16, 32, 64, 2**16, 2**31 - 1, 2**31, 2**32 - 1])


def valid_request(
    product: Product, fingerprint: str, rows: int = 5, seed: Seed | None = None
) -> list[worker_pb2.MultiplyRequest]:
    """The messages of a request whose operand is `MARK` everywhere, or a seed's expansion."""
    header = worker_pb2.MultiplyHeader(
        protocol_version=PROTOCOL_VERSION,
        fingerprint=fingerprint,
        parameter_set=Q31.name,
        product=worker_pb2.Product(
            direction=int(product.direction),  # type: ignore[arg-type]
            spans=[worker_pb2.Span(layer=x.layer, start=x.start, stop=x.stop) for x in product.spans],
        ),
        rows=rows,
        columns=product.contraction,
    )
    if seed is not None:
        header.seed.key, header.seed.row_offset = seed.key, seed.row_offset
        return [worker_pb2.MultiplyRequest(header=header)]
    operand = np.full((rows, product.contraction), int.from_bytes(MARK, "little"), "<u4")
    parts = [operand[:2], operand[2:]]
    return [
        worker_pb2.MultiplyRequest(header=header),
        *(worker_pb2.MultiplyRequest(residues=x.tobytes()) for x in parts if len(x)),
    ]


@st.composite
def _headers(draw: st.DrawFn, layers: Sequence[str], fingerprint: str) -> bytes:
    """A header with any number in any place, most of it right."""
    header = worker_pb2.MultiplyHeader(
        protocol_version=draw(st.sampled_from([PROTOCOL_VERSION] * 8 + [0, 2**32 - 1])),
        fingerprint=draw(st.sampled_from([fingerprint] * 8 + ["", "\x1b[2J" * 100, "x" * 100_000])),
        parameter_set=draw(st.sampled_from([Q31.name] * 8 + ["", "mlwe1280", "\n\u202e"])),
        rows=draw(_NUMBERS),
        columns=draw(_NUMBERS),
    )
    header.product.direction = draw(st.sampled_from([1, 2, 0, 3, -1, 2**31 - 1]))  # type: ignore[assignment]
    names = st.sampled_from([*layers] * 3 + ["", "\x1b[2J\n", "../x", "x" * 10_000, MARK.decode()])
    spans = st.tuples(names, _NUMBERS, _NUMBERS)
    for layer, start, stop in draw(
        st.lists(spans, max_size=4) | st.lists(spans, min_size=1, max_size=1).map(lambda x: x * 70)
    ):
        header.product.spans.add(layer=layer, start=start, stop=stop)
    if draw(st.booleans()):
        header.seed.key = draw(st.sampled_from([_KEY, b"", _KEY[:-1], _KEY * 100]))
        header.seed.row_offset = draw(st.sampled_from([0, 1, 2**63 - 1, 2**63, 2**64 - 1]))
    return worker_pb2.MultiplyRequest(header=header).SerializeToString()


@st.composite
def streams(
    draw: st.DrawFn,
    valid: Sequence[list[worker_pb2.MultiplyRequest]],
    layers: Sequence[str],
    fingerprint: str,
) -> list[bytes]:
    """The messages of a request, as bytes: damaged, missing, repeated, out of order, made up."""
    messages = [x.SerializeToString() for x in draw(st.sampled_from(valid))]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(messages)))
        match draw(st.sampled_from(["spoil", "drop", "repeat", "shuffle", "header", "made up"])):
            case "spoil" if at < len(messages):
                messages[at] = draw(spoiled(st.just(messages[at])))
            case "drop":
                del messages[at : at + 1]
            case "repeat":
                messages[at:at] = messages[at : at + 1] * draw(st.sampled_from([1, 2, 50]))
            case "shuffle":
                messages = draw(st.permutations(messages))
            case "header":
                messages[:1] = [draw(_headers(layers, fingerprint))]
            case _:
                rows = worker_pb2.MultiplyRequest(residues=draw(st.sampled_from([b"", b"x", b"\xff" * 128])))
                unknown = b"\x7a\x04none"
                messages.insert(
                    at, draw(st.binary(max_size=30) | st.sampled_from([rows.SerializeToString(), unknown]))
                )
    return messages
