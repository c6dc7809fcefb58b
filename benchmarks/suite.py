"""The performance benchmarks one after the other: tables to read, and JSON with the machine in a folder.

    python -m benchmarks.suite [--full] [--only NAME ...] [--folder build/bench]

The short suite takes some ten minutes on two cores: whole steps and the plan are of two layers of
Llama-3.2-1B's shape (2 GB of disk). --full takes all sixteen (6 GB), the shapes of 8B and 70B as well, the
comparison with Concrete ML (a virtual environment of its own) and, as root, the shaped network. Run it while
nothing else runs: figures are ratios of what takes turns, and still a busy machine shows.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.common.random_llama import llama_1b, write

_PLACES = {
    "worker_product": "worker",
    "client_kernels": "protocol",
    "transport": "network",
    "step": "steps",
    "plan": "steps",
    "cuda_check": "worker",
    "competitor": "steps",
    "network": "network",
}
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def suite(full: bool, folder: Path) -> dict[str, list[str]]:
    """Arguments of each benchmark by its name."""
    work = ["--work", str(folder / "work")]
    model = [] if full else ["--model", str(folder / "work" / "two-layers")]
    device = ["--device", "cuda"] if torch.cuda.is_available() else []
    commands = {
        "worker_product": ["--models", *(("1b", "8b", "70b") if full else ("1b",)), *device],
        "client_kernels": [] if full else ["--quick"],
        "transport": [] if full else ["--rows", "1024", "--columns", "2048"],
        "step": [*work, *model],
        "plan": [*work, *model],
    }
    if device:
        commands["cuda_check"] = []
    if full:
        commands["competitor"] = ["--environment", str(folder / "concrete-ml")]
        commands["network"] = [] if os.geteuid() == 0 else ["--proxy-only"]
    return commands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of them")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench"), help="for JSON and what is made once"
    )
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    commands = suite(arguments.full, folder)
    unknown = set(arguments.only or ()) - set(commands)
    if unknown:
        parser.error(f"--only: no benchmark {', '.join(sorted(unknown))} here, but {', '.join(commands)}")
    if not arguments.full:
        write(llama_1b(layers=2), folder / "work" / "two-layers")
    failed = []
    for name in arguments.only or commands:
        print(f"\n== {name}\n", flush=True)
        written = ["--json", f"{folder / name}.json"]
        command = [sys.executable, "-m", f"benchmarks.{_PLACES[name]}.{name}", *commands[name], *written]
        if subprocess.run(command, env=os.environ | _ENVIRONMENT, check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
