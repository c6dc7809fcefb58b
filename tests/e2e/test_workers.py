import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.checkpoints import CLASSES, batch


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "gpt2", "bert"])
def test_x(operators, load, family, checkpoints):
    def run(model):
        torch.manual_seed(0)
        model = get_peft_model(
            model,
            LoraConfig(
                target_modules="all-linear",
                init_lora_weights=False,
                task_type="SEQ_CLS" if family == "bert" else "CAUSAL_LM",
            ),
        )
        model.train()
        torch.manual_seed(1)
        out = model(**batch(family))
        out.loss.backward()
        return (
            out.loss.detach(),
            out.logits.detach(),
            {n: p.grad for n, p in model.named_parameters() if p.requires_grad},
        )

    t = time.time()
    a = run(load(family, operators=operators.operators(family)))
    print("shares", time.time() - t)
    t = time.time()
    b = run(load(family, masking="reference"))
    print("ref", time.time() - t)
    t = time.time()
    c = run(CLASSES[family].from_pretrained(checkpoints[family]))
    assert torch.equal(a[0], b[0])
    assert a[2].keys() == b[2].keys()
    for k in a[2]:
        assert torch.equal(a[2][k], b[2][k])
    print(c[0], a[0], ((c[1] - a[1]).norm() / c[1].norm()).item())
    print(max(((c[2][k] - a[2][k]).norm() / c[2][k].norm()).item() for k in a[2]), len(a[2]))
