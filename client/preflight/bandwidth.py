"""How fast a worker answers, measured with verified products of random residues.

The operands come from the operating system's random numbers and nothing else. They look like those of a
run, and answers to them are checked as in one, so a worker that lies is found out here too.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator

from blindtune.client.config.blind_config import BlindConfig, Operator
from blindtune.client.config.parameter_sets import residue_set
from blindtune.client.kit.kit import Kit
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.operator import OperatorClient
from blindtune.client.operators.transport import GrpcTransport, Transport, TransportError
from blindtune.client.preflight.finding import Finding, problem_of
from blindtune.client.rounds.connect import expectations
from blindtune.errors import IncompatibleWorkerError, OperatorUnavailableError
from blindtune.protocol.expansion import KEY_BYTES, Seed
from blindtune.protocol.masks import Share
from blindtune.protocol.operands import SeededRows
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product, backward_products, forward_products

__all__ = ["measure"]

_ROUND_TRIPS = 5
_MANIFEST_SECONDS = 10.0
_RETRY_SECONDS = 5.0

_Transports = Callable[[Operator, str, bool], Transport]


def measure(
    config: BlindConfig, kit: Kit, size: int = 4_000_000, transport: _Transports = GrpcTransport
) -> Iterator[Finding]:
    """Measures every worker of every operator, one after the other.

    Rates are those of whole requests, the worker's multiplication and the check included: they are
    what a run gets, and a lower bound of what the network carries.

    Args:
        config: whom to ask.
        kit: what to multiply by, and to verify with.
        size: bytes to send, and bytes to receive.
        transport: reaches a worker, given its operator, its address and whether TLS is left out.

    Raises:
        KitError: the kit lacks something.
    """
    parameters = residue_set(config.masking, config.parameter_set)
    for index, operator in enumerate(config.operators):
        for address in operator.workers:
            # One client for each worker, or the operator's other workers would answer for it.
            way = transport(operator, address, config.insecure)
            client = OperatorClient(
                index,
                operator.name,
                [(address, way)],
                expectations(kit, parameters),
                min(config.retry_seconds, _RETRY_SECONDS),
                config.request_timeout,
            )
            try:
                yield from _measure_worker(f"{operator.name} {address}", client, way, kit, parameters, size)
            finally:
                client.close()


def _measure_worker(
    who: str, client: OperatorClient, way: Transport, kit: Kit, parameters: ParameterSet, size: int
) -> Iterator[Finding]:
    try:
        client.connect()  # also tells how large a request may be
        yield _round_trip(f"{who} round trip", way)
        yield _rate(f"{who} upload", client, kit, parameters, size, upload=True)
        yield _rate(f"{who} download", client, kit, parameters, size, upload=False)
    except IncompatibleWorkerError as error:
        yield problem_of(f"{who} answers", error, "run the same release of Blindtune on both sides")
    except (OperatorUnavailableError, TransportError) as error:
        yield _no_answer(f"{who} answers", client, error)


def _no_answer(check: str, client: OperatorClient, error: Exception) -> Finding:
    for address in client.statistics.lies:
        return Finding(
            check,
            "problem",
            f"worker {address} of operator {client.name} gave a wrong answer",
            "do not train with it, and tell the operator: its hardware is faulty, or the worker is not the "
            "program that it should be",
        )
    # In the middle of a run the message goes on about that run.
    detail, _, _ = str(error).partition(". Nothing was lost")
    return Finding(check, "problem", detail, "read the worker's log, restart it and check again")


def _round_trip(check: str, way: Transport) -> Finding:
    times = []
    for _ in range(_ROUND_TRIPS):
        started = time.perf_counter()
        way.manifest(_MANIFEST_SECONDS)
        times.append(time.perf_counter() - started)
    detail = f"{statistics.median(times) * 1e3:.1f} ms, median of {_ROUND_TRIPS} requests for the manifest"
    return Finding(check, "ok", detail)


def _rate(
    check: str, client: OperatorClient, kit: Kit, parameters: ParameterSet, size: int, upload: bool
) -> Finding:
    """One way: many columns in and few out, sent as residues; or a seed in, and many columns out."""
    product = _widest(kit, upload)
    columns = product.contraction if upload else kit.outputs(product)
    rows = max(1, size // (parameters.word_bytes * columns))
    _multiply(client, kit, product, parameters, 1, upload)  # connects and compiles, and is not counted
    seconds = _multiply(client, kit, product, parameters, rows, upload)
    moved = parameters.word_bytes * rows * columns / 1e6
    return Finding(
        check,
        "ok",
        f"{moved / seconds:.1f} MB/s, verified ({moved:.1f} MB in {seconds:.2f} s, the whole request)",
    )


def _widest(kit: Kit, upload: bool) -> Product:
    """The product of a layer with the largest operand for its answer, or the other way round."""

    def shape(product: Product) -> tuple[float, int]:
        wide, narrow = product.contraction, kit.outputs(product)
        if not upload:
            wide, narrow = narrow, wide
        return wide / narrow, wide

    products = [
        product
        for name, layer in kit.layers.items()
        for product in (
            *forward_products([name], layer.in_features),
            *backward_products([(name, layer.out_features)]),
        )
    ]
    return max(products, key=shape)


def _multiply(
    client: OperatorClient, kit: Kit, product: Product, parameters: ParameterSet, rows: int, upload: bool
) -> float:
    """Seconds of a verified multiplication of rows that were never used and never will be again."""
    seed = Seed(os.urandom(KEY_BYTES), parameters)
    operand = SeededRows(seed, rows, product.contraction)
    share = Share(client.index, operand.residues() if upload else operand)
    _ = share.residues  # a download is not measured with the expansion that verifies it
    request = WorkRequest(kit.description.fingerprint, parameters.name, product, share, kit.outputs(product))
    check = kit.check_vectors(product, parameters)
    started = time.perf_counter()
    client.multiply(request, check)
    return time.perf_counter() - started
