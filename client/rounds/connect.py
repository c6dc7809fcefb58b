"""From a configuration to a connected multiplier, for each way to mask."""

import logging
from collections.abc import Callable, Iterable, Sequence

from blindtune.client.config.blind_config import BlindConfig
from blindtune.client.config.parameter_sets import lattice_set, residue_set
from blindtune.client.kit.hints import HintStore
from blindtune.client.kit.kit import Kit
from blindtune.client.operators.manifest import Expectations
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.operator import OperatorClient
from blindtune.client.operators.transport import GrpcTransport
from blindtune.client.rounds.multiplier import RemoteMultiplier
from blindtune.protocol.kernels.allocator import keep_freed_memory
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import Share
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Residues
from blindtune.protocol.shares.source import ShareSource

__all__ = ["HintProgress", "connect", "expectations"]

_logger = logging.getLogger(__name__)

HintProgress = Callable[[Sequence[Product], int], Iterable[Product]]
"""Shows products as their hints are obtained; told the products and the bytes of their hints."""


def connect(
    config: BlindConfig, kit: Kit, progress: HintProgress = lambda products, size: products
) -> RemoteMultiplier:
    """Connects to the operators of a configuration, with a warning where nothing would be private.

    Raises:
        IncompatibleWorkerError, OperatorUnavailableError: see `OperatorClient.connect`.
        KitError: the kit's hints are damaged.
    """
    if config.not_private:
        _logger.warning(config.not_private)
    _logger.info(config.described)
    keep_freed_memory()
    operators = _operators(config, kit)
    if config.masking == "lattice":
        multiplier = _lattice(config, kit, operators, progress)
    else:
        source = ShareSource(len(operators), residue_set(config.masking, config.parameter_set))
        multiplier = RemoteMultiplier(
            source, operators, kit, ask_ahead=config.ask_ahead, most_reasks=config.most_reasks
        )
    try:
        for client in operators:
            client.connect()
    except BaseException:
        multiplier.close()
        raise
    return multiplier


def expectations(kit: Kit, parameters: ParameterSet) -> Expectations:
    """What every worker must serve, for a run with this kit and parameter set."""
    return Expectations(
        model=kit.description.model,
        fingerprint=kit.description.fingerprint,
        parameter_set=parameters.name,
        layers={name: layer.fingerprint for name, layer in kit.layers.items()},
        scheme=kit.scheme,
    )


def _operators(config: BlindConfig, kit: Kit) -> list[OperatorClient]:
    expected = expectations(kit, residue_set(config.masking, config.parameter_set))
    return [
        OperatorClient(
            index,
            operator.name,
            [(x, GrpcTransport(operator, x, config.insecure)) for x in operator.workers],
            expected,
            config.retry_seconds,
            config.request_timeout,
        )
        for index, operator in enumerate(config.operators)
    ]


def _lattice(
    config: BlindConfig, kit: Kit, operators: Sequence[OperatorClient], progress: HintProgress
) -> RemoteMultiplier:
    parameters = lattice_set(config.parameter_set)
    residues = parameters.residues
    (operator,) = operators

    def ask(product: Product, share: Share) -> Residues:
        check = kit.check_vectors(product, residues)
        request = WorkRequest(
            kit.description.fingerprint, residues.name, product, share, outputs=kit.outputs(product)
        )
        # A hint serves all of a run, so it is checked with more vectors.
        return operator.multiply(request, check, vectors=residues.hint_vectors)

    hints = HintStore(kit, parameters, ask)

    def ready(products: Sequence[Product]) -> None:
        missing = hints.missing(products)
        if missing:
            for product in progress(missing, hints.total_bytes(missing)):
                hints.get(product)
        for product in products:
            hints.get(product)  # a damaged one shows now, and not in the middle of a step

    source = LatticeSource(parameters, hints.public_seed, hints.get)
    return RemoteMultiplier(source, operators, kit, ready, most_reasks=config.most_reasks)
