"""Plants classical mistakes in copies of the code; the ordinary tests have to notice each.

make mutations
make mutations ARGS="--only lattice"     those whose name holds a text
make mutations ARGS="--write"            docs/mutations.md too
"""

import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mutations.document import DOCUMENT, document
from mutations.hunt import Finding, hunt
from mutations.mutations import MUTATIONS

_console = Console(width=160)
_progress = Console(stderr=True, width=160, highlight=False)


def main(
    only: Annotated[str, typer.Option(help="Try those whose name holds this text.")] = "",
    write: Annotated[bool, typer.Option("--write", help="Write docs/mutations.md.")] = False,
) -> None:
    """Plant classical mistakes; see which test catches each."""
    chosen = [mutation for mutation in MUTATIONS if only in mutation.id]
    if not chosen or (write and only):
        raise typer.BadParameter(
            "no mutation has such a name, or --write without all of them", param_hint="--only"
        )
    started = time.monotonic()
    try:
        findings = hunt(chosen, _tell)
    except RuntimeError as error:
        _console.print(str(error), markup=False)
        sys.exit(2)
    table = Table("mutation", "mistake")
    table.add_column("caught by", overflow="fold")
    table.add_column("seconds", justify="right")
    for finding in findings:
        style = None if finding.outcome.caught else "bold red"
        seconds = f"{finding.seconds:.0f}"
        table.add_row(finding.mutation.id, finding.mutation.mistake, finding.verdict, seconds, style=style)
    _console.print(table)
    missed = [finding for finding in findings if not finding.outcome.caught]
    for finding in missed:
        _console.rule(f"{finding.mutation.id}: {finding.verdict}")
        _console.print(finding.outcome.output, markup=False)
    caught = len(findings) - len(missed)
    _console.print(f"{caught} of {len(findings)} mutations caught in {time.monotonic() - started:.0f} s")
    if write and not missed:
        DOCUMENT.write_text(document([(x.mutation, x.verdict) for x in findings]))
    sys.exit(bool(missed))


def _tell(finding: Finding) -> None:
    _progress.print(f"{finding.mutation.id}: {finding.verdict}", markup=False)


if __name__ == "__main__":
    typer.run(main)
