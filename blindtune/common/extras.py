"""The optional parts of an installation: what they need, and what to say where that is missing."""

from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import Requirement

__all__ = ["advice", "missing"]

_US = "blindtune"
# Packages whose module has another name.
_MODULES = {"scikit-learn": "sklearn", "grpcio-reflection": "grpc_reflection"}


def missing(extra: str) -> list[str]:
    """Packages that an extra needs and that can't be imported, by what this installation says of itself."""
    try:
        requirements = [Requirement(x) for x in metadata.requires(_US) or ()]
    except metadata.PackageNotFoundError:
        return []
    lacking = []
    for requirement in requirements:
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == _US:
            lacking += [x for other in sorted(requirement.extras) for x in missing(other)]
        elif not requirement.marker.evaluate({"extra": ""}) and not _there(requirement.name):
            lacking.append(requirement.name)
    return list(dict.fromkeys(lacking))


def advice(extras: Iterable[str]) -> str | None:
    """One line about the first of some extras of which something is missing; None where all is there."""
    for extra in extras:
        if lacking := missing(extra):
            packages = ", ".join(lacking)
            return f"this needs {packages}, which this installation lacks: pip install '{_US}[{extra}]'"
    return None


def _there(package: str) -> bool:
    try:
        return find_spec(_MODULES.get(package, package.replace("-", "_"))) is not None
    except ModuleNotFoundError:  # the package that a module is inside of
        return False
