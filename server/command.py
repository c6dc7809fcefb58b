"""The entry point of ``blindtune-worker``, which works where the rest of it can't be imported."""

import sys

from blindtune.common.extras import advice

__all__ = ["main"]


def main() -> None:
    """Runs the command; where a package is missing, one line says what to install."""
    try:
        from blindtune.server.cli import main as run

        run()
    except ImportError:
        line = advice(["worker"])
        if line is None:
            raise
        print(f"blindtune-worker: {line}", file=sys.stderr)
        sys.exit(1)
