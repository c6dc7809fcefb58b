"""``blindtune trust``: whose word counts when a folder names operators."""

from pathlib import Path
from typing import Annotated

import typer

from blindtune.client.cli.console import messages

__all__ = ["trust"]


def trust(
    file: Annotated[
        Path, typer.Argument(help="A recipe, or a file with operators alone.", show_default=False)
    ],
) -> None:
    """Trust the operators that a file names: eval and generate use them where an output folder names them.

    Operators of your own runs need no such word. With shares, trust only those that do not collude.
    """
    from blindtune.client.trust.choice import trust_named
    from blindtune.client.trust.trust_list import trust_file

    circle, new = trust_named(file)
    for line in (
        f"{circle.masking}: {circle.shown}",
        f"{'noted in' if new else 'already in'} {trust_file()}",
    ):
        messages.print(line, markup=False, highlight=False, soft_wrap=True)
