"""The smallest worker there is: one layer of ones, and the header of a request to it."""

import numpy as np
import torch

from blindtune.proto import PROTOCOL_VERSION, worker_pb2
from blindtune.protocol.expansion import KEY_BYTES
from blindtune.protocol.parameters import Q31
from blindtune.protocol.weights import IntegerLayer
from blindtune.server.store import LayerStore

__all__ = ["tiny_header", "tiny_store"]


def tiny_store(outputs: int = 4, columns: int = 8) -> LayerStore:
    """A store of the layer ``w``, int8 [outputs, columns]."""
    layer = IntegerLayer(torch.ones((outputs, columns), dtype=torch.int8), np.ones(outputs, np.float32))
    return LayerStore.from_layers([("w", layer)], model="tiny")


def tiny_header(
    fingerprint: str, rows: int = 1, columns: int = 8, *, seed: bool = True
) -> worker_pb2.MultiplyHeader:
    """The header of a forward product with ``w``, for rows of a seed or rows that follow."""
    return worker_pb2.MultiplyHeader(
        protocol_version=PROTOCOL_VERSION,
        fingerprint=fingerprint,
        parameter_set=Q31.name,
        product=worker_pb2.Product(
            direction=worker_pb2.FORWARD, spans=[worker_pb2.Span(layer="w", start=0, stop=columns)]
        ),
        rows=rows,
        columns=columns,
        seed=worker_pb2.Seed(key=bytes(KEY_BYTES)) if seed else None,
    )
