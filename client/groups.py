"""Layer groups: linear layers that read the same tensor share one request.

Groups are found by running the model's skeleton once on the meta device and seeing which layers
receive the same tensor object, which needs no table of module names. The run has no attention mask:
with one, most architectures fail on the meta device.
"""

import copy
import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from blindtune.checkpoint import Checkpoint, FrozenLayer
from blindtune.checkpoint.skeleton import build_skeleton
from blindtune.client.head import Head, head_is_remote
from blindtune.protocol.products import Product, backward_products, forward_products

__all__ = ["all_products", "products_of", "trace_groups"]

_logger = logging.getLogger(__name__)


def all_products(checkpoint: Checkpoint, head: Head) -> list[Product]:
    """Everything that a checkpoint's own model asks for, forward and backward."""
    remote = [x for x in checkpoint.layers if not x.head or head_is_remote(x, head)]
    return products_of(type(build_skeleton(checkpoint.config)), checkpoint.config, remote)


def products_of(
    model_class: type[PreTrainedModel], config: PretrainedConfig, layers: Sequence[FrozenLayer]
) -> list[Product]:
    """The products of all groups that some layers of a model form, forward and backward."""
    by_module = {x.module: x for x in layers}
    products: list[Product] = []
    for group in trace_groups(model_class, config, list(by_module)):
        members = [by_module[module] for module in group]
        products += forward_products([x.name for x in members], members[0].in_features)
        products += backward_products([(x.name, x.out_features) for x in members])
    return products


def trace_groups(
    model_class: type[PreTrainedModel], config: PretrainedConfig, modules: Collection[str]
) -> list[list[str]]:
    """Finds which modules read the same tensor.

    Args:
        model_class: class of the model.
        config: its configuration.
        modules: names of the linear layers to group.

    Returns:
        A partition of ``modules``, in the order in which the model calls them. Where the skeleton can't
        be run, every module is a group of its own, which is right but costs more traffic.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    inputs: list[torch.Tensor] = []  # kept alive, so that no two of them get the same id
    config = copy.deepcopy(config)
    config.use_cache = True  # without a cache, masks depend on the values of positions, which are not there
    try:
        with torch.device("meta"):
            skeleton = model_class(config)
        for name in modules:

            def hook(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                inputs.append(args[0])
                groups.setdefault((id(args[0]), args[0]._version), []).append(name)

            skeleton.get_submodule(name).register_forward_pre_hook(hook)
        skeleton.eval()
        with torch.no_grad():
            skeleton(**{skeleton.main_input_name: torch.zeros((1, 4), dtype=torch.long, device="meta")})
    except Exception as error:  # any architecture may fail here, in any way
        _logger.warning(
            "cannot trace %s to group its layers (%s: %s); each layer is asked for by itself",
            model_class.__name__,
            type(error).__name__,
            error,
        )
        return [[name] for name in modules]
    found = [list(dict.fromkeys(group)) for group in groups.values()]
    seen: set[str] = set()
    partition = []
    for group in found:
        fresh = [name for name in group if name not in seen]
        seen.update(fresh)
        if fresh:
            partition.append(fresh)
    return partition + [[name] for name in modules if name not in seen]
