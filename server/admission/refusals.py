"""Why a worker refuses a request, and the gRPC status that says so.

    Refusal
    ├── MalformedRequest     INVALID_ARGUMENT      no request that follows the contract looks like this
    ├── LayerNotHeld         NOT_FOUND             another worker may hold the layer
    ├── OtherContract        FAILED_PRECONDITION   other model, protocol version or parameter set
    ├── OverLimit            OUT_OF_RANGE          larger than the manifest's limits allow
    ├── Unauthenticated      UNAUTHENTICATED       no token, or one that is not valid
    ├── Busy                 RESOURCE_EXHAUSTED    too many requests at once: try again, or elsewhere
    │   ├── Displaced        RESOURCE_EXHAUSTED    the same, after it waited: the queue is full
    │   └── TooLate          RESOURCE_EXHAUSTED    the same: its deadline would pass before its answer
    ├── Draining             UNAVAILABLE           this worker is shutting down: go elsewhere
    └── CannotRecord         UNAVAILABLE           it must record all it gets, and can't: go elsewhere

Messages name layers, shapes and versions. They never hold words of an operand, or a key.
"""

from typing import ClassVar

import grpc

from blindtune.errors import ProtocolError

__all__ = [
    "Busy",
    "CannotRecord",
    "Displaced",
    "Draining",
    "LayerNotHeld",
    "MalformedRequest",
    "OtherContract",
    "OverLimit",
    "Refusal",
    "TooLate",
    "Unauthenticated",
]


class Refusal(ProtocolError):
    """A request that this worker does not serve."""

    code: ClassVar[grpc.StatusCode]


class MalformedRequest(Refusal):
    """The request does not follow the contract."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class LayerNotHeld(Refusal):
    """The request names a layer that this worker does not hold."""

    code = grpc.StatusCode.NOT_FOUND


class OtherContract(Refusal):
    """Client and worker disagree about model, protocol version or parameters."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class OverLimit(Refusal):
    """The request is larger than the manifest's limits allow, so trying again would not help."""

    code = grpc.StatusCode.OUT_OF_RANGE


class Unauthenticated(Refusal):
    """The request carries no token, or one that is not valid."""

    code = grpc.StatusCode.UNAUTHENTICATED


class Busy(Refusal):
    """As many requests as allowed run and wait, or came from this client in a short time."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Displaced(Busy):
    """The request waited, the queue is full, and a client with fewer requests in it came by."""


class TooLate(Busy):
    """The answer would not be there before the request's deadline."""


class Draining(Refusal):
    """The worker finishes what it has begun and takes nothing new."""

    code = grpc.StatusCode.UNAVAILABLE


class CannotRecord(Refusal):
    """The worker is to record whatever it receives, and its recording has ended."""

    # Not RESOURCE_EXHAUSTED, which tells a client that this worker may soon have room again.
    code = grpc.StatusCode.UNAVAILABLE
