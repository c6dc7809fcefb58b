"""Scripts tell by the exit status what went wrong, so every error has one, and no two mean the same."""

import signal

from blindtune import errors
from blindtune.client.process.exit_codes import ExitCode, exit_code

ERRORS = {name: getattr(errors, name) for name in errors.__all__}


def test_every_error_of_ours_has_a_status_that_says_which() -> None:
    for name, kind in ERRORS.items():
        expected_to_be_known = kind is not errors.BlindtuneError
        assert (exit_code(kind("what happened")) is not ExitCode.UNEXPECTED) == expected_to_be_known, name


def test_statuses_are_unique_and_leave_those_alone_that_shells_use() -> None:
    values = [int(x) for x in ExitCode.__members__.values()]
    assert len(set(values)) == len(ExitCode.__members__) == len(ExitCode)
    by_a_signal = {128 + number for number in (signal.SIGINT, signal.SIGPIPE)}
    assert all(0 <= x < 64 or x in by_a_signal for x in values)
    assert all(x.meaning.strip() for x in ExitCode)


def test_the_narrower_error_decides() -> None:
    assert exit_code(errors.OperatorUnavailableError("x")) is ExitCode.UNAVAILABLE
    assert exit_code(errors.UntrustworthyOperatorError("x")) is ExitCode.UNTRUSTWORTHY
    assert exit_code(errors.VerificationError("x")) is ExitCode.WORKER
    assert exit_code(errors.IncompatibleWorkerError("x")) is ExitCode.WORKER
    assert exit_code(errors.ConfigurationError("x")) is ExitCode.CONFIGURATION
    assert exit_code(errors.DataError("x")) is ExitCode.DATA
    assert exit_code(errors.InterruptedRunError("x")) == 130


def test_an_error_that_is_added_without_a_status_is_noticed() -> None:
    class Forgotten(errors.BlindtuneError):
        """One that nobody listed."""

    assert exit_code(Forgotten("x")) is ExitCode.UNEXPECTED
