"""The command's entry point: options for all subcommands, and what becomes of errors."""

import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from blindtune.client.cli import demo, health, kit, recipes, results
from blindtune.client.cli.console import fail, messages
from blindtune.client.cli.exit_codes import ExitCode, exit_code
from blindtune.protocol.errors import BlindtuneError

__all__ = ["app", "main"]

app = typer.Typer(
    name="blindtune",
    help="Private LoRA fine-tuning on GPUs that you don't trust.",
    no_args_is_help=True,
    # Pretty tracebacks print local variables, among which private data would be.
    pretty_exceptions_enable=False,
)
for name, command, panel in (
    ("init", recipes.init, "Fine-tuning"),
    ("check", health.check, "Fine-tuning"),
    ("train", recipes.train, "Fine-tuning"),
    ("eval", results.evaluate, "Fine-tuning"),
    ("generate", results.generate, "Fine-tuning"),
    ("merge", results.merge, "Fine-tuning"),
    ("prepare", kit.prepare, "Setting up"),
    ("certs", kit.certs, "Setting up"),
    ("doctor", health.doctor, "Setting up"),
    ("schema", recipes.schema, "Setting up"),
    ("demo", demo.demo, "Setting up"),
):
    app.command(name, rich_help_panel=panel)(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blindtune {version('blindtune')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Private LoRA fine-tuning on GPUs that you don't trust."""


def main() -> NoReturn:
    """Runs the command: errors of ours are one message, and an exit code of their own."""
    # Nothing that runs here reports to anyone, and other libraries are told so before they load.
    for variable in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(variable, "1")
    # Accelerate would take its precision and its devices from these, and a recipe says what is computed.
    for variable in [x for x in os.environ if x.startswith("ACCELERATE_")]:
        del os.environ[variable]
    # Threads that spin while they wait would take the cores that gRPC and local workers need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Failed handshakes are in our own messages, and gRPC would log each of them.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Batches are tokenized before anything forks, and the warning about it would come at every run.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # It complains about optional kernels for 4-bit weights, which are not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except BlindtuneError as error:
        code = exit_code(error)
        fail(str(error), code)
        sys.exit(code)
    except KeyboardInterrupt:
        messages.print("blindtune: interrupted", style="red")
        sys.exit(ExitCode.INTERRUPTED)
    sys.exit(ExitCode.DONE)
