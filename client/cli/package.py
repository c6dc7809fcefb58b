"""``blindtune package``: what of a run may be given away, and nothing else."""

from pathlib import Path
from typing import Annotated

import typer

from blindtune.client.cli.console import messages

__all__ = ["package"]


def package(
    run: Annotated[Path, typer.Argument(help="The output folder of a finished run.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write, new or empty.")],
    base_model: Annotated[
        str | None,
        typer.Option(help="Public name of the base model, where the adapter names a folder of yours."),
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Write a classifier's class names to the model card.")
    ] = False,
    no_record: Annotated[
        bool, typer.Option("--no-record", help="Leave out the training record and its public key.")
    ] = False,
    card: Annotated[
        Path | None, typer.Option(help="A model card of yours, instead of the one that is made.")
    ] = None,
) -> None:
    """Put what may be given away of a run into a folder: adapter, tokenizer, model card, record.

    Never salts and keys, run.json, recipe.yaml, checkpoints or summary.json. An adapter may have memorised
    what it was trained on: to publish it is your decision.
    """
    from blindtune.client.cli.quiet import quiet_libraries
    from blindtune.client.record.package import package as write_package

    quiet_libraries()
    written = write_package(
        run, output, base_model=base_model, labels=labels, record=not no_record, card=card
    )
    for line in (f"{output}: {', '.join(written.files)}", *(f"note: {x}" for x in written.notes)):
        messages.print(line, markup=False, highlight=False, soft_wrap=True)
