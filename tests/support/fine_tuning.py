"""Fine-tuning as users do it: TRL's trainer, a pretrained model, real questions."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from blindtune import BlindConfig
from support.assets import asset, json_lines

__all__ = ["fine_tune"]


def fine_tune(folder: Path, config: BlindConfig, steps: int) -> tuple[list[float], SFTTrainer]:
    """Tunes tiny-llama on GSM8K; returns every step's loss."""
    model = asset("models/tiny-llama")
    questions = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": f"{row['rationale']} {row['answer']}"}],
        }
        for row in json_lines("data/gsm8k/train.jsonl", 400)
    ]
    set_seed(0)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32),
        args=SFTConfig(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=5e-4,
            max_length=256,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(questions),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(target_modules="all-linear", r=8, lora_alpha=16, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(folder))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer
