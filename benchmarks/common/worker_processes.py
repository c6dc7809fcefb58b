"""Real workers in processes of their own, for benchmarks: started, killed, drained, with certificates."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

__all__ = ["HONEST", "LIAR", "WorkerProcess", "reissued", "replace_file"]

HONEST = ("-m", "blindtune.server")
LIAR = (str(Path(__file__).with_name("lying_worker.py")),)
_START_SECONDS = 240
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class WorkerProcess:
    """A worker at an address that stays the same over its restarts.

    Args:
        program: arguments of Python, `HONEST` or `LIAR`.
        options: of ``serve``, but for ``--listen``.
        host: where it listens, at a port that is free when it first starts.
        log: file for what it writes to stderr, over all its lives.

    Attributes:
        starts: how often it was started.
        environment: variables of its next life.
    """

    def __init__(self, program: Sequence[str], options: Sequence[str], host: str, log: Path) -> None:
        self.host = host
        self.port = 0
        self.log = log
        self.starts = 0
        self.environment: dict[str, str] = {}
        self._command = [sys.executable, *program, "serve", *options]
        self._process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        """``HOST:PORT``, once it has listened for the first time."""
        return f"{self.host}:{self.port}"

    @property
    def process(self) -> subprocess.Popen[str]:
        """Its present life."""
        if self._process is None:
            raise RuntimeError(f"worker {self.address} was never started")
        return self._process

    @property
    def is_running(self) -> bool:
        """Whether the process lives, listening or not yet."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts it, without waiting for it to listen."""
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [*self._command, "--listen", self.address],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | _ENVIRONMENT | self.environment,
            )
        self.starts += 1

    def wait_until_listening(self) -> dict[str, str]:
        """Waits, and returns what it announced.

        Raises:
            RuntimeError: it ended instead.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker {self.address} ended: {self.log.read_text()[-2000:]}")
        announced = json.loads(line)
        self.port = int(announced["port"])
        return announced

    def signal(self, number: int) -> None:
        """Sends it a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Ends it as a crash would."""
        if self.is_running:
            self.process.kill()
        self._reap()

    def drain(self) -> int:
        """Asks it to end, waits for that, and returns its exit code."""
        self.signal(signal.SIGTERM)
        return self._reap()

    def _reap(self) -> int:
        code = self.process.wait(_START_SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


def replace_file(path: Path, content: bytes) -> None:
    """Puts a file in the place of another, as a whole."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.touch(0o600)
    fresh.write_bytes(content)
    fresh.replace(path)


def reissued(certificate: Path, ca: Path, ca_key: Path) -> tuple[bytes, bytes]:
    """The same certificate with a new key, signed by an authority: PEM of both."""
    old = x509.load_pem_x509_certificate(certificate.read_bytes())
    issuer = x509.load_pem_x509_certificate(ca.read_bytes())
    signer = load_pem_private_key(ca_key.read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateBuilder(
        issuer.subject,
        old.subject,
        key.public_key(),
        x509.random_serial_number(),
        old.not_valid_before_utc,
        old.not_valid_after_utc,
    )
    issuer_id = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    for extension in old.extensions:
        value = extension.value
        if isinstance(value, x509.SubjectKeyIdentifier):
            value = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        elif isinstance(value, x509.AuthorityKeyIdentifier):
            value = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id)
        builder = builder.add_extension(value, extension.critical)
    signed = builder.sign(signer, hashes.SHA256())
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return signed.public_bytes(Encoding.PEM), secret
