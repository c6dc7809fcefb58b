"""How a model is multiplied, as an option says it: MASKING[:PARAMETER SET][+SCHEME]."""

import argparse
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

__all__ = ["Way", "way_among"]

_WAY = re.compile(r"(\w+)(?::([\w-]+))?(?:\+([\w-]+))?")


@dataclass(frozen=True)
class Way:
    """One of them.

    Attributes:
        name: as it was given.
        masking: its first part.
        parameter_set: None for the standard one.
        scheme: of quantization.
    """

    name: str
    masking: str
    parameter_set: str | None
    scheme: str


def way_among(maskings: Collection[str]) -> Callable[[str], Way]:
    """Reads a way of one of these maskings, for an option."""

    def parsed(text: str) -> Way:
        found = _WAY.fullmatch(text)
        if found is None or found[1] not in maskings:
            raise argparse.ArgumentTypeError(
                f"{text} is none of {', '.join(maskings)}, with :PARAMETER_SET or +SCHEME or both behind it"
            )
        return Way(text, found[1], found[2], found[3] or "int8")

    return parsed
