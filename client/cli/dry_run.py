"""``blindtune train --dry-run``: what a configuration comes to, without connecting to anything."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from blindtune.client.cli.console import emit, messages
from blindtune.client.cli.progress import JsonObserver, LineObserver
from blindtune.client.data.chat import IGNORED
from blindtune.client.data.prepared import PreparedData
from blindtune.client.plan.estimate import Estimate
from blindtune.client.preflight.offline import Known, offline_steps
from blindtune.client.recipe import Recipe
from blindtune.client.training.environment import without_accelerate_variables

__all__ = ["show_dry_run"]

_EXAMPLES = 2


@without_accelerate_variables()
def show_dry_run(recipe: Recipe, config: Path, json: bool, resume: bool = False) -> None:
    """Resolves everything that can be resolved here, and shows it.

    Args:
        config: the file that the recipe is from.
        resume: whether the run would go on with one that was begun.

    Raises:
        BlindtuneError: as a real run would, but for what only the workers know.
    """
    observer = JsonObserver() if json else LineObserver()
    data, tokenizer, expected = _resolved(recipe, observer.say, resume)
    observer.data(data)
    if json:
        emit("estimate", **vars(expected))
        return
    for split in filter(None, (data.train, data.validation)):
        if split.unused:
            names = ", ".join(sorted(map(ascii, split.unused)))
            messages.print(Text(f"{split.path}: fields not used: {names}"), soft_wrap=True)
    for index in range(min(_EXAMPLES, len(data.train.rows))):
        messages.print(
            Text(f"\nexample {index + 1}", style="bold"), Text(f"({data.train.parsed[index].where})")
        )
        messages.print(_rendered(data, index, tokenizer), soft_wrap=True)
    messages.print()
    messages.print(_table(recipe, expected))
    messages.print(
        f"Nothing was connected to. Next: blindtune check {shlex.quote(str(config))}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _resolved(recipe: Recipe, say: Callable[[str], None], resume: bool) -> tuple[PreparedData, Any, Estimate]:
    """The data, the tokenizer and the estimate, once every check went well that a run begins with."""
    known = Known(resume)
    for step in offline_steps():
        for finding in step.find(recipe, known):
            if finding.status == "warning":
                say(finding.line)
    return known.data, known.tokenizer, known.expected  # type: ignore[return-value]


def _rendered(data: PreparedData, index: int, tokenizer: Any) -> Text:
    """An example as the model reads it; what carries loss stands between ⟦ and ⟧."""
    row = data.train.rows[index]
    if isinstance(row["labels"], int):
        label = Text(f"⟦{data.labels[row['labels']]}⟧", style="bold green")
        return Text(tokenizer.decode(row["input_ids"])) + Text("  ->  ") + label
    shown = Text()
    start = 0
    carries = [label != IGNORED for label in row["labels"]]
    for end in range(1, len(carries) + 1):
        if end == len(carries) or carries[end] != carries[start]:
            text = tokenizer.decode(row["input_ids"][start:end])
            shown += Text(f"⟦{text}⟧", style="bold green") if carries[start] else Text(text, style="dim")
            start = end
    return shown


def _table(recipe: Recipe, expected: Estimate) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    hints = f", {expected.hint_bytes / 1e6:,.1f} MB of it hints, once" if expected.hint_bytes else ""
    operators = ", ".join(x.name for x in recipe.operators) or "none"
    for name, value in (
        ("model", f"{recipe.model.name}, {recipe.quantization.scheme}, head {recipe.quantization.head}"),
        ("masking", f"{recipe.masking.mode}, operators: {operators}"),
        ("adapter", f"rank {recipe.adapter.r} on {recipe.adapter.target_modules}"),
        ("steps", f"{expected.steps:,}, {expected.epochs:.2f} epochs"),
        ("tokens", f"{expected.tokens:,} trained on; {expected.padding_share:.1%} of all rows are padding"),
        ("rounds", f"{expected.rounds:,}, measuring before and after included"),
        ("traffic", f"{expected.bytes_up / 1e6:,.1f} MB up, {expected.bytes_down / 1e6:,.1f} MB down{hints}"),
        ("output", str(recipe.output.dir)),
    ):
        table.add_row(name, Text(value))
    return table
