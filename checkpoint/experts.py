"""Mixtures of experts, told by the model that a configuration makes.

Settings alone don't tell: classes of configurations carry a number of experts that a dense model never uses.
"""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from blindtune.errors import UnsupportedError

__all__ = ["require_dense"]

_COUNT = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")
_EXPERTS = re.compile(r"(local_|routed_)?experts")
# Two numbers of experts that every family takes; some want a square.
_FEW, _MORE = 4, 16


def require_dense(config: PretrainedConfig, build: Callable[[PretrainedConfig], nn.Module]) -> None:
    """Refuses a model in which tokens are routed to experts.

    Args:
        config: of the model.
        build: makes a model without weights of a configuration.

    Raises:
        UnsupportedError: it has experts, or no model can be built to find out.
    """
    counts = [(name, part) for part in _parts(config) for name in vars(part) if _is_count(name, part)]
    if counts and _has_experts(config, build):
        name, part = counts[0]
        raise UnsupportedError(
            f"{config.model_type} is a mixture of experts ({name} = {getattr(part, name)}): which expert is "
            "asked would show the workers how tokens are routed. Use a dense model"
        )


def _is_count(name: str, part: PretrainedConfig) -> bool:
    count = getattr(part, name)
    return _COUNT.fullmatch(name) is not None and isinstance(count, int) and count > 1


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _has_experts(config: PretrainedConfig, build: Callable[[PretrainedConfig], nn.Module]) -> bool:
    """Whether modules are called experts, or a part has another shape where there are more of them."""
    try:
        few, more = (build(_with_experts(config, number)) for number in (_FEW, _MORE))
    except Exception:  # what cannot be built cannot be told from a mixture
        return True
    if any(_EXPERTS.fullmatch(part) for name, _ in few.named_modules() for part in name.split(".")):
        return True
    return _shapes(few) != _shapes(more)


def _with_experts(config: PretrainedConfig, number: int) -> PretrainedConfig:
    changed = copy.deepcopy(config)
    for part in _parts(changed):
        for name in list(vars(part)):
            if _is_count(name, part):
                setattr(part, name, number)
    return changed


def _shapes(model: nn.Module) -> dict[str, Any]:
    return {name: value.shape for name, value in model.state_dict().items()}
