"""What a worker says it holds, held against what the client expects."""

from collections.abc import Mapping
from dataclasses import dataclass

from blindtune.errors import IncompatibleWorkerError
from blindtune.proto import PROTOCOL_VERSION, worker_pb2
from blindtune.protocol.weights import INT8, SCHEMES, Scheme

__all__ = ["Expectations", "check_manifest", "shown"]


def shown(text: str, most: int = 300) -> str:
    """What a worker says, for a message: on one line, no longer than a line, nothing for a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[:most])


@dataclass(frozen=True)
class Expectations:
    """What every worker must serve.

    Attributes:
        model: the name of the model, for messages.
        fingerprint: of the model, from the client's own copy of the checkpoint.
        parameter_set: name of the parameter set.
        layers: fingerprint of each layer that will be asked for.
        scheme: how the weights became integers.
    """

    model: str
    fingerprint: str
    parameter_set: str
    layers: Mapping[str, str]
    scheme: Scheme = INT8


def check_manifest(manifest: worker_pb2.Manifest, expected: Expectations, who: str) -> None:
    """Refuses a worker that serves something else. This catches mistakes; lies are caught later.

    Args:
        who: operator and address, for messages.

    Raises:
        IncompatibleWorkerError: it says what differs and which side to change.
    """
    versions = list(manifest.protocol_versions)
    if PROTOCOL_VERSION not in versions:
        older = "the worker" if max(versions, default=0) < PROTOCOL_VERSION else "this client"
        raise IncompatibleWorkerError(
            f"{who} speaks protocol version {versions[:8] or 'none'}, this client "
            f"speaks {PROTOCOL_VERSION}: upgrade {older}"
        )
    if manifest.scheme != expected.scheme.identifier:
        theirs = next((x.name for x in SCHEMES.values() if x.identifier == manifest.scheme), None)
        then = "run the same release of Blindtune on both sides"
        if theirs:
            then = (
                f"start the worker with --quantization {expected.scheme.name}, or configure {theirs} here "
                f"(quantization.scheme: {theirs} in a recipe)"
            )
        raise IncompatibleWorkerError(
            f"{who} quantizes with {theirs or shown(manifest.scheme) or 'nothing'}, this client with "
            f"{expected.scheme.name}: {then}"
        )
    if expected.parameter_set not in manifest.parameter_sets:
        raise IncompatibleWorkerError(
            f"{who} does not know parameter set {expected.parameter_set}: upgrade the worker"
        )
    if manifest.fingerprint != expected.fingerprint:
        raise IncompatibleWorkerError(
            f"{who} serves another model ({shown(manifest.model) or 'unnamed'}, fingerprint "
            f"{shown(manifest.fingerprint, 16) or 'none'}) than {expected.model} (fingerprint "
            f"{expected.fingerprint[:16]}): start it with the same checkpoint and revision"
        )
    held = {layer.name: layer.fingerprint for layer in manifest.layers}
    lacking = [name for name, value in expected.layers.items() if held.get(name) != value]
    if lacking:
        raise IncompatibleWorkerError(
            f"{who} lacks {len(lacking)} of the layers, the first being {lacking[0]}: each worker must "
            "hold the whole model"
        )
