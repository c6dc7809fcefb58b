"""The command ``blindtune``, one file for each group of subcommands."""

from blindtune.client.cli.main import app, main

__all__ = ["app", "main"]
