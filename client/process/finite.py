"""Figures in JSON, which has no word for what is infinite or no number."""

import math
from typing import Any

__all__ = ["finite"]


def finite(content: Any) -> Any:
    """The same objects, lists and values, with None for every number that is infinite or NaN."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return content
