"""Layer groups: linear layers that read the same tensor share one request.

Groups are found by running the model once without its weights (see `blindtune.checkpoint.trace`) and seeing
which layers receive the same tensor object, which needs no table of module names.
"""

import logging
from collections.abc import Collection, Sequence

from transformers import PretrainedConfig, PreTrainedModel

from blindtune.checkpoint import Checkpoint, FrozenLayer
from blindtune.checkpoint.skeleton import build_skeleton
from blindtune.checkpoint.trace import trace
from blindtune.client.kit.head import Head, head_is_remote
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
    traced = trace(model_class, config)
    wanted = set(modules)
    groups = [[name for name in group if name in wanted] for group in traced.groups]
    found = [group for group in groups if group]
    seen = {name for group in found for name in group}
    alone = [name for name in modules if name not in seen]
    if alone and traced.failure:
        _logger.warning(
            "cannot trace %s to group its layers (%s); %d of %d are asked for one by one",
            model_class.__name__,
            traced.failure,
            len(alone),
            len(wanted),
        )
    return found + [[name] for name in alone]
