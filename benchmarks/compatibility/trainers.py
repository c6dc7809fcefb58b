"""Trainers of transformers and TRL on remote layers, next to the same training with stock peft.

    python -m benchmarks.compatibility.trainers --model MODEL --data train.jsonl [--steps 4] [--json FILE]

Each trainer runs three times from the same seed: stock peft on the plain model, Blindtune's integers in one
process (masking "reference"), and two operators with a worker process each (masking "shares"). Once with the
model as it is, with its output head tied to the embedding, and once with a head of its own (the embedding, a
little perturbed), which workers hold. The table says how far losses and adapters are apart, whether "shares"
equals "reference" to the last bit, and how often the head was asked for.

Each line of the data has ``question`` and ``answer``; an answer may have a ``rationale`` before it.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from benchmarks.common.measuring import print_table, write_json
from benchmarks.common.worker_processes import HONEST, WorkerProcess

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from blindtune import BlindConfig, Operator, multiplier_of

__all__ = ["TRAINERS", "Training", "difference", "train"]

Make = Callable[["Task"], Trainer]


@dataclass(frozen=True)
class Task:
    """What a trainer is made of."""

    checkpoint: Path
    masking: BlindConfig | None
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Mapping[str, str]]
    arguments: Mapping[str, Any]
    length: int
    completion: int

    @property
    def adapter(self) -> LoraConfig:
        return LoraConfig(target_modules="all-linear", r=8, lora_alpha=16, task_type="CAUSAL_LM")

    def model(self, classes: Any = AutoModelForCausalLM, **options: Any) -> Any:
        return classes.from_pretrained(
            self.checkpoint, quantization_config=self.masking, dtype=torch.float32, **options
        )

    def dataset(self, *columns: str) -> Dataset:
        """Prompts, what answers them, and what answers another."""
        table = [
            {
                "prompt": row["question"],
                "completion": row["answer"],
                "chosen": row["answer"],
                "rejected": self.rows[i - 1]["answer"],
                "label": i % 2 == 0,
            }
            for i, row in enumerate(self.rows)
        ]
        return Dataset.from_list([{name: row[name] for name in columns} for row in table])


def _sft(task: Task) -> Trainer:
    return SFTTrainer(
        model=task.model(),
        args=SFTConfig(max_length=task.length, **task.arguments),
        train_dataset=task.dataset("prompt", "completion"),
        processing_class=task.tokenizer,
        peft_config=task.adapter,
    )


def _preferences(trainer: type[Trainer], config: type[Any], room: int = 1) -> Make:
    def make(task: Task) -> Trainer:
        return trainer(
            model=task.model(),
            # ORPO divides by the length of an answer, of which a short limit leaves nothing.
            args=config(max_length=room * task.length, **task.arguments),
            train_dataset=task.dataset("prompt", "chosen", "rejected"),
            processing_class=task.tokenizer,
            peft_config=task.adapter,
        )

    return make


def _kto(task: Task) -> Trainer:
    return KTOTrainer(
        model=task.model(),
        args=KTOConfig(max_length=task.length, **task.arguments),
        train_dataset=task.dataset("prompt", "completion", "label"),
        processing_class=task.tokenizer,
        peft_config=task.adapter,
    )


def _reward(task: Task) -> Trainer:
    tokenizer = task.tokenizer
    adapter = task.adapter
    adapter.task_type = "SEQ_CLS"
    return RewardTrainer(
        model=task.model(
            AutoModelForSequenceClassification, num_labels=1, pad_token_id=tokenizer.pad_token_id
        ),
        args=RewardConfig(max_length=4 * task.length, **task.arguments),
        train_dataset=task.dataset("prompt", "chosen", "rejected"),
        processing_class=tokenizer,
        peft_config=adapter,
    )


def _grpo(task: Task) -> Trainer:
    def early_letters(completions: list[str], **kwargs: Any) -> list[float]:
        return [sum(letter in "abcdefgh" for letter in text) / (1 + len(text)) for text in completions]

    return GRPOTrainer(
        model=task.model(),
        reward_funcs=early_letters,
        args=GRPOConfig(
            num_generations=2,
            max_completion_length=task.completion,
            beta=0.1,
            # Where probabilities differ a little, another token is drawn now and then, and from there on all
            # differs. Nearly uniform ones hardly do.
            temperature=10.0,
            **task.arguments,
        ),
        train_dataset=task.dataset("prompt"),
        processing_class=task.tokenizer,
        peft_config=task.adapter,
    )


def _plain(task: Task) -> Trainer:
    tokenizer = task.tokenizer
    rows = [
        tokenizer(f"{row['question']} {row['answer']}", truncation=True, max_length=task.length)
        for row in task.rows
    ]
    return Trainer(
        model=get_peft_model(task.model(), task.adapter),
        args=TrainingArguments(**task.arguments),
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


TRAINERS: dict[str, Make] = {
    "Trainer": _plain,
    "SFT": _sft,
    "DPO": _preferences(DPOTrainer, DPOConfig),
    "KTO": _kto,
    "ORPO": _preferences(ORPOTrainer, ORPOConfig, room=4),
    "reward": _reward,
    "GRPO": _grpo,
}


@dataclass(frozen=True)
class Training:
    """How a training went.

    Attributes:
        losses: of each step.
        start, adapter: what is trained, by name, before and after.
        head_requests: products of the output head that workers were asked for.
    """

    losses: list[float]
    start: dict[str, torch.Tensor]
    adapter: dict[str, torch.Tensor]
    head_requests: int


def train(
    trainer: str,
    checkpoint: Path,
    masking: BlindConfig | None,
    rows: Sequence[Mapping[str, str]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    steps: int = 4,
    batch: int = 2,
    length: int = 128,
    completion: int = 16,
    learning_rate: float = 5e-2,
    seed: int = 1,
) -> Training:
    """Trains an adapter with one of the trainers; without a masking, with stock peft."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "constant",
            # AdamW gives a gradient near zero the weight of any other, and so shows what is of no account.
            "optim": "sgd",
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "seed": seed,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        set_seed(seed)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(checkpoint)
        made = TRAINERS[trainer](Task(checkpoint, masking, tokenizer, rows, arguments, length, completion))
    made.remove_callback(PrinterCallback)
    heads: list[str] = []
    if masking is not None:
        multiplier = multiplier_of(made.model)
        ask = multiplier._ask

        def counted(masked: Any, product: Any, decode: Any) -> Any:
            heads.extend(span.layer for span in product.spans[:1] if span.layer.startswith("lm_head"))
            return ask(masked, product, decode)

        multiplier._ask = counted
    start = _trained(made.model)
    made.train()
    if masking is not None:
        multiplier.close()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return Training(losses, start, _trained(made.model), len(heads))


