"""``blindtune eval``, ``generate`` and ``merge``: what can be done with a trained adapter."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from blindtune.client.cli.console import emit, messages, promise_events, results
from blindtune.client.cli.recipes import Settings

__all__ = ["evaluate", "generate", "merge"]

Run = Annotated[Path, typer.Argument(help="The output folder of a finished run.", show_default=False)]
Operators = Annotated[
    Path | None,
    typer.Option(
        "--operators",
        metavar="FILE",
        help="Use the operators of this recipe or file; by default those of the run, if you trust them.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One line of JSON for each result, on stdout.")]


def evaluate(
    run: Run,
    data: Annotated[
        Path | None, typer.Option(help="Data file; the validation file of the run unless given.")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Measure on a random sample of so many.")
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Measure the base model, without the adapter.")
    ] = False,
    exact_match: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Generate N answers too, and count those that are exactly right."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, for --exact-match.")] = 256,
    operators: Operators = None,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Measure an adapter: loss and perplexity, or accuracy and macro F1; privately, with the same workers.

    Operators that a folder names are used if runs of yours have used them, or blindtune trust was told so.
    """
    from blindtune.client.cli.quiet import quiet_libraries
    from blindtune.client.runs import evaluation
    from blindtune.errors import ConfigurationError

    promise_events(json)
    quiet_libraries()
    with evaluation.tuned_model(run, settings or [], not base, operators, _say) as tuned:
        path = data or tuned.recipe.data.validation
        if path is None:
            raise ConfigurationError("the run has no validation file: name one with --data")
        if exact_match is not None and tuned.labels:
            raise ConfigurationError("--exact-match is for language models: a classifier has its accuracy")
        if base and tuned.labels:
            raise ConfigurationError("a classifier has no classes without its adapter: leave out --base")
        if data is None and examples is None:
            examples = tuned.recipe.data.validation_examples
        figures = tuned.measure(path, examples)
        if exact_match is not None:
            asked = tuned.questions(path, exact_match)
            with messages.status("Generating answers") as status:
                seen: list[bool] = []

                def on_answer(right: bool) -> None:
                    seen.append(right)
                    status.update(
                        f"Generating answers: {sum(seen)} of {len(seen)} right, {len(asked)} in all"
                    )

                figures["exact_match"] = evaluation.exact_match(tuned, asked, max_new_tokens, on_answer)
                figures["exact_match_examples"] = len(asked)
    if json:
        emit("evaluated", data=str(path), **figures)
        return
    for name, value in figures.items():
        shown = f"{value:,}" if name.endswith("examples") else f"{value:.4f}"
        results.print(f"{name:20} {shown}", highlight=False)


def generate(
    run: Run,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask. Without it and --file, standard input is read.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Data file; each record's question is answered, as JSON lines.")
    ] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Answer a random sample of so many.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on with the prompt as it is: no chat template.")
    ] = False,
    base: Annotated[bool, typer.Option("--base", help="Ask the base model, without the adapter.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of sampling; 0 takes the most likely token each time.")
    ] = 0.0,
    operators: Operators = None,
    settings: Settings = None,
) -> None:
    """Ask a tuned language model, privately, with the same workers.

    Operators that a folder names are used if runs of yours have used them, or blindtune trust was told so.
    """
    from transformers import TextStreamer

    from blindtune.client.cli.quiet import quiet_libraries
    from blindtune.client.runs.evaluation import tuned_model
    from blindtune.errors import ConfigurationError

    quiet_libraries()
    if prompt is not None and file is not None:
        raise ConfigurationError("give --prompt or --file, not both")
    if prompt is None and file is None:
        prompt = typer.get_text_stream("stdin").read().strip()
        if not prompt:
            raise ConfigurationError("there is nothing to answer: give --prompt or --file, or pipe a text in")
    with tuned_model(run, settings or [], not base, operators, _say) as tuned:
        if tuned.recipe.data.task != "instructions":
            raise ConfigurationError(f"{run} holds a classifier, which generates nothing: use blindtune eval")
        if prompt is not None:
            system = tuned.recipe.data.system
            turns = [{"role": "system", "content": system}] if system else []
            turns.append({"role": "user", "content": prompt})
            streamer = TextStreamer(tuned.tokenizer, skip_prompt=True, skip_special_tokens=True)
            tuned.answer(prompt if raw else turns, max_new_tokens, temperature, streamer)
            return
        asked = tuned.questions(file or Path(), examples)
        for example in track(asked, "Answering", console=messages, transient=True):
            answer = tuned.answer_to(example, max_new_tokens, temperature)
            typer.echo(json_module.dumps({"where": example.where, "answer": answer}, ensure_ascii=False))


def merge(
    run: Run,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the merged model, new or empty.")],
    model: Annotated[
        str | None, typer.Option(help="The base model's folder or name; that of the run unless given.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
) -> None:
    """Merge an adapter into its base model, offline, where the base model is.

    The original weights are used, not the integers, and one shard at a time: memory for the whole model is
    not needed. The folder loads like any other model.
    """
    from blindtune.client.cli.quiet import quiet_libraries
    from blindtune.client.merge.checkpoint import merge as merge_adapter
    from blindtune.client.recipe import load_recipe
    from blindtune.client.training.folder import RECIPE, RunFolder
    from blindtune.errors import ConfigurationError

    quiet_libraries()
    labels: list[str] = []
    if (run / RECIPE).is_file():
        recipe = load_recipe(run / RECIPE)
        labels = RunFolder(run).labels
        model, revision = model or recipe.model.name, revision or recipe.model.revision
    if model is None:
        raise ConfigurationError(f"{run} does not say what its base model is: name it with --model")
    merged = merge_adapter(
        run,
        model,
        output,
        revision,
        labels=labels,
        progress=lambda shards: track(shards, "Merging", console=messages, transient=True),
    )
    messages.print(
        f"{output}: {merged.layers:,} layers merged", markup=False, highlight=False, soft_wrap=True
    )


def _say(message: str) -> None:
    messages.print(message, markup=False, highlight=False, soft_wrap=True)
