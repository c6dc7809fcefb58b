"""The files that a client needs of an operator: whole, belonging together, and valid today."""

import stat
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from blindtune.client.config.blind_config import Operator
from blindtune.client.preflight.finding import Finding
from blindtune.client.tls.files import read_token, require_key_of
from blindtune.errors import ConfigurationError

__all__ = ["check_files", "check_validity"]

_SOON = timedelta(days=7)


def check_files(operator: Operator, now: datetime | None = None) -> Iterator[Finding]:
    """Checks the CA, and the client's certificate and its key, or its token.

    Args:
        operator: with ``ca``, and with ``cert`` and ``key``, or ``token``.
        now: the system clock's time unless given.
    """
    now = now or datetime.now(UTC)
    renew = f"ask operator {operator.name} for a new one"
    files = [("CA", operator.ca)]
    if operator.cert is not None or operator.token is None:
        files.append(("client certificate", operator.cert))
    for what, path in files:
        check = f"{operator.name} {what}"
        try:
            certificates = x509.load_pem_x509_certificates(Path(path or "").read_bytes())
        except (OSError, ValueError, x509.InvalidVersion) as error:
            # An error of the parser could quote the file.
            reason = error.strerror if isinstance(error, OSError) else "it is no certificate in PEM"
            yield Finding(check, "problem", f"{path} cannot be used: {reason}", renew)
        else:
            yield check_validity(check, certificates, now, renew, alternatives=what == "CA")
    if len(files) > 1:
        yield _key(operator)
    if operator.token is not None:
        yield _token(operator, Path(operator.token))


def check_validity(
    check: str, certificates: Sequence[x509.Certificate], now: datetime, fix: str, alternatives: bool = False
) -> Finding:
    """Whether certificates are valid at a time, and for how long.

    Args:
        check: name of the finding.
        certificates: at least one.
        now: with a time zone.
        fix: what to do when they are not.
        alternatives: one that is valid suffices; otherwise they are a chain, and all must be.
    """
    spans = [(x.not_valid_before_utc, x.not_valid_after_utc) for x in certificates]
    if alternatives:
        # Of those that are valid the one that lasts, and if none is, the one that comes closest.
        start, end = max(spans, key=lambda x: (x[0] <= now, x[1]))
    else:
        start, end = max(x[0] for x in spans), min(x[1] for x in spans)
    if now < start:
        return Finding(
            check,
            "problem",
            f"not valid before {start:%Y-%m-%d %H:%M} UTC; this machine's clock shows {now:%Y-%m-%d %H:%M}",
            f"set the clock right, or {fix}",
        )
    if now > end:
        return Finding(check, "problem", f"expired on {end:%Y-%m-%d %H:%M} UTC", fix)
    detail = f"valid until {end:%Y-%m-%d}, {(end - now).days} days"
    if end - now < _SOON:
        return Finding(check, "warning", detail, f"{fix}, before a run outlives it")
    return Finding(check, "ok", detail)


def _key(operator: Operator) -> Finding:
    check, path = f"{operator.name} client key", Path(operator.key or "")
    try:
        require_key_of(Path(operator.cert or ""), path, operator.name)
        mode = path.stat().st_mode
    except (ConfigurationError, OSError) as error:
        return Finding(
            check,
            "problem",
            str(error),
            "name the unencrypted key that was made together with the client's certificate",
        )
    return _exposed(check, path, mode) or Finding(check, "ok", "belongs to the client certificate")


def _token(operator: Operator, path: Path) -> Finding:
    check = f"{operator.name} token"
    try:
        read_token(path, operator.name)
        mode = path.stat().st_mode
    except (ConfigurationError, OSError) as error:
        return Finding(check, "problem", str(error), f"ask operator {operator.name} for a new one")
    return _exposed(check, path, mode) or Finding(check, "ok", "can be read; the worker judges it")


def _exposed(check: str, path: Path, mode: int) -> Finding | None:
    if not mode & (stat.S_IROTH | stat.S_IWOTH):
        return None
    return Finding(check, "warning", f"every user of this machine can use {path}", f"chmod 600 {path}")
