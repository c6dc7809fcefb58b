"""``blindtune prepare`` and ``blindtune certs``: what is made once, before any run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from blindtune.client.cli.console import messages

__all__ = ["certs", "prepare"]


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
    quantization: Annotated[
        str, typer.Option(help="How weights become integers, as at the workers: int8, nf4 or nf4-double.")
    ] = "int8",
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only show the sizes of the kit and of its hints.")
    ] = False,
    hints: Annotated[
        bool,
        typer.Option("--hints", help="Obtain the hints of masking 'lattice' too; goes on where it was."),
    ] = False,
    parameter_set: Annotated[
        str | None, typer.Option(help="Of masking 'lattice'; mlwe1280 unless given.")
    ] = None,
    worker: Annotated[
        list[str] | None, typer.Option("--worker", help="HOST:PORT to obtain hints from; repeatable.")
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="The operator's CA (PEM).")] = None,
    cert: Annotated[Path | None, typer.Option(help="Your certificate for the operator (PEM).")] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    token: Annotated[
        Path | None, typer.Option(help="File of the operator's token, instead of a certificate.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plaintext, on loopback only.")] = False,
) -> None:
    """Make a client kit: all that from_pretrained needs of a model, without its big weights.

    The kit holds a verification secret: keep it on machines that you trust.
    """
    from blindtune.checkpoint import Checkpoint, FrozenLayer
    from blindtune.client.config.blind_config import BlindConfig, Operator
    from blindtune.client.config.parameter_sets import set_name
    from blindtune.client.kit.groups import all_products
    from blindtune.client.kit.head import checked_head
    from blindtune.client.kit.hints import hint_bytes
    from blindtune.client.kit.kit import Kit, is_kit, product_outputs
    from blindtune.client.kit.prepare import fingerprint, kit_bytes
    from blindtune.client.kit.prepare import prepare as prepare_kit
    from blindtune.client.rounds.connect import connect
    from blindtune.errors import ConfigurationError
    from blindtune.protocol.lattice.parameters import LATTICE_PARAMETER_SETS
    from blindtune.protocol.weights import kept_bytes, scheme_named

    lattice = LATTICE_PARAMETER_SETS[set_name("lattice", parameter_set, option="--parameter-set")]
    chosen = checked_head(head)
    checkpoint = Checkpoint.open(model, revision, scheme_named(quantization, "--quantization"))
    if estimate:
        products = all_products(checkpoint, chosen)
        shapes = {x.name: (x.out_features, x.in_features) for x in checkpoint.layers}
        size = sum(hint_bytes(lattice, product_outputs(x, shapes)) for x in products)
        weights = sum(kept_bytes(a, b, checkpoint.scheme) for a, b in shapes.values())
        typer.echo(f"kit     {kit_bytes(checkpoint, chosen) / 1e6:12,.1f} MB")
        typer.echo(f"hints   {size / 1e6:12,.1f} MB  ({lattice.name}, for masking 'lattice' alone)")
        typer.echo(f"weights {weights / 1e6:12,.1f} MB  ({quantization}, at each worker)")
        return
    config = None
    if hints:
        if not worker:
            raise ConfigurationError("--hints needs a --worker to obtain them from")
        operator = Operator("operator", worker, ca, cert, key, token)
        config = BlindConfig([operator], "lattice", lattice.name, quantization, chosen, insecure=insecure)

    def reading(layers: Iterable[FrozenLayer]) -> Iterable[FrozenLayer]:
        return track(layers, "Reading layers", console=messages, transient=True)

    if hints and is_kit(output):
        kit = Kit.open(output)
        if kit.description.fingerprint != fingerprint(checkpoint, reading):
            raise ConfigurationError(
                f"{output} is the kit of another model ({kit.description.model}): choose another folder"
            )
    else:
        kit = prepare_kit(checkpoint, output, chosen, reading)
    messages.print(
        f"{output}: kit of {model}, {len(kit.layers)} layers, fingerprint {kit.description.fingerprint}",
        soft_wrap=True,
    )
    if config is not None:
        multiplier = connect(
            config,
            kit,
            lambda missing, size: track(
                missing, f"Obtaining {size / 1e6:,.1f} MB of hints", console=messages, transient=True
            ),
        )
        products = all_products(checkpoint, chosen)
        multiplier.ready(products)
        multiplier.close()
        messages.print(f"{output}: hints of {len(products)} products")


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
    from blindtune.client.tls.certs import DEFAULT_HOSTS, issue_operator_certificates

    for name in operator:
        issued = issue_operator_certificates(directory, name, host or DEFAULT_HOSTS, days)
        messages.print(f"operator {name}: {issued.ca.parent}")
