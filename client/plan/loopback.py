"""A small random model with two workers on this machine, for whatever is measured with rounds."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from blindtune.checkpoint import Checkpoint
from blindtune.client.config.blind_config import BlindConfig, Operator
from blindtune.client.config.parameter_sets import lattice_set, residue_set
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import prepare
from blindtune.client.model.layer_group import LayerGroup
from blindtune.client.process.local_worker import SERVE, LocalWorker
from blindtune.client.rounds.connect import connect
from blindtune.client.rounds.multiplier import RemoteMultiplier
from blindtune.client.tls.certs import OperatorCertificates, issue_operator_certificates
from blindtune.errors import ConfigurationError
from blindtune.protocol.lattice.parameters import LatticeParameters
from blindtune.protocol.multiplication.exactness import exact_method
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.products import contraction_lengths

__all__ = ["LAYER", "NARROW", "OPERATORS", "WIDE", "Loopback", "loopback"]

OPERATORS = 2
LAYER = "model.layers.0."
NARROW = f"{LAYER}self_attn.k_proj.weight"
"""The layer with the fewest outputs."""
WIDE = (f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight")
"""The layers of the group with the most."""

_MODEL: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Loopback:
    """The model's products, in this process and from workers.

    Attributes:
        kit: of the model.
        multiplier: multiplies as a worker does, in this process.
        remote: asks one worker of each of two operators, with shares.
        lattice: another way to mask, of the same modulus.
    """

    kit: Kit
    multiplier: Multiplier
    remote: RemoteMultiplier
    lattice: LatticeParameters

    def ask(self, rows: int) -> None:
        """A round with so many rows."""
        group = LayerGroup(WIDE, self.kit, self.remote)
        group.forward(np.ones((rows, group.in_features), np.float32))


@contextmanager
def loopback(shares: str | None = None, lattice: str | None = None) -> Iterator[Loopback]:
    """Starts workers, and ends them after the block.

    Args:
        shares, lattice: names of parameter sets with one modulus; the maskings' own unless given.

    Raises:
        ResourceError: no worker can be started here.
        ConfigurationError: the two have different moduli.
    """
    residues, lattice_parameters = residue_set("shares", shares), lattice_set(lattice)
    if lattice_parameters.residues is not residues:
        raise ConfigurationError(
            f"{lattice_parameters.name} cannot be measured together with {residues.name}: it is a lattice of "
            f"{lattice_parameters.residues.name}"
        )
    with tempfile.TemporaryDirectory(prefix="blindtune-plan-") as folder:
        checkpoint = _checkpoint(Path(folder) / "model")
        kit = prepare(checkpoint, Path(folder) / "kit")
        with checkpoint.reader() as reader:
            layers = {x.name: reader.read(x).integers for x in checkpoint.layers}
        lengths = contraction_lengths((x.shape[0], x.shape[1]) for x in layers.values())
        multiplier = Multiplier(layers, exact_method(lengths, residues))
        with _workers(checkpoint.folder, Path(folder)) as operators:
            config = BlindConfig(
                operators=operators, parameter_set=residues.name, allow_one_machine=True, progress=False
            )
            remote = connect(config, kit)
            try:
                yield Loopback(kit, multiplier, remote, lattice_parameters)
            finally:
                remote.close()


def _checkpoint(folder: Path) -> Checkpoint:
    LlamaForCausalLM(LlamaConfig(**_MODEL)).to(torch.bfloat16).save_pretrained(folder)
    return Checkpoint.open(folder)


@contextmanager
def _workers(model: Path, folder: Path) -> Iterator[list[Operator]]:
    """Worker processes on loopback, one for each operator, as they are run elsewhere: over mutual TLS."""
    with ExitStack() as stack:
        started = []
        for i in range(OPERATORS):
            name = f"operator-{i}"
            certificates = issue_operator_certificates(folder / "certs", name)
            started.append((name, certificates, stack.enter_context(_worker(model, certificates))))
        yield [
            Operator(name, [worker.address()], **certificates.for_clients)
            for name, certificates, worker in started
        ]


def _worker(model: Path, certificates: OperatorCertificates) -> LocalWorker:
    options = {
        "model": model,
        "tls-cert": certificates.worker,
        "tls-key": certificates.worker_key,
        "tls-client-ca": certificates.ca,
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return LocalWorker([*SERVE, *arguments], certificates.ca.with_name("worker.log"))
