"""Whether each worker can be reached, is who it should be, and serves the right model."""

from collections.abc import Iterator

import grpc

from blindtune.client.config.addresses import split_address
from blindtune.client.config.blind_config import BlindConfig, Operator
from blindtune.client.config.parameter_sets import residue_set
from blindtune.client.operators.manifest import Expectations, check_manifest, shown
from blindtune.client.operators.policy import Failure
from blindtune.client.operators.transport import GrpcTransport, TransportError
from blindtune.client.preflight.certificates import check_files
from blindtune.client.preflight.finding import Finding, problem_of, until_a_problem
from blindtune.client.preflight.network import check_address, check_connection
from blindtune.client.preflight.tls import check_plaintext, check_tls
from blindtune.errors import IncompatibleWorkerError
from blindtune.proto import worker_pb2
from blindtune.protocol.parameters import ParameterSet

__all__ = ["check_operators"]


def check_operators(
    config: BlindConfig, expected: Expectations | None, seconds: float = 10.0
) -> Iterator[Finding]:
    """Checks every worker of every operator, the replicas too, as far as each one gets.

    What a worker learns is that a client asked for its manifest.

    Args:
        config: its files may have changed since it was made.
        expected: what each worker must serve; None where no kit is there to say it.
        seconds: for each step of a worker's check.
    """
    if not config.operators:
        yield Finding("operators", "ok", f"masking {config.masking!r} needs none")
    for operator in config.operators:
        # Without TLS there may be no files.
        files = [] if config.insecure else list(check_files(operator))
        yield from files
        usable = all(x.status != "problem" for x in files)
        for address in operator.workers:
            yield from _check_worker(config, operator, address, expected, seconds, usable)


def _check_worker(
    config: BlindConfig,
    operator: Operator,
    address: str,
    expected: Expectations | None,
    seconds: float,
    usable: bool,
) -> Iterator[Finding]:
    who = f"{operator.name} {address}"
    host, port = split_address(address, operator.name)
    if config.insecure:
        security = check_plaintext(who, host, port, seconds)
    else:
        security = check_tls(who, operator, host, port, seconds)
    reachable = (check_address(who, host, port), check_connection(who, host, port, seconds))
    transport = GrpcTransport(operator, address, config.insecure)
    parameters = residue_set(config.masking, config.parameter_set)
    served = _check_manifest(who, transport, expected, parameters, seconds)
    yield from until_a_problem(*reachable, *((security, served) if usable else ()))


def _check_manifest(
    who: str,
    transport: GrpcTransport,
    expected: Expectations | None,
    parameters: ParameterSet,
    seconds: float,
) -> Iterator[Finding]:
    check = f"{who} manifest"
    try:
        manifest = transport.manifest(seconds)
    except TransportError as error:
        if error.failure is Failure.BUSY:
            fix = "try again when the worker has less to do"
        elif error.code is grpc.StatusCode.UNAUTHENTICATED:
            fix = "ask the operator for a token that its workers let in, and name its file as token"
        else:
            fix = "check that a Blindtune worker listens there, and read its log"
        yield Finding(check, "problem", f"no manifest: {error}", fix)
        return
    finally:
        transport.close()
    software = shown(manifest.software_version, 40) or "of unknown version"
    protocol = ", ".join(map(str, manifest.protocol_versions[:8])) or "unknown"
    method = shown(manifest.product_method, 40) or "unknown"
    yield Finding(check, "ok", f"Blindtune {software}, protocol {protocol}, product method {method}")
    yield _check_model(f"{who} model", manifest, expected, parameters)


def _check_model(
    check: str, manifest: worker_pb2.Manifest, expected: Expectations | None, parameters: ParameterSet
) -> Finding:
    served = f"{shown(manifest.model, 80) or 'unnamed'}, {len(manifest.layers)} layers"
    # Without a kit the worker is held to what this release can talk to, with whatever model it has.
    anything = Expectations(manifest.model, manifest.fingerprint, parameters.name, {})
    try:
        check_manifest(manifest, expected or anything, "the worker")
    except IncompatibleWorkerError as error:
        return problem_of(check, error, "run the same release of Blindtune on both sides")
    if expected is None:
        return Finding(check, "ok", f"{served}; not compared, since there is no kit yet")
    return Finding(check, "ok", f"{served}: the fingerprints are those of {expected.model}")
