"""A tuned model answers as it was taught: it stops where the answers stop, on any day, within its length."""

import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support.recipes import CHAT, Silent, character_tokenizer, recipe_of, with_tokenizer, write_lines
from transformers import AutoTokenizer, GenerationConfig, TextStreamer, TrainerCallback

from blindtune.client.data.reading.formats import Conversation
from blindtune.client.recipe import Recipe
from blindtune.client.runs.evaluation import Tuned, exact_match, tuned_model
from blindtune.client.runs.run import train_recipe
from blindtune.client.training.figures import Figures
from blindtune.client.training.stops import taught_stops
from blindtune.errors import CheckpointError, DataError, OperatorUnavailableError

pytestmark = pytest.mark.hf

POSITIONS = 64
# It ends turns with a token that ends no text, and writes what time it is.
TEMPLATE = "{{ strftime_now('%H:%M:%S') }}" + CHAT.replace("+ eos_token", "+ '<end>'")
RECORDS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
STEPS = 15


class Failing(Silent):
    """Raises after some steps, as workers that are gone do."""

    def steps(self, so_far: Callable[[], Figures]) -> TrainerCallback:
        class Stop(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                if state.global_step == 2:
                    raise OperatorUnavailableError("gone")

        return Stop()


def _wait_for_another_second(began: str) -> None:
    while f"{datetime.now():%S}" == began[-2:]:
        time.sleep(0.05)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Recipe:
    """A run that was interrupted, and resumed when its template would have written another time."""
    folder = tmp_path_factory.mktemp("answers")
    tokenizer = character_tokenizer(TEMPLATE)
    tokenizer.add_tokens(["<end>"])
    train = write_lines(folder / "train.jsonl", RECORDS)
    model = with_tokenizer(checkpoints["llama"], folder, tokenizer)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": POSITIONS}))
    recipe = recipe_of(
        folder,
        model,
        train,
        data={"validation": str(train)},
        adapter={"r": 16, "lora_alpha": 32},
        training={"max_steps": STEPS, "learning_rate": 1e-2, "lr_scheduler_type": "constant"},
    )
    with pytest.raises(OperatorUnavailableError):
        train_recipe(recipe, Failing())
    _wait_for_another_second(json.loads((recipe.output.dir / "run.json").read_text())["began"])
    summary = train_recipe(recipe, Silent(), resume=True)
    assert summary["after"]["token_accuracy"] == 1.0
    return recipe


@pytest.fixture(scope="module")
def tuned(run: Recipe) -> Iterator[Tuned]:
    with tuned_model(run.output.dir) as opened:
        yield opened


def test_answers_are_exactly_right_when_every_token_is(run: Recipe, tuned: Tuned) -> None:
    asked = tuned.questions(run.data.train, None)
    seen: list[bool] = []
    assert exact_match(tuned, asked, 20, seen.append) == 1.0
    assert seen == [True]


def test_an_answer_and_its_stream_stop_where_answers_were_taught_to_and_do_not_show_it(
    tuned: Tuned, capsys: Any
) -> None:
    question = [{"role": "user", "content": "a"}]
    streamer = TextStreamer(tuned.tokenizer, skip_prompt=True, skip_special_tokens=True)
    assert tuned.answer(question, 20, streamer=streamer) == "b"
    assert capsys.readouterr().out == "b\n"


def test_where_answers_stop_is_in_the_folder_for_whoever_loads_it(run: Recipe, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run.output.dir)
    stops = GenerationConfig.from_pretrained(run.output.dir).eos_token_id
    assert stops == sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>")])
    assert taught_stops(run.output.dir, tokenizer) == stops
    assert taught_stops(tmp_path, tokenizer) == stops[1:], "an earlier version wrote no such file"
    for wrong in (99_999, [-1], ["a"], {"a": 1}):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(CheckpointError, match="is damaged"):
            taught_stops(tmp_path, tokenizer)


def test_the_model_is_measured_with_the_time_that_it_was_trained_with(run: Recipe, tuned: Tuned) -> None:
    summary = json.loads((run.output.dir / "summary.json").read_text())
    assert tuned.measure(run.data.train, None)["loss"] == pytest.approx(summary["after"]["loss"], rel=2e-5)


def test_a_question_that_fills_the_model_is_refused_and_an_answer_ends_with_it(tuned: Tuned) -> None:
    with pytest.raises(DataError, match="the prompt: the question has 64 tokens, and the model takes 64"):
        tuned.answer("a" * POSITIONS, 5)
    assert len(tuned.answer("a" * (POSITIONS - 2), 50)) <= 2


def test_only_what_ends_with_an_answer_is_compared_with_one(tuned: Tuned) -> None:
    turns = [*RECORDS[0]["messages"], {"role": "user", "content": "c"}]
    open_ended = Conversation(turns, "line 1")
    assert isinstance(tuned.answer_to(open_ended, 3), str)
    with pytest.raises(DataError, match="line 1: the conversation does not end with an answer"):
        exact_match(tuned, [open_ended], 3, lambda right: None)
