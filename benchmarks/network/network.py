"""How much of a link's bandwidth does training use, with 1, 2 and 4 micro-batches in flight?

    sudo python -m benchmarks.network.network [--mbits 1000] [--round-trip 20 40] [--json FILE]
    python -m benchmarks.network.network --proxy-only

Client and workers are real processes over mutual TLS, in two network namespaces of this machine that are
joined by a link of 1 Gb/s in each direction (tc tbf) with a delay (see `shaped_link`). Both operators of
`shares` are behind the same link. That takes root. Without it, --proxy-only puts a proxy between them that
limits the rate and delays: then TCP sees no delay, only HTTP/2 does.

    limit = bytes of payload of the busier direction / bandwidth
    share of the limit = limit / median seconds of a step

Payload is what the client's statistics count: residues, without the headers of TCP, TLS and HTTP/2, which
leave 96 % at best. Client, workers and the link itself share this machine's cores: where nearly all are busy,
they are what limits, and not the link. The model is a random Llama that is narrow, since bytes of a token
grow with its width and the workers' work with the width's square. Each step has more micro-batches than are
in flight, so that some go forward while others go backward, as in a long run: at its beginning and its end a
step cannot fill the link, and the fewer micro-batches it has, the more that weighs.

Half the bandwidth and twice the delay (--mbits 500 --round-trip 40) is the same run in slow motion, but for
the cores, which have twice the time: what it gains is what they cost.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from benchmarks.common.measuring import print_table, write_json
from benchmarks.common.random_llama import write
from benchmarks.common.ways import way_among
from benchmarks.common.worker_processes import HONEST, WorkerProcess
from benchmarks.network.proxied_link import proxied
from benchmarks.network.shaped_link import Link, inside, shaped_link
from blindtune.client.recipe import Recipe, write_recipe
from blindtune.client.tls.certs import issue_operator_certificates

OPERATORS = {"shares": ("alpha", "beta"), "lattice": ("alpha",)}
_parsed_way = way_among(OPERATORS)
_VOCABULARY = 256
_PAD, _END = "<pad>", "<end>"


@dataclass(frozen=True)
class Shape:
    """Of the model and of a step.

    Attributes:
        width, layers: of the model.
        batch, length: sequences of a micro-batch and their tokens.
        micro_batches: of a step.
        steps: with the first, which does not count.
    """

    width: int
    layers: int
    batch: int
    length: int
    micro_batches: int
    steps: int


def write_model(shape: Shape, folder: Path) -> Path:
    """A random Llama whose tokens are words."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=_VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.width * 11 // 4,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=max(1, shape.width // 128),
        head_dim=64,
        max_position_embeddings=shape.length,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    write(config, folder)
    words = [_PAD, _END, *(f"w{i}" for i in range(2, _VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(words)}, unk_token=_END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END).save_pretrained(
        folder
    )
    return folder


def write_data(shape: Shape, file: Path) -> Path:
    """Random words, as many as a sequence holds."""
    generator = np.random.default_rng(0)
    rows = shape.batch * shape.micro_batches * shape.steps
    words = generator.integers(2, _VOCABULARY, (rows, shape.length))
    texts = (" ".join(f"w{x}" for x in row) for row in words)
    file.write_text("".join(json.dumps({"prompt": "", "completion": x}) + "\n" for x in texts))
    return file


@contextmanager
def workers(names: Sequence[str], folder: Path, link: Link | None) -> Iterator[dict[str, WorkerProcess]]:
    """A worker of each operator behind the link, not yet listening, with certificates in ``folder/NAME``."""
    host = link.address if link else "127.0.0.1"
    with ExitStack() as stack:
        found = {}
        for name in names:
            files = issue_operator_certificates(folder, name, [host])
            tls = ("--tls-cert", files.worker, "--tls-key", files.worker_key, "--tls-client-ca", files.ca)
            options = ["--model", str(folder / "model"), "--threads", "1", *map(str, tls)]
            worker = WorkerProcess(HONEST, options, host, folder / f"{name}.log")
            with inside(link.workers) if link else nullcontext():
                worker.start()
            stack.callback(worker.kill)
            found[name] = worker
        yield found


def recipe(
    masking: str,
    in_flight: int,
    ahead: str,
    shape: Shape,
    folder: Path,
    addresses: dict[str, str],
    output: Path,
) -> Recipe:
    """The run, as a user would write it."""
    way = _parsed_way(masking)
    return Recipe.model_validate(
        {
            "model": {"name": str(folder / "model")},
            "masking": {
                "mode": way.masking,
                "parameter_set": way.parameter_set,
                "allow_one_machine": True,
                "micro_batches_in_flight": in_flight,
                "ask_ahead": ahead == "on",
            },
            "operators": [
                {
                    "name": name,
                    "workers": [address],
                    "ca": str(folder / name / "ca.pem"),
                    "cert": str(folder / name / "client.pem"),
                    "key": str(folder / name / "client-key.pem"),
                }
                for name, address in addresses.items()
            ],
            "adapter": {"target_modules": ["q_proj", "v_proj"]},
            "data": {
                "task": "instructions",
                "format": "prompt-completion",
                "train": str(folder / "train.jsonl"),
                "max_length": shape.length,
            },
            "training": {
                "use_cpu": True,
                "save_strategy": "no",
                "max_steps": shape.steps,
                "per_device_train_batch_size": shape.batch,
                "gradient_accumulation_steps": shape.micro_batches,
            },
            "output": {"dir": str(output)},
            "record": {"enabled": False},
        }
    )


class Client:
    """A process that trains, in the client's namespace."""

    def __init__(self, folder: Path, link: Link | None) -> None:
        self._file = folder / "recipe.yaml"
        self._errors = folder / "client.log"
        with inside(link.client) if link else nullcontext(), self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("network_client.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"BLINDTUNE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
            )

    def train(self, made: Recipe, watched: dict[str, Sequence[int]]) -> list[dict[str, Any]]:
        """Trains, and returns the samples at the ends of the steps."""
        write_recipe(made, self._file)
        assert self._process.stdin is not None and self._process.stdout is not None
        print(
            json.dumps({"recipe": str(self._file), "watched": watched}), file=self._process.stdin, flush=True
        )
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client ended: {self._errors.read_text()[-2000:]}")
        return json.loads(line)

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def figures(runs: Sequence[Sequence[dict[str, Any]]], bandwidth: float) -> dict[str, Any]:
    """Medians over the steps of some runs after the first one, whose end is where measuring begins.

    Args:
        runs: samples of each.
        bandwidth: bytes a second in each direction.
    """

    def median(value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(value(b) - value(a) for run in runs for a, b in itertools.pairwise(run))

    up, down, seconds = (median(itemgetter(key)) for key in ("up", "down", "time"))
    limit = max(up, down) / bandwidth
    return {
        "up": up,
        "down": down,
        "rounds": median(itemgetter("rounds")),
        "limit": limit,
        "seconds": seconds,
        "share": limit / seconds,
        "cores": {name: median(lambda x, name=name: x["cores"][name]) for name in runs[0][0]["cores"]},
        "busy": median(itemgetter("busy")) / (seconds * (psutil.cpu_count() or 1)),
    }


def measure(
    options: argparse.Namespace, shape: Shape, bandwidth: float, round_trip: float
) -> list[dict[str, Any]]:
    """All ways to mask with all numbers in flight over one link; they take turns."""
    one_way = round_trip / 2e3
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_model(shape, folder / "model")
        write_data(shape, folder / "train.jsonl")
        link: Link | None = None
        if not options.proxy_only:
            link = stack.enter_context(shaped_link(8 * bandwidth, one_way, options.congestion_control))
        names = sorted({name for x in options.masking for name in OPERATORS[_parsed_way(x).masking]})
        found = stack.enter_context(workers(names, folder, link))
        client = Client(folder, link)
        stack.callback(client.end)
        for worker in found.values():
            worker.wait_until_listening()
        addresses = {name: x.address for name, x in found.items()}
        watched = {"workers": [x.process.pid for x in found.values()]}
        if link:
            watched["link"] = [link.delay_line]
        else:
            proxy = stack.enter_context(proxied(addresses, bandwidth, one_way))
            addresses, watched["link"] = proxy.addresses, [proxy.pid]
        ways = list(itertools.product(options.masking, options.in_flight, options.ask_ahead))
        taken: dict[tuple[str, int, str], list[list[dict[str, Any]]]] = {way: [] for way in ways}
        for turn in range(options.turns):
            for masking, in_flight, ahead in ways:
                asked = {name: addresses[name] for name in OPERATORS[_parsed_way(masking).masking]}
                output = folder / f"output-{masking}-{in_flight}-{ahead}-{turn}"
                made = recipe(masking, in_flight, ahead, shape, folder, asked, output)
                samples = client.train(made, watched)
                taken[masking, in_flight, ahead].append(samples)
                share = figures([samples], bandwidth)["share"]
                print(f"{masking}, {in_flight} in flight, {round_trip:g} ms: {share:.0%}", file=sys.stderr)
    return [
        {"masking": masking, "in flight": in_flight, "ahead": ahead, "round trip": round_trip}
        | figures(runs, bandwidth)
        for (masking, in_flight, ahead), runs in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--masking",
        nargs="+",
        type=lambda text: _parsed_way(text).name,
        default=list(OPERATORS),
        help="shares, shares:q31, lattice, ...",
    )
    parser.add_argument("--in-flight", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument(
        "--ask-ahead", nargs="+", choices=["on", "off"], default=["off"], help="for masks, in shares"
    )
    parser.add_argument("--mbits", type=float, default=1000, help="bandwidth of each direction")
    parser.add_argument("--round-trip", nargs="+", type=float, default=[20, 40], help="milliseconds")
    parser.add_argument("--congestion-control", help="of TCP: cubic, bbr; the kernel's own unless given")
    parser.add_argument("--proxy-only", action="store_true", help="without root, and TCP sees no delay")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--micro-batches", type=int, default=16, help="of a step")
    parser.add_argument("--steps", type=int, default=4, help="the first does not count")
    parser.add_argument("--turns", type=int, default=1, help="of all ways over each link")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # namespaces are taken down
    bandwidth = options.mbits * 1e6 / 8
    shape = Shape(
        options.width, options.layers, options.batch, options.length, options.micro_batches, options.steps
    )
    results = []
    for round_trip in options.round_trip:
        results += measure(options, shape, bandwidth, round_trip)
    show(results)
    if options.json:
        write_json(options.json, results, options=vars(options) | {"json": str(options.json)})


def show(results: Sequence[dict[str, Any]]) -> None:
    """Prints the table."""
    headings = ["masking", "in flight", "ahead", "round trip, ms", "MB up", "MB down", "limit, s", "step, s"]
    headings += ["share of limit", "client", "workers", "link", "cores busy"]
    print_table(
        headings,
        [
            [
                x["masking"],
                x["in flight"],
                x["ahead"],
                f"{x['round trip']:g}",
                f"{x['up'] / 1e6:.1f}",
                f"{x['down'] / 1e6:.1f}",
                f"{x['limit']:.2f}",
                f"{x['seconds']:.2f}",
                f"{x['share']:.0%}",
                *(f"{x['cores'][name]:.2f}" for name in ("client", "workers", "link")),
                f"{x['busy']:.0%}",
            ]
            for x in results
        ],
    )
    print("client, workers, link: core-seconds of a step; cores busy: with whatever ran on this machine")


if __name__ == "__main__":
    main()
