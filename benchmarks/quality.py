"""Does private training learn as well as training in the clear?

    python benchmarks/quality.py --model MODEL --train train.jsonl --test test.jsonl [--json FILE]

Trains the same LoRA adapter with the same data and seeds twice: with stock peft on the unquantized
model, and with Blindtune's integers (masking "reference", which "shares" equals bit for bit). Prints
the held-back loss of each seed, and how far the private model's logits are from those of stock peft
with the private adapter on the stock model.

Each line of the data has ``question``, ``rationale`` and ``answer`` (GSM8K), or ``prompt`` and
``completion``.
"""

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from blindtune import BlindConfig


def conversations(path: Path, limit: int) -> Dataset:
    """The first lines of a file as prompt and completion."""
    rows = []
    for line in path.read_text(encoding="utf-8").strip().split("\n")[:limit]:
        fields = json.loads(line)
        prompt = fields.get("question") or fields["prompt"]
        completion = fields.get("completion") or f"{fields['rationale']} {fields['answer']}"
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": completion}],
            }
        )
    return Dataset.from_list(rows)


def load(model: str, private: bool) -> Any:
    config = BlindConfig(masking="reference", progress=False) if private else None
    return AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)


def train(arguments: argparse.Namespace, private: bool, seed: int, output: str) -> tuple[float, float, Any]:
    """Trains one adapter; returns the held-back loss before and after, and the trained model."""
    set_seed(seed)
    trainer = SFTTrainer(
        model=load(arguments.model, private),
        args=SFTConfig(
            output,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            per_device_eval_batch_size=arguments.batch,
            learning_rate=arguments.learning_rate,
            gradient_checkpointing=False,
            max_length=256,
            bf16=False,
            use_cpu=True,
            seed=seed,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=conversations(arguments.train, arguments.train_rows),
        eval_dataset=conversations(arguments.test, arguments.test_rows),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=LoraConfig(target_modules="all-linear", r=8, lora_alpha=16, task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(output)
    return before, after, trainer.model


@torch.no_grad()
def logit_error(arguments: argparse.Namespace, private_model: Any, adapter: str) -> float:
    """Relative error of the private model's logits against stock peft with the saved adapter."""
    stock = PeftModel.from_pretrained(load(arguments.model, private=False), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    error = norm = 0.0
    for row in conversations(arguments.test, 8):
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        expected = stock(**inputs).logits
        error += float((private_model.eval()(**inputs).logits - expected).square().sum())
        norm += float(expected.square().sum())
    return float((error / norm) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--train-rows", type=int, default=800)
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    results: dict[str, list[float]] = {"local": [], "private": []}
    starting = {}
    errors = []
    print(f"{'seed':>4}  {'local':>8}  {'private':>8}  {'logits':>9}")
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as output:
            for kind in ("local", "private"):
                before, after, model = train(arguments, kind == "private", seed, f"{output}/{kind}")
                starting[kind] = before
                results[kind].append(after)
            errors.append(logit_error(arguments, model, f"{output}/private"))
        print(f"{seed:4}  {results['local'][-1]:8.4f}  {results['private'][-1]:8.4f}  {errors[-1]:9.1e}")
    means = {kind: statistics.mean(losses) for kind, losses in results.items()}
    spread = max(results["local"]) - min(results["local"])
    difference = means["private"] - means["local"]
    print(f"before {starting['local']:.4f} (local), {starting['private']:.4f} (private)")
    print(f"mean   {means['local']:.4f} (local), {means['private']:.4f} (private)")
    print(f"difference of the means {difference:+.4f}; spread of the local seeds {spread:.4f}")
    if arguments.json:
        figures = {
            "before": starting,
            "after": results,
            "difference_of_means": difference,
            "local_spread": spread,
            "logit_error": errors,
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        }
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
