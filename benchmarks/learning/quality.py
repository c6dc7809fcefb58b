"""Does private training learn as well as training in the clear?

    python -m benchmarks.learning.quality --model MODEL --train train.jsonl --test test.jsonl
        [--kinds KIND ...]

Trains the same LoRA adapter with the same data and seeds on each kind of base model, and prints the held-back
loss of each seed, the means, and how far they are from the first kind's, whose seeds give the spread:

    local                               stock peft on the unquantized model
    qlora, qlora-double                 stock peft on the model in bitsandbytes' four bits
    MASKING[:PARAMETER SET][+SCHEME]    remote layers: reference, shares+nf4, lattice:mlwe1280 ...

``reference`` computes in this process what ``shares`` equals bit for bit; the others start workers of their
own on loopback. The last column is how far the logits of the model as it was trained are from those of stock
peft on the stock model, unquantized or, for nf4, in four bits, with the adapter loaded from disk.

Each line of the data has ``question``, ``rationale`` and ``answer`` (GSM8K); ``prompt`` and ``completion``;
``instruction``, ``context`` and ``response`` (Dolly); or ``text`` and ``label``.
"""

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PrinterCallback, set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from benchmarks.common.ways import way_among
from benchmarks.common.worker_processes import HONEST, WorkerProcess
from blindtune import BlindConfig, Operator
from blindtune.client import multiplier_of

_STOCK = {"local": None, "qlora": False, "qlora-double": True}
_OPERATORS = {"reference": 0, "shares": 2, "lattice": 1}
_parsed_way = way_among(_OPERATORS)
_FOUR_BITS = {"nf4": "qlora", "nf4-double": "qlora-double"}


def _turns(fields: Mapping[str, Any]) -> tuple[str, str]:
    """What is asked, and what is to be learned."""
    if "question" in fields and "rationale" in fields:
        return fields["question"], f"{fields['rationale']} {fields['answer']}"
    if "instruction" in fields:
        return "\n".join(x for x in (fields["instruction"], fields.get("context")) if x), fields["response"]
    if "label" in fields:
        return fields["text"], str(fields["label"])
    return fields["prompt"], fields["completion"]


def conversations(path: Path, limit: int) -> Dataset:
    """The first lines of a file as prompt and completion."""
    rows = []
    for line in path.read_text(encoding="utf-8").strip().split("\n")[:limit]:
        prompt, completion = _turns(json.loads(line))
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": completion}],
            }
        )
    return Dataset.from_list(rows)


def _kind(text: str) -> str:
    return text if text in _STOCK else _parsed_way(text).name


def stock(model: str, kind: str) -> Any:
    """The model as peft's users load it."""
    double = _STOCK[kind]
    config = None
    if double is not None:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)


@contextmanager
def loaded(model: str, kind: str) -> Iterator[Any]:
    """A base model of some kind, with workers if it needs any."""
    if kind in _STOCK:
        yield stock(model, kind)
        return
    way = _parsed_way(kind)
    options: dict[str, Any] = {} if way.parameter_set is None else {"parameter_set": way.parameter_set}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        serve = ("--model", model, "--quantization", way.scheme, "--insecure", "--threads", "1")
        workers = [
            WorkerProcess(HONEST, serve, f"127.0.0.{i + 1}", folder / f"{i}.log")
            for i in range(_OPERATORS[way.masking])
        ]
        for worker in workers:
            worker.start()
            stack.callback(worker.kill)
        for worker in workers:
            worker.wait_until_listening()
        config = BlindConfig(
            [Operator(f"operator-{i}", [x.address]) for i, x in enumerate(workers)],
            way.masking,  # type: ignore[arg-type]
            quantization=way.scheme,
            insecure=True,
            allow_one_machine=True,
            progress=False,
            **options,
        )
        found = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)
        stack.callback(multiplier_of(found).close)
        yield found


def trainer_of(arguments: argparse.Namespace, base: Any, seed: int, output: str) -> SFTTrainer:
    """Makes a trainer of one adapter."""
    set_seed(seed)
    trainer = SFTTrainer(
        model=base,
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
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # on a base in four bits, TRL would train in bfloat16
            parameter.data = parameter.data.float()
    return trainer


@torch.no_grad()
def logit_error(arguments: argparse.Namespace, trained: Any, kind: str, adapter: str) -> float:
    """Relative error of the trained model's logits against stock peft with the saved adapter."""
    like = kind if kind in _STOCK else _FOUR_BITS.get(_parsed_way(kind).scheme, "local")
    plain = PeftModel.from_pretrained(stock(arguments.model, like), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    error = norm = 0.0
    for row in conversations(arguments.test, 8):
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        expected = plain(**inputs).logits
        error += float((trained.eval()(**inputs).logits - expected).square().sum())
        norm += float(expected.square().sum())
    return float((error / norm) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", type=_kind, default=["local", "reference"])
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
    disable_progress_bars()

    figures: dict[str, dict[str, Any]] = {}
    seeds = "".join(f"{f'seed {seed}':>9}" for seed in arguments.seeds)
    print(f"{'kind':28}{'before':>9}{seeds}{'mean':>9}{'less':>9}{'logits':>9}", flush=True)
    for kind in arguments.kinds:
        after, errors = [], []
        # On a model of its own: where the processor has AVX512-BF16, bitsandbytes packs weights in four bits
        # when they are first multiplied without gradients, and backward reads them as if it had not.
        with tempfile.TemporaryDirectory() as output, loaded(arguments.model, kind) as base:
            before = trainer_of(arguments, base, arguments.seeds[0], output).evaluate()["eval_loss"]
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as output, loaded(arguments.model, kind) as base:
                trainer = trainer_of(arguments, base, seed, output)
                trainer.train()
                after.append(trainer.evaluate()["eval_loss"])
                trainer.save_model(output)
                errors.append(logit_error(arguments, trainer.model, kind, output))
        figures[kind] = {
            "before": before,
            "after": after,
            "mean": statistics.mean(after),
            "logits": max(errors),
        }
        less = figures[kind]["mean"] - figures[arguments.kinds[0]]["mean"]
        losses = "".join(f"{x:9.4f}" for x in after)
        print(
            f"{kind:28}{before:9.4f}{losses}{statistics.mean(after):9.4f}{less:+9.4f}{max(errors):9.1e}",
            flush=True,
        )
    first = figures[arguments.kinds[0]]["after"]
    print(f"spread of the seeds of {arguments.kinds[0]}: {max(first) - min(first):.4f}")
    if arguments.json:
        about = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"kinds": figures, **about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
