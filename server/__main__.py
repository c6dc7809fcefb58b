"""``python -m blindtune.server`` is the command ``blindtune-worker``."""

from blindtune.server.cli import main

if __name__ == "__main__":
    main()
