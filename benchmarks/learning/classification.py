"""Does private training classify as well as training in the clear?

    python -m benchmarks.learning.classification --train TRAIN.jsonl --test TEST.jsonl [--masking lattice]

Trains the demo's classifier (all-MiniLM-L6-v2 with LoRA and a trainable head) with the same data and
seeds twice: with stock peft on the unquantized model, and privately, through worker processes on this
machine over mutual TLS. Prints the test accuracy of each seed. Each line of the data has ``text`` and
``label``.
"""

import argparse
import json
import random
import statistics
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path

from transformers.utils import logging

from blindtune import BlindConfig
from blindtune.client.demo.clauses import Clause
from blindtune.client.demo.processes import LocalOperator
from blindtune.client.demo.run import SETTINGS, packaged_model, read_examples
from blindtune.client.demo.training import Trainer


def accuracy(
    config: BlindConfig | None, train: list[Clause], test: list[Clause], seed: int, epochs: int
) -> float:
    """Test accuracy after training."""
    labels = sorted({example.label for example in train + test})
    trainer = Trainer(packaged_model(), labels, config, seed)
    trainer.train(train, lambda step: None, epochs)
    return trainer.accuracy(test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--masking", choices=SETTINGS, default="lattice")
    parser.add_argument("--train-rows", type=int, default=400)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The files are sorted; the same sample serves every run.
    sample = random.Random(0).sample
    train = sample(read_examples(arguments.train), arguments.train_rows)
    test = sample(read_examples(arguments.test), arguments.test_rows)
    results: dict[str, list[float]] = {"local": [], arguments.masking: []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        operators = [
            stack.enter_context(LocalOperator.start(name, packaged_model(), 1, folder)).operator()
            for name in SETTINGS[arguments.masking]
        ]
        config = BlindConfig(operators, arguments.masking, allow_one_machine=True, progress=False)
        for seed in arguments.seeds:
            for kind, chosen in (("local", None), (arguments.masking, config)):
                results[kind].append(accuracy(chosen, train, test, seed, arguments.epochs))
                print(f"seed {seed}  {kind:8} {results[kind][-1]:.3f}", flush=True)
    means = {kind: statistics.mean(values) for kind, values in results.items()}
    spread = max(results["local"]) - min(results["local"])
    print(f"mean {means}; spread of the local seeds {spread:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"accuracy": results, "local_spread": spread}, indent=1) + "\n")


if __name__ == "__main__":
    main()
