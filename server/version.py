"""Which release this is."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["software_version"]


def software_version() -> str:
    """The installed version of Blindtune."""
    try:
        return version("blindtune")
    except PackageNotFoundError:
        return "unknown"
