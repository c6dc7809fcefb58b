"""Numbers of rows, which operators see, follow from lengths alone; what would break that is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.checkpoints import CLASSES
from support.operators import RunningOperators
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from blindtune.client.model.remote_linear import RemoteLinear
from blindtune.client.model.row_guard import guard_rows
from blindtune.errors import UnsupportedError

pytestmark = pytest.mark.hf

Load = Callable[..., PreTrainedModel]
# Of one length; only in the first does what came before tell what comes next.
REPEATING, OTHER = torch.tensor([[5, 6, 7, 5, 6, 7]]), torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture
def model(load: Load) -> Any:
    found = load("llama", masking="reference")
    guard_rows(found, False)
    return found


def _rows(model: Any, text: torch.Tensor, **options: Any) -> list[int]:
    """Rows of each product of one layer while a text is gone on with."""
    rows: list[int] = []
    layer = next(x for x in model.modules() if isinstance(x, RemoteLinear))
    hook = layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    model.generate(text, max_new_tokens=8, eos_token_id=None, **options)
    hook.remove()
    return rows


OPTIONS: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prompt lookup in a configuration": {
        "generation_config": GenerationConfig(max_new_tokens=2, prompt_lookup_num_tokens=3)
    },
    "early exit": {"assistant_early_exit": 1},
    "an assistant": {"assistant_model": "assistant"},
    "multi-token prediction": {"use_mtp": True},
    "code": {"custom_generate": lambda *args, **kwargs: None},
    "code of the hub": {"custom_generate": "someone/else", "trust_remote_code": True},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "high"},
    "a continuous batch": {"cache_implementation": "paged"},
    "being an assistant": {"is_assistant": True},
    "healed tokens": {"token_healing": True},
}


@pytest.mark.parametrize("what", OPTIONS)
def test_ways_to_generate_that_show_content_are_refused(
    model: Any, checkpoints: dict[str, Path], what: str
) -> None:
    options = dict(OPTIONS[what])
    if "assistant_model" in options:
        options["assistant_model"] = CLASSES["llama"].from_pretrained(checkpoints["llama"])
    rows: list[int] = []
    layer = next(x for x in model.modules() if isinstance(x, RemoteLinear))
    layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    for asked in (model, copy.deepcopy(model)):
        with pytest.raises(UnsupportedError, match="lets operators see .*rows_follow_content=True"):
            asked.generate(REPEATING, **options)
    assert rows == [], "nothing was asked for"


def test_other_doors_to_the_same_are_closed(model: Any, checkpoints: dict[str, Path]) -> None:
    stock = CLASSES["llama"].from_pretrained(checkpoints["llama"])
    doors: list[Callable[[], object]] = [
        lambda: stock.generate(REPEATING, assistant_model=model, max_new_tokens=4),
        lambda: model.generate(REPEATING, None, None, None, None, None, stock),
        lambda: model.generate_batch([[5, 6, 7]]),
        lambda: model.init_continuous_batching(),
    ]
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    doors.append(lambda: adapted.generate(input_ids=REPEATING, prompt_lookup_num_tokens=3))
    for door in doors:
        with pytest.raises(UnsupportedError, match="lets operators see"):
            door()
    model.generation_config.prompt_lookup_num_tokens = 3  # as a checkpoint's generation_config.json may say
    with pytest.raises(UnsupportedError, match="lets operators see"):
        model.generate(REPEATING)


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"num_beams": 2}, {"num_beams": 2, "do_sample": True}]
)
def test_other_ways_show_lengths_alone(model: Any, options: dict[str, Any]) -> None:
    assert _rows(model, REPEATING, **options) == _rows(model, OTHER, **options)


def test_remote_models_are_watched_unless_the_user_asks_for_what_shows(
    load: Load, operators: RunningOperators
) -> None:
    chosen = operators.operators("llama", [0])
    with pytest.raises(UnsupportedError, match="prompt_lookup_num_tokens"):
        _rows(load("llama", operators=chosen), REPEATING, prompt_lookup_num_tokens=3)
    asked = load("llama", operators=chosen, rows_follow_content=True)
    lookup = {"prompt_lookup_num_tokens": 3}
    assert _rows(asked, REPEATING, **lookup) != _rows(asked, OTHER, **lookup), "or there is nothing to refuse"


def test_sparse_prediction_is_refused_and_models_that_do_not_generate_are_left_alone(load: Load) -> None:
    model = load("bert", masking="reference")
    guard_rows(model, False)
    assert isinstance(model, nn.Module) and "generate" not in vars(model)
    model.config.sparse_prediction = True
    with pytest.raises(UnsupportedError, match="config.sparse_prediction .*rows_follow_content"):
        guard_rows(model, False)
    guard_rows(model, True)