def _trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def difference(one: Training, other: Training) -> float:
    """Norm of the difference of two adapters, relative to how far training moved the second."""
    a, b, start = (
        torch.cat([x.flatten() for x in t.values()]) for t in (one.adapter, other.adapter, other.start)
    )
    return float((a - b).norm() / (b - start).norm())


def changed(one: Training, other: Training) -> float:
    """Largest difference of two adapters' numbers."""
    return max(float((one.adapter[name] - value).abs().max()) for name, value in other.adapter.items())


def identical(one: Training, other: Training) -> bool:
    """Whether two trainings are the same to the last bit."""
    same = all(torch.equal(one.adapter[name], value) for name, value in other.adapter.items())
    return one.losses == other.losses and one.adapter.keys() == other.adapter.keys() and same


def untied(model: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose head is no longer the embedding."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weight = loaded.get_input_embeddings().weight.detach()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    loaded.config.tie_word_embeddings = False
    loaded.get_output_embeddings().weight = torch.nn.Parameter(weight + 0.02 * weight.std() * noise)
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


@contextmanager
def _operators(checkpoint: Path, folder: Path) -> Iterator[list[Operator]]:
    workers = [
        WorkerProcess(
            HONEST, ["--model", str(checkpoint), "--insecure"], f"127.0.0.{i + 1}", folder / f"worker-{i}.log"
        )
        for i in range(2)
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.wait_until_listening()
        yield [Operator(f"operator-{i}", [x.address]) for i, x in enumerate(workers)]
    finally:
        for worker in workers:
            if worker.is_running:
                worker.kill()


def _rows(path: Path, count: int) -> list[dict[str, str]]:
    lines = path.read_text(encoding="utf-8").split("\n")[:count]
    rows = [json.loads(line) for line in lines if line]
    return [
        {"question": x["question"], "answer": f"{x.get('rationale', '')} {x['answer']}".strip()} for x in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of an example at most")
    parser.add_argument("--completion", type=int, default=16, help="tokens that GRPO draws")
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--heads", nargs="+", choices=["tied", "own"], default=["tied", "own"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = _rows(arguments.data, 4 * arguments.steps)
    results = []
    table = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for head in arguments.heads:
            checkpoint = arguments.model if head == "tied" else untied(arguments.model, folder / "untied")
            with _operators(checkpoint, folder) as operators:
                shares = BlindConfig(
                    operators=operators, insecure=True, allow_one_machine=True, progress=False
                )
                for trainer in arguments.trainers:
                    stock, reference, private = (
                        train(
                            trainer,
                            checkpoint,
                            masking,
                            rows,
                            steps=arguments.steps,
                            length=arguments.length,
                            completion=arguments.completion,
                        )
                        for masking in (None, BlindConfig(masking="reference", progress=False), shares)
                    )
                    result = {
                        "trainer": trainer,
                        "head": head,
                        "losses": {
                            "stock": stock.losses,
                            "reference": reference.losses,
                            "shares": private.losses,
                        },
                        "adapter_difference": difference(private, stock),
                        "largest_adapter_difference": changed(private, stock),
                        "shares_equal_reference": identical(private, reference),
                        "head_requests": private.head_requests,
                    }
                    results.append(result)
                    table.append(
                        [
                            trainer,
                            head,
                            " ".join(f"{x:.4f}" for x in stock.losses),
                            " ".join(f"{x:.4f}" for x in private.losses),
                            f"{result['adapter_difference']:.2%}",
                            f"{result['largest_adapter_difference']:.1e}",
                            "yes" if result["shares_equal_reference"] else "NO",
                            private.head_requests,
                        ]
                    )
                    print(*table[-1], sep=" | ", flush=True)
    print()
    print_table(
        [
            "trainer",
            "head",
            "loss, stock peft",
            "loss, shares",
            "adapters differ by",
            "largest number by",
            "shares = reference",
            "requests for the head",
        ],
        table,
    )
    if arguments.json:
        write_json(
            arguments.json,
            results,
            model=arguments.model.name,
            steps=arguments.steps,
            length=arguments.length,
        )


if __name__ == "__main__":
    main()
