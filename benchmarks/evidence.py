"""What the documents claim of training, shown again: the full tables, which tests hold the smallest form of.

    python -m benchmarks.evidence --model MODEL --data FOLDER [--only NAME ...] [--folder build/evidence]

MODEL is a small language model with a tokenizer and a chat template. FOLDER has folders with ``train.jsonl``
and ``test.jsonl``, one for each task (gsm8k, dolly, cuad_clauses, rt_polarity, or what ``--tasks`` names,
with lines as for `benchmarks.learning.quality`). What is printed is kept in the other folder, a file for each
part:

    precision       relative error of single products, by masking and parameter set
    bits            adapters trained through workers equal the reference's, killed ten times, too
    bits-nf4        the same on four-bit weights
    losses-TASK     held-back losses of three seeds, stock PEFT against private training
    qlora           the same for the first task on four-bit weights, stock QLoRA against private training

Some hours on two cores. It ends with 1 if a part failed.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}
_TASKS = ("gsm8k", "dolly", "cuad_clauses", "rt_polarity")
_FOUR_BITS = (
    "qlora",
    "reference+nf4",
    "shares+nf4",
    "qlora-double",
    "reference+nf4-double",
    "local",
    "reference",
)


def parts(model: Path, data: Path, tasks: Sequence[str]) -> dict[str, list[str]]:
    """The command of each part, as arguments of Python."""

    def learned(task: str, *kinds: str) -> list[str]:
        files = ["--train", str(data / task / "train.jsonl"), "--test", str(data / task / "test.jsonl")]
        command = ["benchmarks.learning.quality", "--model", str(model), *files, "--steps", "50"]
        return [*command, "--kinds", *kinds]

    def bits(*options: str) -> list[str]:
        train = ["--model", str(model), "--train", str(data / tasks[0] / "train.jsonl")]
        return ["benchmarks.learning.same_bits", *train, *options]

    kinds = ("local", "reference", "lattice", "reference:q31", "lattice:mlwe1280")
    return {
        "precision": ["benchmarks.protocol.precision"],
        "bits": bits(),
        "bits-nf4": bits("--quantization", "nf4", "--kills", "3"),
        **{f"losses-{task}": learned(task, *kinds) for task in tasks},
        "qlora": learned(tasks[0], *_FOUR_BITS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", metavar="TASK", default=_TASKS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of them")
    parser.add_argument("--folder", type=Path, default=Path("build/evidence"))
    arguments = parser.parse_args()
    commands = parts(arguments.model, arguments.data, arguments.tasks)
    if unknown := set(arguments.only or ()) - set(commands):
        parser.error(f"--only: no part {', '.join(sorted(unknown))} here, but {', '.join(commands)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.only or commands:
        print(f"\n== {name}\n", flush=True)
        with (
            subprocess.Popen(
                [sys.executable, "-m", *commands[name]],
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | _ENVIRONMENT,
            ) as running,
            (arguments.folder / f"{name}.txt").open("w") as file,
        ):
            assert running.stdout is not None
            for line in running.stdout:
                print(line, end="", flush=True)
                file.write(line)
        if running.returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
