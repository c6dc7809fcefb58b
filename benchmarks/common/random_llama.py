"""A randomly initialised Llama of Llama-3.2-1B's exact shape, as a checkpoint folder.

    python -m benchmarks.common.random_llama FOLDER [--layers 16]

What a step costs depends on the shape of a model alone, so a benchmark needs neither its weights nor a
licence for them. The weights are normal numbers with the standard deviation that the configuration names,
in bfloat16 with tied embeddings: 2.5 GB. There is no tokenizer, since tokens are drawn at random too.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

__all__ = ["llama_1b", "write"]

_FILE = "model.safetensors"


def llama_1b(layers: int = 16) -> LlamaConfig:
    """The configuration of Llama-3.2-1B, or of one with fewer layers."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=128_000,
        eos_token_id=128_001,
        dtype="bfloat16",
    )


def write(config: LlamaConfig, folder: Path, seed: int = 0) -> Path:
    """Writes a checkpoint, unless the folder holds it already; it appears as a whole or not at all."""
    if (folder / _FILE).exists():
        return folder
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    tensors = {}
    # Without duplicates: the tied head is the embedding, and stored once.
    for name, parameter in skeleton.named_parameters():
        tensor = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if parameter.dim() > 1:
            tensor.normal_(0, config.initializer_range, generator=generator)
        tensors[name] = tensor
    save_file(tensors, unfinished / _FILE, {"format": "pt"})
    config.save_pretrained(unfinished)
    unfinished.replace(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    arguments = parser.parse_args()
    print(write(llama_1b(arguments.layers), arguments.folder))


if __name__ == "__main__":
    main()
