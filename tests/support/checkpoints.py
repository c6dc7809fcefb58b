"""Tiny random checkpoints of each model family, and private-looking data for them."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

__all__ = ["CLASSES", "FAMILIES", "VOCABULARY", "batch", "save_checkpoint"]

VOCABULARY = 99
HIDDEN = 32

_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "initializer_range": 0.15}
_LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
# A tokenizer's special tokens have other numbers than these models' defaults allow.
_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _llama(tied: bool) -> LlamaConfig:
    return LlamaConfig(**_SIZES, **_LAYERS, **_TOKENS, num_key_value_heads=2, tie_word_embeddings=tied)


def _qwen3() -> Qwen3Config:
    return Qwen3Config(
        **_SIZES, **_LAYERS, **_TOKENS, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False
    )


def _gpt2() -> GPT2Config:
    # Its Conv1D layers are stored transposed, and its head is the embedding.
    return GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=HIDDEN, n_layer=2, n_head=4, **_TOKENS)


def _bert() -> BertConfig:
    return BertConfig(**_SIZES, **_LAYERS, pad_token_id=0, max_position_embeddings=64, num_labels=3)


FAMILIES: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "llama": (LlamaForCausalLM, _llama(tied=False)),
    "llama_tied": (LlamaForCausalLM, _llama(tied=True)),
    "qwen3": (Qwen3ForCausalLM, _qwen3()),
    "gpt2": (GPT2LMHeadModel, _gpt2()),
    "bert": (BertForSequenceClassification, _bert()),
}
CLASSES = {name: cls for name, (cls, _) in FAMILIES.items()}


def save_checkpoint(family: str, folder: Path, seed: int = 5, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a checkpoint with random weights and biases, other ones for each family."""
    cls, config = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(100 * seed + list(FAMILIES).index(family))
        model = cls(config)
        # Fresh models have biases of zero, under which a lost bias would go unnoticed.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def batch(family: str, rows: int = 2, tokens: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs and labels for a training step."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    labels = torch.randint(0, 3, (rows,), generator=generator) if family == "bert" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
