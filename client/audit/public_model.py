"""What anybody can compute from the public model, workers included."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from blindtune.checkpoint import Checkpoint
from blindtune.checkpoint.skeleton import build_skeleton
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import kit_of
from blindtune.errors import UnsupportedError
from blindtune.protocol.fixed_point import quantize_rows, square_budget
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred

__all__ = ["PublicModel"]

Float32 = NDArray[np.float32]


class _Reached(Exception):
    """The layer has its input; the rest of the model need not run."""


@dataclass(frozen=True)
class PublicModel:
    """A checkpoint as a worker has it.

    Attributes:
        checkpoint: with all its weights.
        first: the forward product of the first layers that read what becomes of the embedding.
    """

    checkpoint: Checkpoint
    first: Product

    @cached_property
    def kit(self) -> Kit:
        """Bounds of the products, which decide on the integers' size."""
        return kit_of(self.checkpoint.folder, scheme=self.checkpoint.scheme)

    @cached_property
    def positional(self) -> bool:
        """Whether what becomes of a token's embedding depends on its place in the text."""
        first, second = (self._inputs(torch.full((1, 2), 5))[0, i] for i in (0, 1))
        return not np.allclose(first, second, rtol=1e-3, atol=1e-6)

    @property
    def positions(self) -> int:
        """How many positions of a text have activations of their own."""
        return int(self.checkpoint.config.max_position_embeddings) if self.positional else 1

    def vocabulary(self, position: int = 0) -> Float32:
        """float32 [tokens, features]: the first layers' input for each token at one position."""
        size = self._model.get_input_embeddings().weight.shape[0]
        place = position if self.positional else 0
        parts = []
        for start in range(0, size, 4096):
            tokens = torch.arange(start, min(start + 4096, size))
            parts.append(self._inputs(tokens[:, None].expand(-1, place + 1))[:, place])
        return np.concatenate(parts)

    def integers(self, rows: Float32, noise: int = 0) -> Centred:
        """The integers that a client sends for rows of the first layers' input, before its mask.

        Args:
            rows: float32 [n, features].
            noise: largest magnitude of the mask's noise in a result.
        """
        budget = square_budget(Q31, self.kit.column_square_sum(self.first), noise)
        return quantize_rows(rows, budget, diffused=self.first.diffused)[0]

    @cached_property
    def _model(self) -> PreTrainedModel:
        model_class = type(build_skeleton(self.checkpoint.config))
        return model_class.from_pretrained(self.checkpoint.folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def _inputs(self, tokens: torch.Tensor) -> Float32:
        """float32 [texts, length, features]: what the first layers read, for texts of tokens."""
        name = self.first.spans[0].layer
        module = next((x.module for x in self.checkpoint.layers if x.name == name), None)
        if module is None:
            raise UnsupportedError(f"{self.checkpoint.model} has no layer {name}: name the worker's model")
        seen: list[torch.Tensor] = []

        def stop(module: torch.nn.Module, arguments: tuple[Any, ...]) -> NoReturn:
            seen.append(arguments[0])
            raise _Reached

        handle = self._model.get_submodule(module).register_forward_pre_hook(stop)
        try:
            self._model(input_ids=tokens)
        except _Reached:
            return seen[0].float().numpy()
        finally:
            handle.remove()
        raise UnsupportedError(f"layer {name} of {self.checkpoint.model} is not reached by a text")
