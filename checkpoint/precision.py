"""Refusing checkpoints whose stored numbers are not the weights, but have to be scaled or decoded first.

Quantized checkpoints say so in their configuration, as a rule, and are refused by that. Where it says
nothing, their integers or eight-bit numbers would be taken for weights, and scales beside them passed over.
"""

from transformers import PreTrainedModel

from blindtune.checkpoint.files import TensorFiles
from blindtune.checkpoint.skeleton import unknown_keys, weight_keys
from blindtune.errors import CheckpointError

__all__ = ["FULL_PRECISION", "require_full_precision"]

FULL_PRECISION = ("float64", "float32", "float16", "bfloat16")
_THEN = "name the checkpoint in full precision that it was made from"
# Numbers that no parameter is made of, such as the positions that old checkpoints hold, are passed over.
_NO_WEIGHTS = ("int64", "int32", "bool")


def require_full_precision(model: PreTrainedModel, tensors: TensorFiles) -> None:
    """Checks that the weights of a checkpoint are what it stores.

    Args:
        model: of the checkpoint, on any device.
        tensors: the checkpoint. Nothing but types is read.

    Raises:
        CheckpointError: a weight has a type that is not for full precision, or something unknown is stored
            beside it, such as its scale.
    """
    weights = weight_keys(model, tensors)
    for key in weights:
        if (dtype := tensors.dtype(key)) not in FULL_PRECISION:
            raise CheckpointError(
                f"tensor {key} of {tensors.folder} is {dtype}: it is no weight in full precision; {_THEN}"
            )
    owners = {key.removesuffix("weight"): key for key in weights if key.endswith(".weight")}
    for key in unknown_keys(model, tensors):
        if (dtype := tensors.dtype(key)) not in (*FULL_PRECISION, *_NO_WEIGHTS):
            raise CheckpointError(
                f"tensor {key} of {tensors.folder} is {dtype}, and the model has no place for it: it seems "
                f"to be quantized; {_THEN}"
            )
        beside = [key[: i + 1] for i, letter in enumerate(key) if letter == "."]
        if owner := next((owners[x] for x in beside if x in owners), None):
            raise CheckpointError(
                f"{tensors.folder} stores {key} beside {owner}, and the model has no place for it: the "
                f"weight seems to be stored in parts, as a quantized one with its scale; {_THEN}"
            )
