"""``blindtune verify-record`` and ``prove-record``: what a training record shows, and to whom."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from blindtune.client.cli.console import emit, results

__all__ = ["prove_record", "verify_record"]

Record = Annotated[
    Path, typer.Argument(help="The record: record.jsonl of an output folder.", show_default=False)
]
PublicKey = Annotated[
    Path, typer.Option("--public-key", help="The client's public key, record.pub, obtained from the client.")
]


class Split(StrEnum):
    """Which file of a run is meant."""

    TRAIN = "train"
    VALIDATION = "validation"


def verify_record(
    record: Record,
    public_key: PublicKey,
    output: Annotated[
        Path | None, typer.Option(help="The run's folder: its adapter and checkpoints are compared.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Data file, with --salt: that for training first, then that for validation."),
    ] = None,
    salt: Annotated[Path | None, typer.Option(help="The record's salt, which the client reveals.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A model, whose fingerprint is computed from all weights.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a --model on the hub.")] = None,
    head: Annotated[
        str | None, typer.Option(help="Hash of the last entry, known from elsewhere: nothing lacks then.")
    ] = None,
    proof: Annotated[
        Path | None, typer.Option(help="Proof from prove-record about the record of --about.")
    ] = None,
    about: Annotated[
        Path | None, typer.Option(help="JSONL file of the one record that --proof is about.")
    ] = None,
    require_finish: Annotated[
        bool, typer.Option("--require-finish", help="Refuse a record of a run that has not finished.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON with the result.")] = False,
) -> None:
    """Verify the training record of a run: chain, signatures, and what else is given."""
    from blindtune.client.record import verify
    from blindtune.client.record.chain import read_chain
    from blindtune.client.record.commitment import Salt
    from blindtune.client.record.keys import VerificationKey
    from blindtune.client.record.membership import check_proof, read_proof
    from blindtune.errors import ConfigurationError, RecordError

    if data and salt is None:
        raise ConfigurationError("--data needs --salt, which the client reveals to show what it trained on")
    if salt is not None and not data and output is None:
        raise ConfigurationError("--salt is for --data, or with --output for the configuration there")
    if (proof is None) != (about is None):
        raise ConfigurationError("--proof and --about belong together")
    chain = read_chain(record, VerificationKey.read(public_key))
    last = chain.entries[-1]
    if require_finish and not chain.complete:
        raise RecordError(f"{record} is open: it ends with {last.kind}, and not with finish")
    found: dict[str, object] = {
        "record": chain.record,
        "entries": len(chain.entries),
        "complete": chain.complete,
        "head": chain.head,
        "notes": verify.gaps(chain),
    }
    lines = [
        ("record", f"{chain.record}: {len(chain.entries)} entries, all signed with the key given"),
        ("time", f"{chain.start.time} to {last.time}, by the client's clock"),
    ]
    if chain.complete:
        steps, answers, lies = (last.body[x] for x in ("steps", "verified_responses", "lies"))
        lines.append(("end", f"finished: {steps:,} steps, {answers:,} answers verified, {lies} wrong"))
    else:
        lines.append(
            ("end", f"open: it ends with {last.kind}, so entries may lack at the end (see docs/record.md)")
        )
    if head is not None:
        verify.check_head(chain, head.strip().lower(), "--head")
        lines.append(("head", "is the one given: nothing lacks"))
    else:
        lines.append(("head", chain.head))
    if output is not None:
        there = verify.check_output(chain, output)
        found["adapter"], found["checkpoints"] = there.adapter, list(there.checkpoints)
        lines.append(("adapter", "as recorded" if there.adapter else "there is none, and the record is open"))
        removed = f", {len(there.removed)} recorded and removed since" if there.removed else ""
        lines.append(("checkpoints", f"{len(there.checkpoints)} as recorded{removed}"))
    if salt is not None:
        secret = Salt.read(salt)
        if data:
            found["data"] = verify.check_data(chain, secret, data)
            lines += [("data", f"{path}: as committed to") for path in data]
        if output is not None and verify.check_configuration(chain, secret, output):
            found["configuration"] = True
            lines.append(("recipe", "as committed to"))
    if model is not None:
        from blindtune.client.cli.quiet import quiet_libraries

        quiet_libraries()
        found["model"] = verify.check_model(chain, model, revision)
        lines.append(("model", f"has the recorded fingerprint {found['model']}"))
    if proof is not None and about is not None:
        shown = read_proof(proof)
        check_proof(chain, shown, _only(about))
        found["present"] = shown.present
        lines.append(("proof", f"{about}: {'' if shown.present else 'not '}among the {shown.split} records"))
    lines += [("note", x) for x in verify.gaps(chain)]
    if json:
        emit("verified", **found)
        return
    for name, text in lines:
        results.print(f"{name:12} {text}", markup=False, highlight=False, soft_wrap=True)


def prove_record(
    record: Record,
    public_key: PublicKey,
    data: Annotated[Path, typer.Option(help="The data file that was trained on.")],
    salt: Annotated[Path, typer.Option(help="The record's salt; it stays with you.")],
    about: Annotated[Path, typer.Option(help="JSONL file of one record: is it among those of --data?")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write the proof to.")],
    split: Annotated[Split, typer.Option(help="Which data file of the run it is.")] = Split.TRAIN,
) -> None:
    """Prove that one record was, or was not, among the data, without showing the others."""
    from blindtune.client.data.reading.records import read_records, record_digest
    from blindtune.client.process.disk import file_written_at_once
    from blindtune.client.record.chain import read_chain
    from blindtune.client.record.commitment import Salt
    from blindtune.client.record.keys import VerificationKey
    from blindtune.client.record.membership import prove

    chain = read_chain(record, VerificationKey.read(public_key))
    digests = [record_digest(x) for x in read_records(data)]
    proof = prove(chain, Salt.read(salt), split.value, digests, _only(about))
    content = proof.model_dump_json(exclude_none=True).encode() + b"\n"
    file_written_at_once(output, lambda file: file.write(content))
    said = "is" if proof.present else "is not"
    results.print(
        f"{output}: shows that the record {said} there", markup=False, highlight=False, soft_wrap=True
    )


def _only(path: Path) -> bytes:
    """Digest of the one record of a file."""
    from blindtune.client.data.reading.records import read_records, record_digest
    from blindtune.errors import ConfigurationError

    records = read_records(path)
    if len(records) != 1:
        raise ConfigurationError(f"{path} holds {len(records)} records: --about takes a file of one")
    return record_digest(records[0])
