"""Whether the libraries that Blindtune stands on are there, in versions that it was made for."""

import platform
from collections.abc import Iterable, Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from blindtune.client.preflight.finding import Finding

__all__ = ["check_libraries", "check_requirements"]

_US = "blindtune"
_USED_IF_THERE = {"trl"}


def check_libraries() -> Iterator[Finding]:
    """Checks Python, the libraries that Blindtune needs, and those that its ``client`` extra adds.

    What is needed comes from the installed package's own metadata.
    """
    try:
        needed = metadata.metadata(_US)["Requires-Python"] or ""
        requirements = [Requirement(x) for x in metadata.requires(_US) or ()]
    except metadata.PackageNotFoundError:
        yield Finding("blindtune", "problem", "not installed: it has no metadata", "pip install blindtune")
        return
    yield _python(needed)
    yield from check_requirements(requirements)


def check_requirements(requirements: Iterable[Requirement]) -> Iterator[Finding]:
    """Holds what is installed against requirements; those of other extras than ``client`` are left out."""
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _library(requirement, "needed")
        elif requirement.marker.evaluate({"extra": "client"}):
            yield _library(requirement, "optional")
        elif requirement.name in _USED_IF_THERE and _installed(requirement.name):
            yield _library(requirement, "optional")


def _python(needed: str) -> Finding:
    version = platform.python_version()
    if SpecifierSet(needed).contains(version, prereleases=True):
        return Finding("Python", "ok", f"{version} (needs {needed or 'any'})")
    return Finding("Python", "problem", f"{version}, and {needed} is needed", f"install Python {needed}")


def _library(requirement: Requirement, role: str) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier)
    version = _installed(name)
    command = f"pip install '{name}{wanted}'"
    if version is None:
        if role == "optional":
            return Finding(name, "warning", "not installed; fine-tuning here needs it", command)
        return Finding(name, "problem", "not installed", command)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, "problem", f"{version}, and {wanted} is needed", command)
    return Finding(name, "ok", f"{version} (needs {wanted or 'any'})")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
