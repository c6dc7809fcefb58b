"""TRL's fused output head on a head that workers hold: the same figures, and all positions are asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import CLASSES, batch
from support.training import with_adapter
from transformers import PreTrainedModel
from trl.trainer.distillation_trainer import _chunked_divergence_loss
from trl.trainer.utils import add_fused_lm_head

from blindtune.client import multiplier_of
from blindtune.client.model.fused_head import _fused_output, _request
from blindtune.errors import UnsupportedError

pytestmark = pytest.mark.hf

Load = Callable[..., PreTrainedModel]
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def _inputs(labelled: int = 4) -> dict[str, torch.Tensor]:
    inputs = batch("llama")
    labels = inputs["labels"].clone()
    labels[:, :-labelled] = -100
    return inputs | {"labels": labels}


@pytest.mark.parametrize("count", [None, 5])
@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shifted labels"])
def test_the_figures_are_those_of_trl(checkpoints: dict[str, Path], count: int | None, shifted: bool) -> None:
    model = CLASSES["llama"].from_pretrained(checkpoints["llama"], dtype=torch.float32)
    add_fused_lm_head(model, temperature=0.7, outputs=FIELDS)
    inputs = _inputs()
    arguments = {"labels": inputs.pop("labels"), "shift_labels": None, "num_items_in_batch": count}
    if shifted:
        arguments["shift_labels"] = arguments["labels"].roll(-1, 1)
    expected = model(**inputs, **arguments, fused_lm_head=True)
    found = _fused_output(_request(model, arguments), model(**inputs), model.config)
    assert type(found) is type(expected) and found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    for output in (found, expected):
        (output.loss + output.entropy.sum()).backward()
    gradient = model.lm_head.weight.grad
    assert gradient is not None and gradient.any()


def test_the_gradients_are_those_of_the_plain_loss(load: Load) -> None:
    gradients = []
    for fused in (True, False):
        model = with_adapter(load("llama", masking="reference"), "llama").eval()
        add_fused_lm_head(model.get_base_model())
        options = {"fused_lm_head": True} if fused else {}
        model(**_inputs(), **options).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4)


def test_the_head_is_asked_for_every_position_whatever_the_labels(load: Load) -> None:
    model = load("llama", masking="reference").eval()
    add_fused_lm_head(model)
    multiplier = multiplier_of(model)
    ask, rows = multiplier._ask, []

    def counted(masked: Any, product: Any, decode: Any) -> Any:
        if product.spans[0].layer == "lm_head.weight":
            rows.append(masked.shares[0].shape[0])
        return ask(masked, product, decode)

    multiplier._ask = counted  # type: ignore[method-assign]
    for labelled in (1, 4):
        model(**_inputs(labelled), fused_lm_head=True)
    assert rows == [14, 14]


def test_a_forward_pass_that_failed_leaves_nothing_behind(load: Load) -> None:
    model = load("llama", masking="reference").eval()
    add_fused_lm_head(model)
    with pytest.raises(ValueError, match="input_ids"):
        model(**_inputs() | {"input_ids": None}, fused_lm_head=True)
    assert model(**_inputs()).logits.shape == (2, 7, 99)


def test_a_fused_head_of_an_unknown_kind_is_refused(load: Load) -> None:
    model = load("llama", masking="reference")
    model.forward = lambda *args, fused_lm_head=False, **kwargs: None
    with pytest.raises(UnsupportedError, match="this version of TRL .* head='local'"):
        model(**_inputs(), fused_lm_head=True)


def test_a_head_on_the_client_is_left_to_trl(load: Load) -> None:
    model = load("llama", masking="reference", head="local").eval()
    add_fused_lm_head(model)
    fused, plain = model(**_inputs(), fused_lm_head=True), model(**_inputs())
    assert type(fused).__name__ == "FusedCausalLMOutput"
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-4, atol=1e-4)


def test_distillation_out_of_the_weight_is_refused_by_name(load: Load) -> None:
    weight = load("llama", masking="reference").lm_head.weight
    hidden = torch.zeros(1, 3, 32)
    with pytest.raises(
        UnsupportedError, match=r"^lm_head\.weight stays with .* trl\.kernels\..*head='local'"
    ):
        _chunked_divergence_loss(hidden, hidden, weight, weight, torch.ones(1, 3), beta=0.5)
