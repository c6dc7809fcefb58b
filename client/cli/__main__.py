"""``python -m blindtune.client.cli``."""

from blindtune.client.cli.main import main

main()
