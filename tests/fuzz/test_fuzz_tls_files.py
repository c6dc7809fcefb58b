"""Certificates and keys of any bytes: usable, or one error that names the file and quotes nothing of it."""

import re
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, x448
from fuzzing import examples, refused_or_fine, spoiled
from hypothesis import example, given
from hypothesis import strategies as st

from blindtune.client.config.blind_config import Operator
from blindtune.client.preflight.certificates import check_files
from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates
from blindtune.client.tls.files import public_keys, require_key_of
from blindtune.errors import BlindtuneError, ConfigurationError


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> OperatorCertificates:
    return issue_operator_certificates(tmp_path_factory.mktemp("certificates"), "alpha")


def _pem(key: object) -> bytes:
    return key.private_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _of_version_5(pem: bytes) -> bytes:
    der = x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
    der = der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x05", 1)
    return ssl.DER_cert_to_PEM_cert(der).encode()


def _locked() -> bytes:
    return x448.X448PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )


def test_spoiled_certificates_are_usable_or_refused(issued: OperatorCertificates, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    operator = Operator("alpha", ["127.0.0.1:1"], ca=path, cert=path, key=issued.client_key)

    @examples(200)
    @given(content=spoiled(st.just(issued.ca.read_bytes())) | st.binary(max_size=100))
    @example(content=_of_version_5(issued.ca.read_bytes()))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with refused_or_fine(path):
            assert public_keys(path, "alpha")
        for finding in check_files(operator):
            assert finding.detail

    check()


def test_spoiled_keys_are_usable_or_refused_and_never_quoted(
    issued: OperatorCertificates, tmp_path: Path
) -> None:
    path = tmp_path / "key.pem"
    valid = issued.client_key.read_bytes()
    body = re.sub(rb"-----[^-]+-----|\s", b"", valid).decode()

    @examples(200)
    @given(content=spoiled(st.just(valid)) | st.binary(max_size=100))
    @example(content=_pem(dsa.generate_private_key(2048)))
    @example(content=_pem(x448.X448PrivateKey.generate()))
    @example(content=_locked())
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with refused_or_fine(path):
            try:
                require_key_of(issued.client, path, "alpha")
            except BlindtuneError as error:
                assert not any(body[i : i + 12] in str(error) for i in range(0, len(body), 12))
                raise

    check()


def test_another_key_is_refused(issued: OperatorCertificates) -> None:
    with pytest.raises(ConfigurationError, match="is not the key of"):
        require_key_of(issued.client, issued.worker_key, "alpha")
