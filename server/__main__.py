"""``python -m blindtune.server`` is the command ``blindtune-worker``."""

from blindtune.server.command import main

if __name__ == "__main__":
    main()
