"""Which process this is, so that what was drawn before a fork belongs to the parent alone."""

import os

__all__ = ["this_process"]

_process, _number = object(), os.getpid()


def this_process() -> object:
    """An object that is another one in each forked child."""
    if os.getpid() != _number:  # a fork that Python knows nothing of
        _become_another()
    return _process


def _become_another() -> None:
    global _process, _number
    _process, _number = object(), os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_become_another)
