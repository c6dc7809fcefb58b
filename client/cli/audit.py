"""``blindtune audit``: what could a worker learn?"""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from blindtune.client.cli.console import messages, results
from blindtune.client.process.exit_codes import ExitCode

__all__ = ["app"]

app = typer.Typer(help="Attack what workers receive.", no_args_is_help=True)


@app.command("lab")
def lab(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the table and the plot.")],
    steps: Annotated[int, typer.Option(min=6, help="Steps of each training.")] = 30,
    rounds: Annotated[int, typer.Option(min=30, help="Rounds of each game.")] = 600,
) -> None:
    """Compare masks: train with each, by real workers on this machine, and run every attack on each.

    Attacks succeed on masks that are known to be broken, and are left with chance on Blindtune's.
    """
    import tempfile
    import warnings

    from transformers.utils import logging as transformers_logging

    from blindtune.client.audit.lab import run_lab
    from blindtune.client.audit.report import as_json, as_markdown, plot, require_matplotlib
    from blindtune.client.audit.workloads import Sizes
    from blindtune.client.process.disk import disk_errors_are_clear

    require_matplotlib()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with disk_errors_are_clear(output):
        output.mkdir(parents=True, exist_ok=True)
        with (
            messages.status("Starting") as status,
            tempfile.TemporaryDirectory(prefix="blindtune-audit-") as folder,
        ):
            result = run_lab(Path(folder), Sizes(steps=steps), rounds, status.update)
        (output / "attacks.md").write_text(as_markdown(result), encoding="utf-8")
        (output / "attacks.json").write_text(as_json(result), encoding="utf-8")
        plot(result, output / "attacks.png")
    typer.echo(as_markdown(result))
    messages.print(f"{output}: attacks.md, attacks.json and attacks.png, in {result.seconds:.0f} s")
    if result.leaks:
        found = ", ".join(f"{x.judged.score.attack} on {x.mask}" for x in result.leaks)
        messages.print(f"Above chance where nothing must be: {found}", style="red", soft_wrap=True)
        raise typer.Exit(ExitCode.FINDINGS)


@app.command("transcript")
def transcript(
    folder: Annotated[Path, typer.Argument(help="What a worker wrote with --record.")],
    model: Annotated[str, typer.Option(help="The checkpoint folder or model that the worker serves.")],
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Attack a recording of your own worker, with what its operator knows. Exit status 9: it leaks."""
    import json as encoder

    import numpy as np
    from transformers.utils import logging as transformers_logging

    from blindtune.checkpoint import Checkpoint
    from blindtune.client.audit.inspection import inspect_transcript
    from blindtune.client.audit.report import as_rows
    from blindtune.client.audit.transcript import read_transcript
    from blindtune.client.kit.prepare import kit_of
    from blindtune.errors import ConfigurationError

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    recorded = read_transcript(folder)
    checkpoint = Checkpoint.open(model, revision)
    if recorded.fingerprint and kit_of(checkpoint.folder).description.fingerprint != recorded.fingerprint:
        raise ConfigurationError(
            f"{folder} is of a worker that serves another model (fingerprint {recorded.fingerprint}): "
            "name its model, and the same revision"
        )
    judged = inspect_transcript(recorded, checkpoint, np.random.default_rng())
    if json:
        typer.echo(encoder.dumps(as_rows(judged), indent=1))
    else:
        table = Table("attack", "successes", "interval", "chance", "verdict")
        for x in judged:
            score = x.score
            table.add_row(
                score.attack,
                f"{score.successes:,} of {score.trials:,} {score.counted} ({100 * score.rate:.2f} %)",
                f"{100 * x.low:.2f} to {100 * x.high:.2f} %",
                f"{100 * score.chance:.4g} %",
                "[red]above chance[/]" if x.above_chance else "chance",
            )
        results.print(table)
    if any(x.above_chance for x in judged):
        messages.print("This recording gives something away: see docs/audit.md", style="red")
        raise typer.Exit(ExitCode.FINDINGS)
