"""Every trainer that people use, on remote layers with a head of their own and with a tied one.

The smallest form of `benchmarks/compatibility/trainers.py`, whose figures are in docs/trainers.md.
"""

from pathlib import Path

import pytest
from support.operators import RunningOperators
from support.tokenizer import letters

from benchmarks.compatibility.trainers import TRAINERS, difference, identical, train
from blindtune import BlindConfig

pytestmark = pytest.mark.hf

ROWS = [
    {"question": "How old is Ann?", "answer": "Nine"},
    {"question": "Who came?", "answer": "Bob did"},
    {"question": "Where to?", "answer": "Home"},
    {"question": "How many?", "answer": "24 of 30"},
]
EVERYDAY = {("llama", name) for name in ("Trainer", "SFT", "DPO", "GRPO")}


@pytest.mark.parametrize(
    ("family", "trainer"),
    [
        pytest.param(family, trainer, marks=() if (family, trainer) in EVERYDAY else pytest.mark.slow)
        for family in ("llama", "llama_tied")
        for trainer in TRAINERS
    ],
)
def test_a_trainer_learns_what_it_learns_with_stock_peft(
    family: str, trainer: str, checkpoints: dict[str, Path], operators: RunningOperators
) -> None:
    shares = BlindConfig(operators=operators.operators(family), allow_one_machine=True, progress=False)
    stock, reference, private = (
        train(trainer, checkpoints[family], masking, ROWS, tokenizer=letters(), length=32, completion=4)
        for masking in (None, BlindConfig(masking="reference", progress=False), shares)
    )
    assert identical(private, reference)
    assert len(private.losses) == 4
    assert private.losses == pytest.approx(stock.losses, rel=0.02, abs=0.002)
    assert difference(private, stock) < 0.08
    moved = {name for name, x in private.adapter.items() if "lora_B" in name and x.any()}
    assert len(moved) == sum("lora_B" in name for name in private.adapter) > 10
    # A reward model has a classifier in the place of the head.
    assert (private.head_requests > 0) == (family == "llama" and trainer != "reward")
