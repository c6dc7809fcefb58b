"""Development certificates for mutual TLS: one small certificate authority for each operator.

Guaranteed: every call makes a fresh CA, so no certificate is accepted where another operator's CA
is pinned; worker certificates serve only the given hosts and cannot act as clients, nor clients as
workers; keys are never readable by other users; an operator's files appear together or not at all.

Not guaranteed: separation of operators. Whoever runs this holds every key, the CA's included,
unencrypted on one disk, and nothing can be revoked before it expires. Between real operators use an
existing PKI, or let each operator make its CA on its own machine, keep ``ca-key.pem`` and
``worker-key.pem`` there, and give the client only ``ca.pem`` and a client certificate.

The library ``trustme`` makes certificates for tests: each serves clients, servers and signatures of code
alike, until the year 3000.
"""

import ipaddress
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from blindtune.errors import ConfigurationError

__all__ = ["DEFAULT_HOSTS", "OperatorCertificates", "issue_operator_certificates"]

DEFAULT_HOSTS = ("localhost", "127.0.0.1", "::1")
_MAX_DAYS = 397
# Machines' clocks differ a little: certificates are valid from shortly before they are made.
_CLOCK_SKEW = timedelta(minutes=5)

_OPERATOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
# A last label of digits alone would be a mistyped IPv4 address.
_DNS_NAME = re.compile(rf"(?=.{{1,253}}\Z)({_LABEL}\.)*(?![0-9]+\Z){_LABEL}")


@dataclass(frozen=True)
class OperatorCertificates:
    """Paths of one operator's PEM files, not their contents."""

    ca: Path
    ca_key: Path
    worker: Path
    worker_key: Path
    client: Path
    client_key: Path

    @property
    def for_clients(self) -> dict[str, Path]:
        """What a client names of them, as recipes and `Operator` call it."""
        return {"ca": self.ca, "cert": self.client, "key": self.client_key}


def issue_operator_certificates(
    directory: Path,
    operator: str,
    hosts: Sequence[str] = DEFAULT_HOSTS,
    days: int = 30,
    *,
    now: datetime | None = None,
) -> OperatorCertificates:
    """Make a CA for ``operator`` and with it one worker and one client certificate (EC P-256).

    Args:
        directory: where the folder ``operator`` is made; created if missing.
        operator: 1 to 40 letters, digits, '-' or '_', starting with a letter or digit.
        hosts: DNS names and IP addresses, without ports, at which clients reach the workers.
        days: validity of all three certificates, 1 to 397 days from ``now``.
        now: the time of issue; the system clock's unless given.

    Raises:
        ConfigurationError: a wrong argument, ``directory/operator`` holds files already, or a
            file cannot be written; nothing in ``directory`` is then changed.
    """
    if not _OPERATOR.fullmatch(operator):
        rule = "1 to 40 letters, digits, '-' or '_', starting with a letter or digit"
        raise ConfigurationError(f"operator name {operator!r} is not usable: give {rule}")
    where = f"operator {operator}"
    if not 1 <= days <= _MAX_DAYS:
        raise ConfigurationError(f"{where}: cannot be valid for {days} days: give 1 to {_MAX_DAYS}")
    if isinstance(hosts, str) or not hosts:
        raise ConfigurationError(f"{where}: no list of hosts: give the workers' names or addresses")
    names = x509.SubjectAlternativeName([_host(where, host) for host in dict.fromkeys(hosts)])
    start = (now or datetime.now(UTC)).astimezone(UTC)
    files = _issue(operator, names, start - _CLOCK_SKEW, start + timedelta(days=days))
    target = Path(directory) / operator
    try:
        _write_all(target, files)
    except OSError as error:
        what = f"certificates cannot be written to {target} ({error.strerror})"
        raise ConfigurationError(f"{what}: give a folder you can write to") from error
    return OperatorCertificates(*(target / name for name in files))


def _host(where: str, host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if _DNS_NAME.fullmatch(host):
            return x509.DNSName(host)
    rule = "a DNS name or IP address without port, brackets or wildcard"
    raise ConfigurationError(f"{where}: host {host!r} is not usable: give {rule}")


def _issue(
    operator: str, names: x509.SubjectAlternativeName, start: datetime, end: datetime
) -> dict[str, bytes]:
    """PEM contents by file name, in the order of ``OperatorCertificates``' fields."""
    keys = {role: ec.generate_private_key(ec.SECP256R1()) for role in ("ca", "worker", "client")}
    ca_id = x509.SubjectKeyIdentifier.from_public_key(keys["ca"].public_key())
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id)
    usages: dict[str, list[x509.ExtensionType]] = {
        "ca": [],
        "worker": [x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), names],
        "client": [x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])],
    }
    files: dict[str, bytes] = {}
    for role, key in keys.items():
        is_ca = role == "ca"
        issuer, subject, public = _name(operator, "ca"), _name(operator, role), key.public_key()
        serial = x509.random_serial_number()
        builder = x509.CertificateBuilder(issuer, subject, public, serial, start, end)
        limits = x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None)
        builder = builder.add_extension(limits, critical=True)
        # A CA signs certificates and revocation lists, the others sign handshakes; nothing else.
        usage = x509.KeyUsage(not is_ca, False, False, False, False, is_ca, is_ca, False, False)
        builder = builder.add_extension(usage, critical=True)
        subject_id = x509.SubjectKeyIdentifier.from_public_key(public)
        for extension in (subject_id, issuer_id, *usages[role]):
            builder = builder.add_extension(extension, critical=False)
        certificate = builder.sign(keys["ca"], hashes.SHA256())
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        files |= {f"{role}.pem": certificate.public_bytes(Encoding.PEM), f"{role}-key.pem": secret}
    return files


def _name(operator: str, role: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{operator} development {role}")])


def _write_all(target: Path, files: dict[str, bytes]) -> None:
    """Write into a hidden folder beside ``target``, then rename: ``target`` is whole or absent."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as hidden:
        partial = Path(hidden, target.name)
        partial.mkdir(mode=0o700)
        for name, content in files.items():
            mode = 0o600 if name.endswith("-key.pem") else 0o644
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with os.fdopen(os.open(partial / name, flags, mode), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        try:
            # The system itself refuses if target holds files, even ones made this instant.
            partial.rename(target)
        except OSError as error:
            what = f"{target} already exists and is left as it is ({error.strerror})"
            raise ConfigurationError(f"{what}: remove it or give another folder") from error
