"""Does a private run give as good an adapter as stock local PEFT?

    python -m benchmarks.learning.adapters RECIPE.yaml [--set data.train=...] [--seeds 0 1 2] [--json FILE]

Trains the recipe with each seed twice: with stock PEFT on the whole unquantized model (local), and with
Blindtune's integers in one process (reference, which shares equals bit for bit). With the first seed it
trains through real workers over mutual TLS as well, two operators with masking shares and one with
lattice, all on this machine. Prints the validation figures before and after.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Before torch is imported: threads that spin while they wait would take the workers' cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from blindtune.client.cli.progress import JsonObserver
from blindtune.client.cli.quiet import quiet_libraries
from blindtune.client.demo.processes import LocalOperator
from blindtune.client.recipe import Recipe, load_recipe
from blindtune.client.recipe.schema import OperatorSection
from blindtune.client.runs.run import train_recipe

OPERATORS = {"shares": ("alpha", "beta"), "lattice": ("alpha",)}


class Silent(JsonObserver):
    """Shows nothing."""

    def say(self, message: str) -> None: ...
    def data(self, data: Any) -> None: ...
    def measured(self, when: str, figures: dict[str, float]) -> None: ...
    def steps(self, so_far: Any) -> Any:
        from transformers import TrainerCallback

        return TrainerCallback()


def run(recipe: Recipe, folder: Path, kind: str, operators: Sequence[OperatorSection] = ()) -> dict[str, Any]:
    """Trains one adapter; returns its summary."""
    mode = "reference" if kind in ("local", "reference") else kind
    masking = recipe.masking.model_copy(update={"mode": mode, "allow_one_machine": True})
    output = recipe.output.model_copy(update={"dir": folder})
    changed = recipe.model_copy(update={"masking": masking, "operators": list(operators), "output": output})
    return train_recipe(changed, Silent(), private=kind != "local")


def through_workers(recipe: Recipe, folder: Path, kind: str) -> dict[str, Any]:
    """Trains through worker processes on this machine."""
    with ExitStack() as stack:
        certificates = folder / f"{kind}-operators"
        started = [
            stack.enter_context(LocalOperator.start(name, recipe.model.name, 1, certificates))
            for name in OPERATORS[kind]
        ]
        asked = [x.operator() for x in started]
        sections = [
            OperatorSection(name=x.name, workers=list(x.workers), ca=x.ca, cert=x.cert, key=x.key)
            for x in asked
        ]
        return run(recipe, folder / kind, kind, sections)


def same_adapter(one: Path, other: Path) -> bool:
    """Whether two runs gave the same adapter, bit for bit."""
    name = "adapter_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", nargs="*", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    results: dict[str, list[dict[str, Any]]] = {}

    def keep(kind: str, seed: int, summary: dict[str, Any]) -> None:
        results.setdefault(kind, []).append({"seed": seed, **summary})
        shown = {when: {k: round(v, 4) for k, v in summary[when].items()} for when in ("before", "after")}
        print(f"seed {seed}  {kind:9}  {shown['before']} -> {shown['after']}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        for seed in arguments.seeds:
            folder = Path(scratch, str(seed))
            recipe = load_recipe(arguments.recipe, [*arguments.set, f"training.seed={seed}"])
            for kind in ("local", "reference"):
                keep(kind, seed, run(recipe, folder / kind, kind))
            if seed == arguments.seeds[0]:
                for kind in arguments.workers:
                    keep(kind, seed, through_workers(recipe, folder, kind))
                if "shares" in arguments.workers:
                    same = same_adapter(folder / "shares", folder / "reference")
                    print(f"shares and reference give the same adapter: {same}", flush=True)
    first = arguments.seeds[0]
    for name in results["local"][0]["after"]:
        after = {kind: [x["after"][name] for x in runs] for kind, runs in results.items()}
        spread = max(after["local"]) - min(after["local"])
        means = ", ".join(f"{kind} {statistics.mean(after[kind]):.4f}" for kind in ("local", "reference"))
        print(f"{name}: mean of the seeds: {means}; spread of the local seeds {spread:.4f}")
        each = ", ".join(f"{kind} {values[0]:.4f}" for kind, values in after.items())
        print(f"{name}: seed {first}: {each}")


if __name__ == "__main__":
    main()
