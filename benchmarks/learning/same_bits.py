"""Is the adapter that workers helped to train the reference's, bit for bit?

    python -m benchmarks.learning.same_bits --model MODEL --train train.jsonl [--parameter-set q24]
        [--quantization nf4] [--steps 50] [--kills 10] [--only train sft loop]

Trains through two workers with masking ``shares``, and without any with ``reference``, in three ways:

    train    blindtune train with gradient accumulation, with one, two and four micro-batches in flight, and
             with the client killed (SIGKILL) at random moments and resumed, so many times
    sft      a stock TRL SFTTrainer
    loop     a loop of one's own: AdamW, two batches added up to a step

Prints the SHA-256 of each adapter. It ends with 1 if one differs from its reference. The data has lines as
for `benchmarks.learning.quality`.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from benchmarks.common.worker_processes import HONEST, WorkerProcess
from benchmarks.learning.quality import conversations
from blindtune import BlindConfig, Operator
from blindtune.client import multiplier_of

ADAPTER = "adapter_model.safetensors"
_IN_FLIGHT = (1, 2, 4)
_LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def digest(folder: Path) -> str:
    """Of the adapter in a folder."""
    return hashlib.sha256((folder / ADAPTER).read_bytes()).hexdigest()[:16]


@contextmanager
def workers(arguments: argparse.Namespace, folder: Path) -> Iterator[list[str]]:
    """Two workers on loopback; their addresses."""
    options = ("--model", str(arguments.model), "--insecure", "--threads", "1")
    options = (*options, "--quantization", arguments.quantization)
    running = [
        WorkerProcess(HONEST, options, f"127.0.0.{i + 2}", folder / f"worker-{i}.log") for i in range(2)
    ]
    with ExitStack() as stack:
        for worker in running:
            worker.start()
            stack.callback(worker.kill)
        for worker in running:
            worker.wait_until_listening()
        yield [worker.address for worker in running]


# --- blindtune train ---------------------------------------------------------------------------------------


def write_recipe(arguments: argparse.Namespace, folder: Path, addresses: list[str]) -> Path:
    """The recipe of all runs."""
    with (folder / "train.jsonl").open("w") as file:
        for row in conversations(arguments.train, arguments.rows):
            turns = {"prompt": row["prompt"][0]["content"], "completion": row["completion"][0]["content"]}
            file.write(json.dumps(turns) + "\n")
    recipe = {
        "model": {"name": str(arguments.model)},
        "quantization": {"scheme": arguments.quantization},
        "masking": {
            "mode": "shares",
            "parameter_set": arguments.parameter_set,
            "insecure": True,
            "allow_one_machine": True,
        },
        "operators": [{"name": f"operator-{i}", "workers": [x]} for i, x in enumerate(addresses)],
        "adapter": {**_LORA, "lora_dropout": 0.1},
        "data": {"task": "instructions", "train": str(folder / "train.jsonl"), "max_length": 128},
        "training": {
            "max_steps": arguments.steps,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "save_total_limit": 2,
            "use_cpu": True,
        },
        "output": {"dir": str(folder / "output")},
    }
    with (folder / "recipe.yaml").open("w") as file:
        YAML(typ="safe").dump(recipe, file)
    return folder / "recipe.yaml"


def start(recipe: Path, output: Path, *settings: str, resume: bool = False) -> "subprocess.Popen[bytes]":
    """Starts ``blindtune train``."""
    options = [x for setting in (*settings, f"output.dir={output}") for x in ("--set", setting)]
    with output.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "blindtune.client.cli", "train", str(recipe), "--json", *options]
            + ["--resume"] * resume,
            stdout=log,
            stderr=log,
            env=os.environ | _ENVIRONMENT | {"BLINDTUNE_CACHE": str(output.parent / "cache")},
        )


def finished(process: "subprocess.Popen[bytes]", output: Path) -> str:
    """Waits for its end; the digest of its adapter."""
    if code := process.wait():
        raise RuntimeError(f"the run ended with {code}: {output.with_suffix('.log').read_text()[-3000:]}")
    return digest(output)


def killed(recipe: Path, output: Path, kills: int, generator: random.Random) -> str:
    """Kills a run so many times, each time a little after a checkpoint that it has made since."""
    checkpoints = output / "checkpoints"
    for number in range(kills):
        before = set(checkpoints.glob("checkpoint-*"))
        process = start(recipe, output, resume=number > 0)
        while not set(checkpoints.glob("checkpoint-*")) - before and process.poll() is None:
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 3))
        if process.poll() is not None:
            raise RuntimeError(f"the run ended after {number} kills: take more --steps, or fewer --kills")
        process.send_signal(signal.SIGKILL)
        process.wait()
    return finished(start(recipe, output, resume=kills > 0), output)


def trained(arguments: argparse.Namespace, folder: Path, addresses: list[str]) -> dict[str, str]:
    """Digests of ``blindtune train``, the reference first."""
    recipe = write_recipe(arguments, folder, addresses)
    found = {}
    output = folder / "reference"
    found["reference"] = finished(start(recipe, output, "masking.mode=reference", "operators=[]"), output)
    for count in _IN_FLIGHT:
        output = folder / f"shares-{count}"
        run = start(recipe, output, f"masking.micro_batches_in_flight={count}")
        found[f"shares, {count} in flight"] = finished(run, output)
    if arguments.kills:
        generator = random.Random(arguments.kills)
        name = f"shares, killed {arguments.kills} times"
        found[name] = killed(recipe, folder / "killed", arguments.kills, generator)
    return found


# --- in this process ---------------------------------------------------------------------------------------


@contextmanager
def loaded(arguments: argparse.Namespace, addresses: list[str]) -> Iterator[Any]:
    """The model, through these workers or as the reference."""
    config = BlindConfig(
        [Operator(f"operator-{i}", [x]) for i, x in enumerate(addresses)],
        "shares" if addresses else "reference",
        parameter_set=arguments.parameter_set,
        quantization=arguments.quantization,
        insecure=True,
        allow_one_machine=True,
        progress=False,
    )
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=config, dtype=torch.float32
    )
    try:
        yield model
    finally:
        multiplier_of(model).close()


def sft(arguments: argparse.Namespace, addresses: list[str], output: Path) -> None:
    """A stock SFTTrainer."""
    with loaded(arguments, addresses) as model:
        set_seed(0)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                str(output),
                max_steps=arguments.steps,
                per_device_train_batch_size=2,
                learning_rate=1e-3,
                max_length=128,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=conversations(arguments.train, arguments.rows),
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            peft_config=LoraConfig(**_LORA, task_type="CAUSAL_LM"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(str(output))


def loop(arguments: argparse.Namespace, addresses: list[str], output: Path) -> None:
    """A loop of one's own that adds up two batches."""
    with loaded(arguments, addresses) as base:
        set_seed(0)
        model = get_peft_model(base, LoraConfig(**_LORA, task_type="CAUSAL_LM"))
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        rows = [
            tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
            for row in conversations(arguments.train, arguments.rows)
        ]
        for step in range(arguments.steps):
            for batch in range(2):
                text = rows[(2 * step + batch) % len(rows)]
                inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
                (model(**inputs, labels=inputs["input_ids"]).loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(output)


_HERE = {"sft": sft, "loop": loop}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--parameter-set", default=None, help="of shares; the standard one by default")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=["train", *_HERE], default=["train", *_HERE])
    arguments = parser.parse_args()

    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with workers(arguments, folder) as addresses:
            for way in arguments.only:
                if way == "train":
                    found = trained(arguments, folder, addresses)
                else:
                    found = {}
                    for name, theirs in (("reference", []), ("shares", addresses)):
                        output = folder / f"{way}-{name}"
                        _HERE[way](arguments, theirs, output)
                        found[name] = digest(output)
                for name, bits in found.items():
                    same = bits == found["reference"]
                    wrong += not same
                    print(f"{way:8}{name:28}{bits}  {'same' if same else 'DIFFERENT'}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
