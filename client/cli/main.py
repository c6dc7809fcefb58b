"""The command's entry point: options for all subcommands, and what becomes of errors."""

import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated, Literal, NoReturn

import typer

from blindtune.client.cli import audit, demo, health, kit, package, plan, recipes, record, results, trust
from blindtune.client.cli.console import fail, log_as_json
from blindtune.client.process.exit_codes import ExitCode, exit_code
from blindtune.client.process.output import output_closed
from blindtune.common.core_dumps import forbid_core_dumps
from blindtune.common.extras import advice
from blindtune.errors import BlindtuneError, InterruptedRunError

__all__ = ["app", "main"]

# Commands with an extra of their own, of the same name.
_EXTRAS = {"audit", "demo"}

app = typer.Typer(
    name="blindtune",
    help="Private LoRA fine-tuning on GPUs that you don't trust.",
    no_args_is_help=True,
    # Pretty tracebacks print local variables, among which private data would be.
    pretty_exceptions_enable=False,
)
for name, command, panel in (
    ("plan", plan.plan, "Fine-tuning"),
    ("init", recipes.init, "Fine-tuning"),
    ("check", health.check, "Fine-tuning"),
    ("train", recipes.train, "Fine-tuning"),
    ("eval", results.evaluate, "Fine-tuning"),
    ("generate", results.generate, "Fine-tuning"),
    ("merge", results.merge, "Fine-tuning"),
    ("package", package.package, "Fine-tuning"),
    ("verify-record", record.verify_record, "Training record"),
    ("prove-record", record.prove_record, "Training record"),
    ("prepare", kit.prepare, "Setting up"),
    ("certs", kit.certs, "Setting up"),
    ("trust", trust.trust, "Setting up"),
    ("doctor", health.doctor, "Setting up"),
    ("schema", recipes.schema, "Setting up"),
    ("demo", demo.demo, "Setting up"),
):
    app.command(name, rich_help_panel=panel)(command)
app.add_typer(audit.app, name="audit", rich_help_panel="Setting up")


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
    log_format: Annotated[
        Literal["json", "text"],
        typer.Option(help="How warnings and errors are written to stderr.", envvar="BLINDTUNE_LOG_FORMAT"),
    ] = "text",
) -> None:
    """Private LoRA fine-tuning on GPUs that you don't trust."""
    if log_format == "json":
        log_as_json()


def main() -> NoReturn:
    """Runs the command: errors of ours are one message, and an exit code of their own."""
    forbid_core_dumps()
    # Nothing that runs here reports to anyone, and other libraries are told so before they load.
    for variable in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(variable, "1")
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
    except SystemExit as ended:
        if output_closed() and not ended.code:
            sys.exit(ExitCode.OUTPUT_CLOSED)
        if ended.code == ExitCode.INTERRUPTED:  # what typer makes of KeyboardInterrupt, without a word
            fail("interrupted", ExitCode.INTERRUPTED)
        raise
    except BlindtuneError as error:
        stopped_by_reader = isinstance(error, InterruptedRunError) and output_closed()
        code = ExitCode.OUTPUT_CLOSED if stopped_by_reader else exit_code(error)
        fail(str(error), code)
        sys.exit(code)
    except ImportError:
        # Some libraries say that they can't import, and not what.
        line = advice(["client", *_EXTRAS.intersection(sys.argv[1:2])])
        if line is None:
            raise
        fail(line, ExitCode.CONFIGURATION)
        sys.exit(ExitCode.CONFIGURATION)
    except KeyboardInterrupt:
        fail("interrupted", ExitCode.INTERRUPTED)
        sys.exit(ExitCode.INTERRUPTED)
    sys.exit(ExitCode.DONE)
