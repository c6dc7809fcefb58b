"""Every exception that Blindtune raises on purpose.

    BlindtuneError
    ├── ConfigurationError      what the user asked for cannot be done: the message says what to change
    ├── DataError               a record of the private data cannot be used: the message says which and why
    ├── UnsupportedError        a model, adapter or precision that the protocol cannot serve
    ├── CheckpointError         the checkpoint cannot be read, or is not the one expected
    ├── KitError                the client kit is missing, damaged or of another version
    ├── RecordError             a training record is broken, or is not of what it is shown with
    ├── ResourceError           memory or disk does not suffice
    ├── FixedPointError         verified results are damaged, or wrap around the modulus too often
    ├── InterruptedRunError     the user stopped a run, which can be resumed
    └── ProtocolError           something went wrong with a worker
        ├── VerificationError   a response is not the product that was asked for
        ├── IncompatibleWorkerError   other model, other quantization, other protocol version
        └── OperatorUnavailableError  no worker of an operator can answer
            └── UntrustworthyOperatorError  nor may one be asked: its workers gave wrong answers

Messages name layers, shapes, rows and addresses. They never hold operands, scales, masks or data.
"""

__all__ = [
    "BlindtuneError",
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "FixedPointError",
    "IncompatibleWorkerError",
    "InterruptedRunError",
    "KitError",
    "OperatorUnavailableError",
    "ProtocolError",
    "RecordError",
    "ResourceError",
    "UnsupportedError",
    "UntrustworthyOperatorError",
    "VerificationError",
]


class BlindtuneError(Exception):
    """Base of all errors that Blindtune raises on purpose.

    A message may quote a name out of a file or from a worker: what is not printable shows as an escape, so
    that no quotation steers a terminal.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class ConfigurationError(BlindtuneError):
    """What the user asked for cannot be done as it stands."""


class DataError(BlindtuneError):
    """The private data cannot be used as it stands; the message says where, and never what it says."""


class UnsupportedError(BlindtuneError):
    """A model, adapter or precision that the protocol cannot serve."""


class CheckpointError(BlindtuneError):
    """The checkpoint cannot be read, or is not the one expected."""


class KitError(BlindtuneError):
    """The client kit is missing, damaged or of another version."""


class RecordError(BlindtuneError):
    """A training record is broken, or is not the record of what it is shown with."""


class ResourceError(BlindtuneError):
    """Memory or disk does not suffice."""


class FixedPointError(BlindtuneError):
    """Results of a certified parameter set are damaged although verified, or too many of them wrap around."""


class InterruptedRunError(BlindtuneError):
    """The user stopped a run, which can be resumed."""


class ProtocolError(BlindtuneError):
    """Something went wrong between the client and a worker."""


class VerificationError(ProtocolError):
    """A response is not the product that was asked for."""


class IncompatibleWorkerError(ProtocolError):
    """A worker that serves another model, quantization or protocol version."""


class OperatorUnavailableError(ProtocolError):
    """No worker of an operator can answer."""


class UntrustworthyOperatorError(OperatorUnavailableError):
    """Workers of an operator gave wrong answers, and none is left that may be asked."""
