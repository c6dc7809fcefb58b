"""Which frozen weights the client multiplies by itself, and why: it is said when a model is loaded."""

import logging
from collections import Counter
from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blindtune.checkpoint.skeleton import absent_parameters, checkpoint_keys, is_small
from blindtune.checkpoint.trace import trace

__all__ = ["kept_weights", "say_what_is_kept"]

_logger = logging.getLogger(__name__)

_READ = "layers whose weight the model's own code reads"
_SMALL = "layers too small to be worth a request"
_SPLIT = "layers that the checkpoint stores joined with others"
_HEAD = "the output head"
_OTHER = "convolutions and weights of other kinds"
_LEAST_SAID = 0.005


def kept_weights(model: PreTrainedModel, remote: Collection[str], keys: Collection[str]) -> Counter[str]:
    """Numbers of the frozen weights by the reason why they stay on the client; "" are those that don't.

    Embeddings are no part of it, since they are looked up and multiply nothing; nor are layers outside the
    base model, which are trained, and those that the checkpoint lacks.

    Args:
        model: before its layers are replaced, on any device.
        remote: names of the modules that workers multiply by.
        keys: of all tensors in the checkpoint.
    """
    stored = checkpoint_keys(model, keys)
    absent = set(absent_parameters(model, keys))
    read = trace(type(model), model.config).read
    head = model.get_output_embeddings()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    base = {id(module) for module in model.base_model.modules()}
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or (id(module) not in base and module is not head):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}"
            if parameter.dim() < 2 or full in tied or full in absent:
                continue
            linear = isinstance(module, nn.Linear | Conv1D) and key == "weight"
            if name in remote and linear:
                reason = ""
            elif not linear:
                reason = _OTHER
            elif name in read:
                reason = _READ
            elif is_small(*parameter.shape):
                reason = _SMALL
            elif module is head:
                reason = _HEAD
            else:
                reason = _OTHER if full in stored else _SPLIT
            found[reason] += parameter.numel()
    return found


def say_what_is_kept(model: PreTrainedModel, remote: Collection[str], keys: Collection[str]) -> None:
    """Logs what share of the frozen weights is not remote, if that is more than nothing."""
    found = kept_weights(model, remote, keys)
    everything = found.total()
    here = everything - found.pop("", 0)
    if everything and here > _LEAST_SAID * everything:
        reasons = ", ".join(f"{count / everything:.1%} {reason}" for reason, count in found.most_common())
        _logger.warning(
            "%.1f %% of the frozen weights are computed here: %s", 100 * here / everything, reasons
        )
