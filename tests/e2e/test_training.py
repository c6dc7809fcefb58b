"""Fine-tuning with TRL on a pretrained model and real questions, through operators and without."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from support.assets import asset, json_lines, minilm
from support.fine_tuning import fine_tune
from support.operators import running_operators
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from blindtune import BlindConfig, Operator, multiplier_of

pytestmark = pytest.mark.hf
STEPS = 50


def assert_same_adapter(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.endswith("lora_B.weight") and tensor.any() for name, tensor in a.items())


@pytest.mark.slow
def test_three_operators_give_the_reference_adapter_bit_for_bit(tmp_path: Path) -> None:
    expected, _ = fine_tune(tmp_path / "reference", BlindConfig(masking="reference", progress=False), STEPS)
    with running_operators(tmp_path, {"tiny-llama": asset("models/tiny-llama")}, (1, 1, 1)) as operators:
        config = BlindConfig(
            operators=operators.operators("tiny-llama"), allow_one_machine=True, progress=False
        )
        losses, trainer = fine_tune(tmp_path / "shares", config, STEPS)
        figures = multiplier_of(trainer.model).statistics()
        multiplier_of(trainer.model).close()
    assert len(losses) == STEPS
    assert losses == expected
    assert_same_adapter(tmp_path / "reference", tmp_path / "shares")
    assert [x.lies for x in figures.values()] == [(), (), ()]
    assert all(x.verified_responses > STEPS for x in figures.values())


@pytest.mark.slow
def test_the_adapter_loads_with_stock_peft_on_the_stock_model(tmp_path: Path) -> None:
    _, trainer = fine_tune(tmp_path, BlindConfig(masking="reference", progress=False), 20)
    model = asset("models/tiny-llama")
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    untuned = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tuned = PeftModel.from_pretrained(stock, tmp_path).eval()
    inputs = AutoTokenizer.from_pretrained(model)(
        [row["question"] for row in json_lines("data/gsm8k/validation.jsonl", 1)], return_tensors="pt"
    )
    with torch.no_grad():
        expected, private = tuned(**inputs).logits, trainer.model.eval()(**inputs).logits
        change = (untuned(**inputs).logits - expected).norm() / expected.norm()
    error = (private - expected).norm() / expected.norm()
    # int8 weights are off by about 2^-6; the adapter changed the logits by far more.
    assert error < 2**-5
    assert change > 4 * error


def _gradients(operators: Sequence[Operator], masking: str) -> tuple[float, dict[str, torch.Tensor]]:
    from peft import get_peft_model

    set_seed(0)
    config = BlindConfig(operators=operators, masking=masking, allow_one_machine=True, progress=False)  # type: ignore[arg-type]
    base = AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_labels=3, quantization_config=config, dtype=torch.float32
    )
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    texts = ["The Supplier may assign this Agreement.", "All fees are due within thirty days of invoice."]
    inputs = AutoTokenizer.from_pretrained(minilm())(texts, padding=True, return_tensors="pt")
    loss = model(**inputs, labels=torch.tensor([0, 2])).loss
    loss.backward()
    multiplier_of(model).close()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_pretrained_encoder_gets_the_reference_gradients_through_operators(tmp_path: Path) -> None:
    expected_loss, expected = _gradients((), "reference")
    with running_operators(tmp_path, {"minilm": minilm()}, (1, 1)) as operators:
        loss, gradients = _gradients(operators.operators("minilm"), "shares")
    assert loss == expected_loss
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert any("classifier" in name for name in gradients)
