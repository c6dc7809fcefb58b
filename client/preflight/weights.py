"""What the headers and the small tensors of a checkpoint tell, without reading its big weights."""

import torch
from transformers import PreTrainedModel

from blindtune.checkpoint.files import TensorFiles
from blindtune.checkpoint.skeleton import checkpoint_keys, row_ranges
from blindtune.errors import CheckpointError

__all__ = ["require_finite", "require_shapes"]

_SHOWN = 3


def require_shapes(tensors: TensorFiles, model: PreTrainedModel) -> None:
    """Checks that what a checkpoint stores has the shapes of the model that it will be loaded into.

    Args:
        tensors: of the checkpoint, or of a kit, which stores less.
        model: on the meta device.

    Raises:
        CheckpointError: a tensor has another shape; loading would fail.
    """
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    base = f"{model.base_model_prefix}."
    needed = {key: (name, wanted[name]) for name, key in checkpoint_keys(model, tensors).items()}
    needed |= {x.key: (name, (x.of, *wanted[name][1:])) for name, x in row_ranges(model, tensors).items()}
    wrong = [(key, *needed[key]) for key in needed if tensors.shape(key) != needed[key][1]]
    for key, name, shape in wrong[:1]:
        more = f", and {len(wrong) - 1} more do not fit" if len(wrong) > 1 else ""
        what = f"{tensors.folder}: tensor {key} has shape {tensors.shape(key)}, and the model needs {shape}"
        if classifies and not name.startswith(base):
            raise CheckpointError(
                f"{what}{more}, since the data has {model.config.num_labels} classes: list all those of the "
                "checkpoint in data.labels, or take one without a head of its own"
            )
        raise CheckpointError(f"{what}{more}: config.json is of another checkpoint: restore it")


def require_finite(tensors: TensorFiles) -> None:
    """Checks the norms and biases of a checkpoint; the layers, all but a thousandth, are checked when read.

    Raises:
        CheckpointError: one of them has a number that is infinite, or none at all (NaN).
    """
    wrong = [key for key in tensors if len(tensors.shape(key)) < 2 and not _finite(tensors.get(key))]
    if wrong:
        names = ", ".join(wrong[:_SHOWN])
        names += f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CheckpointError(
            f"{tensors.folder}: {names} holds a value that is infinite or no number: get the checkpoint again"
        )


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())
