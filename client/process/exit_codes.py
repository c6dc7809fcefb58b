"""What the exit status of ``blindtune`` says; listed in docs/errors.md."""

import enum

from blindtune.errors import (
    BlindtuneError,
    CheckpointError,
    ConfigurationError,
    DataError,
    FixedPointError,
    InterruptedRunError,
    KitError,
    OperatorUnavailableError,
    ProtocolError,
    RecordError,
    ResourceError,
    UnsupportedError,
    UntrustworthyOperatorError,
)

__all__ = ["ExitCode", "exit_code"]


class ExitCode(enum.IntEnum):
    """The exit status, and when it is given."""

    DONE = 0, "All went well."
    UNEXPECTED = 1, "An error that nobody foresaw. Its traceback is shown: please report it."
    USAGE = 2, "An unknown command or option."
    CONFIGURATION = 3, "The configuration, or a combination of options, cannot work as it stands."
    DATA = 4, "A record of the data cannot be used; file and line are named."
    MODEL = 5, "The model or its kit cannot be read, or the protocol cannot serve it."
    RESOURCE = 6, "Memory or disk does not suffice."
    WORKER = 7, "A worker holds another model, or speaks another protocol version."
    UNAVAILABLE = 8, "An operator has no worker left that answers. What was trained is saved: --resume."
    FINDINGS = 9, "`blindtune check`, `blindtune doctor` or `blindtune audit` found a problem."
    UNTRUSTWORTHY = (
        10,
        "Workers of an operator gave wrong answers, and none is left to ask. What was trained is saved.",
    )
    RECORD = 11, "A training record is broken, or is not the record of what it is shown with."
    DAMAGED = (
        12,
        "Verified results are damaged, or wrap around too often. What was trained is saved: --resume.",
    )
    INTERRUPTED = 130, "The run was stopped by a signal. What was trained is saved: go on with --resume."
    OUTPUT_CLOSED = (
        141,
        "The program that read the output is gone. What was trained is saved: go on with --resume.",
    )

    meaning: str

    def __new__(cls, value: int, meaning: str) -> "ExitCode":
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member


# The first that fits decides.
_CODES: tuple[tuple[type[BlindtuneError], ExitCode], ...] = (
    (ConfigurationError, ExitCode.CONFIGURATION),
    (DataError, ExitCode.DATA),
    (UnsupportedError, ExitCode.MODEL),
    (CheckpointError, ExitCode.MODEL),
    (KitError, ExitCode.MODEL),
    (RecordError, ExitCode.RECORD),
    (ResourceError, ExitCode.RESOURCE),
    (FixedPointError, ExitCode.DAMAGED),
    (InterruptedRunError, ExitCode.INTERRUPTED),
    (UntrustworthyOperatorError, ExitCode.UNTRUSTWORTHY),
    (OperatorUnavailableError, ExitCode.UNAVAILABLE),
    (ProtocolError, ExitCode.WORKER),
)


def exit_code(error: BlindtuneError) -> ExitCode:
    """The exit status for an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.UNEXPECTED)
