"""Training with a certified parameter set: the reference's bits, and scales in checkpoints and only there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import batch
from support.operators import RunningOperators
from support.recipes import Silent, operator_sections, recipe_of, with_tokenizer, write_lines
from support.training import with_adapter
from transformers import TrainerCallback

from blindtune.client import multiplier_of
from blindtune.client.recipe import Recipe
from blindtune.client.record.package import package
from blindtune.client.rounds.multiplier import PrivateMultiplier
from blindtune.client.runs.run import train_recipe
from blindtune.client.training.figures import Figures
from blindtune.client.training.scales import restore_scales, save_scales
from blindtune.errors import CheckpointError, OperatorUnavailableError
from blindtune.protocol.certificate.history import ScaleHistory

pytestmark = pytest.mark.hf
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RECORDS = [{"prompt": "ab" * i, "completion": "c" * (1 + 3 * (i % 4))} for i in range(1, 9)]
ADAPTER = {
    "target_modules": MODULES,
    "exclude_modules": ["norm", "act_fn", "lm_head", "rotary_emb", "embed_tokens"],
}
TRAINING = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    with_tokenizer(checkpoints["llama"], folder)
    write_lines(folder / "train.jsonl", RECORDS)
    return folder


@pytest.fixture
def recipe(shared: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(name: str, masking: dict[str, Any] | None = None, **sections: Any) -> Recipe:
        (tmp_path / name).mkdir(exist_ok=True)
        return recipe_of(
            tmp_path / name,
            shared / "llama",
            shared / "train.jsonl",
            masking={"mode": "reference", "parameter_set": "q24", **(masking or {})},
            **{"adapter": ADAPTER, "training": TRAINING, "record": {"key": str(tmp_path / "record.key")}}
            | sections,
        )

    return make


class Stopping(Silent):
    """Ends a run in the middle of a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def steps(self, so_far: Callable[[], Figures]) -> TrainerCallback:
        step = self._step

        class Stop(TrainerCallback):
            def on_substep_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                if state.global_step == step:
                    raise OperatorUnavailableError("gone")

        return Stop()


def adapter(run: Recipe) -> bytes:
    return (run.output.dir / "adapter_model.safetensors").read_bytes()


def scales(run: Recipe, step: int) -> dict[str, Any]:
    path = run.output.dir / "checkpoints" / f"checkpoint-{step}" / "scales.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_run_that_was_cut_off_ends_with_the_references_adapter_and_scales(
    recipe: Callable[..., Recipe], operators: RunningOperators, tmp_path: Path
) -> None:
    whole = recipe("whole")
    train_recipe(whole, Silent())
    masking = {"mode": "shares", "allow_one_machine": True, "micro_batches_in_flight": 2}
    run = recipe("run", masking=masking, operators=operator_sections(operators, "llama"))
    with pytest.raises(OperatorUnavailableError):
        train_recipe(run, Stopping(2))
    assert scales(run, 2)["steps"] == scales(whole, 2)["steps"]
    summary = train_recipe(run, Silent(), resume=True)
    assert adapter(run) == adapter(whole)
    assert scales(run, 3) == scales(whole, 3)
    assert {len(x) for x in scales(run, 3)["steps"].values()} == {3}
    assert set(summary["scales"]) == set(scales(run, 3)["steps"])
    assert summary["wraps"] == summary["reasks"] == 0 and summary["seconds"]["decoding"] == 0
    assert all(0 < x["part"] <= 1 and 0 < x["precision"] < 2**-8 for x in summary["scales"].values())
    # Neither the adapter's folder nor what may be given away has them.
    assert not list(run.output.dir.glob("scales*"))
    package(run.output.dir, tmp_path / "away", base_model="owner/name")
    assert not any("scales" in x.name or b"window" in x.read_bytes() for x in (tmp_path / "away").iterdir())


def test_a_checkpoint_without_scales_is_refused_by_a_certified_run(
    load: Callable[..., Any], tmp_path: Path
) -> None:
    """A run without a certified parameter set leaves none."""
    save_scales(multiplier_of(load("llama", masking="reference", parameter_set="q31")), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"scales\.json is missing"):
        restore_scales(multiplier_of(load("llama", masking="reference", parameter_set="q24")), tmp_path)


def history_of(model: Any) -> ScaleHistory:
    multiplier: PrivateMultiplier = multiplier_of(model)
    assert multiplier.certified is not None
    return multiplier.certified.history


def test_what_has_no_gradients_and_what_takes_no_step_leave_scales_alone(load: Callable[..., Any]) -> None:
    model = with_adapter(load("llama", masking="reference", parameter_set="q24"), "llama")
    history, inputs = history_of(model), batch("llama")
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], 0.01)
    fresh = history.state()
    with torch.no_grad():
        model.eval()(**inputs)
    model.generate(inputs["input_ids"], max_new_tokens=2, do_sample=False)
    with torch.inference_mode():
        model(**inputs)
    optimizer.step()
    assert history.state() == fresh
    model.train()
    for _ in range(2):
        model(**inputs).loss.backward()
        assert history.state()["steps"] == {}
    forward = {x for x in history.state()["open"] if x.startswith("forward")}
    assert forward < history.state()["open"].keys()
    optimizer.step()
    assert history.state()["open"] == {} and forward < history.state()["steps"].keys()
    stepped = history.state()
    with torch.no_grad():
        model(**inputs)
    optimizer.step()
    assert history.state() == stepped


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_raw_loop_with_accumulation_has_the_references_bits(
    operators: RunningOperators, load: Callable[..., Any], family: str
) -> None:
    results = []
    for options in (
        {"masking": "reference", "parameter_set": "q24"},
        {"masking": "shares", "parameter_set": "q24", "operators": operators.operators(family)},
    ):
        model = with_adapter(load(family, **options), family)
        optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], 0.5)
        torch.manual_seed(3)
        for step in range(3):
            for part in range(2):
                model(**batch(family, seed=2 * step + part)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = [x.detach().numpy().tobytes() for x in model.parameters() if x.requires_grad]
        results.append((trained, history_of(model).state()))
    assert results[0] == results[1]
