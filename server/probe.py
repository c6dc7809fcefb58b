"""Is a worker well? Asked over the standard health service, for supervisors of containers."""

import time
from dataclasses import dataclass
from pathlib import Path

import grpc
import tenacity
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blindtune.common.listening import host_and_port, is_loopback
from blindtune.errors import ConfigurationError, OperatorUnavailableError
from blindtune.proto import worker_pb2

__all__ = ["ProbeTls", "probe"]

_PAUSE_SECONDS = 0.1
_BUSY = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
_SERVING = health_pb2.HealthCheckResponse.SERVING
# A worker that is asked through a proxy may be another one than the address names.
_NO_PROXY = [("grpc.enable_http_proxy", 0)]


@dataclass(frozen=True)
class ProbeTls:
    """How a probe knows the worker, and the worker the probe.

    Attributes:
        ca: the CA of the worker's certificate.
        certificate, key: of a client; needed where the worker asks for client certificates.
        name: a host that the worker's certificate is for, if it isn't for the address.
    """

    ca: Path
    certificate: Path | None = None
    key: Path | None = None
    name: str | None = None

    def channel(self, address: str) -> grpc.Channel:
        """A connection to a worker.

        Raises:
            ConfigurationError: a file can't be read, or is empty.
        """
        if (self.certificate is None) != (self.key is None):
            raise ConfigurationError("--tls-cert and --tls-key belong together: give both or neither")
        credentials = grpc.ssl_channel_credentials(
            _content(self.ca),
            None if self.key is None else _content(self.key),
            None if self.certificate is None else _content(self.certificate),
        )
        options = [("grpc.ssl_target_name_override", self.name)] if self.name else []
        return grpc.secure_channel(address, credentials, [*options, *_NO_PROXY])


def probe(address: str, tls: ProbeTls | None, insecure: bool, seconds: float) -> None:
    """Returns if a worker serves.

    Args:
        address: ``HOST:PORT``.
        tls: None for plaintext.
        insecure: whether plaintext is meant.
        seconds: to wait for an answer.

    Raises:
        ConfigurationError: it can't be asked like that.
        OperatorUnavailableError: it does not answer, or does not serve.
    """
    host, port = host_and_port(address)
    if (tls is None) is not insecure or not port:
        raise ConfigurationError("give the worker's HOST:PORT, and either --tls-ca or --insecure")
    if insecure and not is_loopback(host):
        raise ConfigurationError(f"--insecure needs a loopback address such as 127.0.0.1, not {host}")
    channel = tls.channel(address) if tls else grpc.insecure_channel(address, _NO_PROXY)
    with channel:
        service = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            status = _checked(health_pb2_grpc.HealthStub(channel), request, seconds).status
        except grpc.RpcError as error:
            details = " ".join(str(error.details()).split())
            raise OperatorUnavailableError(
                f"{address} does not answer ({error.code().name}: {details}): check that a worker runs "
                "there, and the TLS options"
            ) from None
    if status != _SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
        raise OperatorUnavailableError(f"{address} is {name}: it shuts down, or has not started")


def _checked(
    stub: health_pb2_grpc.HealthStub, request: health_pb2.HealthCheckRequest, seconds: float
) -> health_pb2.HealthCheckResponse:
    """The answer, which is asked for again while too many others ask.

    gRPC refuses some of a flood of calls before the worker sees them, as if somebody had cancelled them.
    """
    end = time.monotonic() + seconds
    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_busy),
        stop=lambda _: time.monotonic() + _PAUSE_SECONDS > end,
        wait=tenacity.wait_fixed(_PAUSE_SECONDS),
        reraise=True,
    )
    return attempts(lambda: stub.Check(request, timeout=end - time.monotonic()))


def _is_busy(error: BaseException) -> bool:
    return isinstance(error, grpc.RpcError) and error.code() in _BUSY


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    # With an empty CA gRPC would trust every public authority, and with an empty key it ends the process.
    if b"-----BEGIN" not in content:
        raise ConfigurationError(f"{path} holds nothing in PEM")
    return content
