"""``blindtune init``, ``train`` and ``schema``: from a starting file to an adapter."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from blindtune.client.cli.console import emit, messages, promise_events, results
from blindtune.client.process.output import output_closed

__all__ = ["Config", "Settings", "init", "schema", "train"]

Config = Annotated[Path, typer.Argument(help="The configuration, a YAML file.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a value: training.learning_rate=1e-4; repeatable."
    ),
]


def init(
    task: Annotated[str, typer.Argument(help="instructions or classification.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("blindtune.yaml"),
    masking: Annotated[str, typer.Option(help="shares (two operators) or lattice (one).")] = "shares",
) -> None:
    """Write a commented configuration to start from."""
    from blindtune.client.recipe.starting import write_starting_recipe

    write_starting_recipe(task, masking, output)
    messages.print(
        f"{output}: edit it, then look at what it does with: blindtune train {output} --dry-run",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def train(
    config: Config,
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would happen, and connect to nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of an hour of the workers, for the summary.")
    ] = None,
    price_per_gb: Annotated[
        float | None, typer.Option(min=0, help="Price of 10^9 bytes of traffic, for the summary.")
    ] = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Show figures of the run to Prometheus at /metrics, on loopback only."
        ),
    ] = None,
    metrics_file: Annotated[
        Path | None,
        typer.Option(help="Write the same figures to this file, for node_exporter: name it something.prom."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON for each event, on stdout.")] = False,
) -> None:
    """Fine-tune a model as a configuration says.

    The adapter, its checkpoints and summary.json go to output.dir. A run that was stopped, killed or cut off
    from its workers goes on with --resume.
    """
    from blindtune.client.cli.quiet import quiet_libraries
    from blindtune.client.trust.choice import own_recipe

    promise_events(json)
    recipe = own_recipe(config, settings or [])
    quiet_libraries()
    if dry_run:
        from blindtune.client.cli.dry_run import show_dry_run

        show_dry_run(recipe, config, json, resume)
        return
    from blindtune.client.cli.progress import JsonObserver, LineObserver
    from blindtune.client.runs.monitoring import monitoring
    from blindtune.client.runs.run import train_recipe
    from blindtune.client.runs.stopping import StopRequest
    from blindtune.client.training.figures import Prices

    observer = JsonObserver() if json else LineObserver()
    try:
        with monitoring(metrics_listen, metrics_file) as monitor:
            summary = train_recipe(
                recipe,
                observer,
                resume=resume,
                prices=Prices(price_per_hour, price_per_gb),
                stop=StopRequest(output_closed),
                monitor=monitor,
            )
    finally:
        observer.close()
    if json:
        emit("done", **summary)
        return
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())
    for line in (
        f"{summary['steps']:,} steps on {summary['tokens']:,} tokens, {summary['padding_share']:.1%} padding",
        f"time: {spent}",
        f"{summary['rounds']:,} rounds, {summary['bytes_up'] / 1e6:,.1f} MB up, "
        f"{summary['bytes_down'] / 1e6:,.1f} MB down, {summary['verified_responses']:,} responses verified, "
        f"{summary['lies']} wrong",
    ):
        messages.print(line, highlight=False, soft_wrap=True)
    if "cost" in summary:
        messages.print(f"cost {summary['cost']:.2f} at the given prices", highlight=False)
    messages.print(f"adapter in {recipe.output.dir}", markup=False, highlight=False, soft_wrap=True)


def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    from blindtune.client.recipe import Recipe

    results.print_json(json_module.dumps(Recipe.model_json_schema()))
