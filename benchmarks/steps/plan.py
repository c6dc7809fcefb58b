"""How close is a plan to what a step then takes?

    python -m benchmarks.steps.plan --work DIR [--model FOLDER] [--tokens 64 512] [--ways shares]
        [--json FILE]

Calibrates this machine, plans steps as `step` takes them, with the workers on the same processor,
and then takes them: planned / measured is 1 for a perfect plan. It shows as well if the machine is busier in
one than in the other. Bytes and rounds must agree exactly, and the benchmark ends with an error where they do
not.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common.measuring import print_table, write_json
from benchmarks.common.random_llama import llama_1b, write
from benchmarks.steps.step import MASKINGS, RANK, SEQUENCES, alone, measure, parsed_way
from blindtune.client.plan.calibration import calibrate
from blindtune.client.plan.planning import Plan, Settings, make_plan
from blindtune.client.plan.profiles import Profile, load_profile, save_profile


def planned(model: Path, way: str, tokens: int, profile: Profile) -> Plan:
    """The plan of a step of `step`."""
    settings = Settings(
        batch=SEQUENCES,
        length=tokens // SEQUENCES,
        masking=way,  # type: ignore[arg-type]
        operators=len(MASKINGS[way]),
        dtype="bfloat16",
        rank=RANK,
        link=None,
    )
    return make_plan(str(model), None, settings, profile)


def compare(plan: Plan, taken: dict[str, Any]) -> dict[str, float]:
    """Planned over measured, for time and memory.

    Raises:
        SystemExit: traffic or rounds differ.
    """
    exact = {"rounds": plan.rounds, "bytes_up": plan.bytes_up, "bytes_down": plan.bytes_down}
    wrong = {name: (value, taken[name]) for name, value in exact.items() if value != taken[name]}
    if wrong:
        raise SystemExit(f"planned and measured traffic differ: {wrong}")
    return {
        "planned": plan.seconds,
        "measured": taken["seconds"],
        "ratio": plan.seconds / taken["seconds"],
        "memory_ratio": plan.memory.client / taken["peak_bytes"]["RssAnon"],
        **{f"planned_{name}": seconds for name, seconds in plan.busy.items()},
        "planned_local": plan.local_seconds,
        "measured_wait": taken["parts"].get("wait for workers", 0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made once")
    parser.add_argument("--model", type=Path, help="checkpoint folder; Llama-3.2-1B's shape unless given")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--ways", nargs="+", choices=("shares", "lattice"), default=["shares", "lattice"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="of a turn, at least")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before the first turn")
    parser.add_argument("--threads", type=int, help="of each worker; as many as cores unless given")
    parser.add_argument("--profile", type=Path, help="use this calibration; made and kept there if it is not")
    parser.add_argument("--alone", type=Path, metavar="FILE", help="hold this lock whenever something runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = arguments.model
    if model is None:
        with alone(arguments.alone):
            model = write(llama_1b(), arguments.work / "llama-1b-shape")
    if arguments.profile is not None and arguments.profile.exists():
        profile = load_profile(arguments.profile)
    else:
        with alone(arguments.alone):
            profile = calibrate()
        if arguments.profile is not None:
            save_profile(profile, arguments.profile)
    names, arguments.ways = arguments.ways, [parsed_way(x) for x in arguments.ways]
    figures = measure(model.resolve(), arguments)
    results = {
        f"{way}/{tokens}": compare(planned(model, way, tokens, profile), figures[str(tokens)][way])
        for tokens in arguments.tokens
        for way in names
    }
    print_table(
        ["step", "planned (s)", "measured (s)", "planned / measured", "memory, planned / measured"],
        [
            [
                name,
                f"{x['planned']:.3f}",
                f"{x['measured']:.3f}",
                f"{x['ratio']:.2f}",
                f"{x['memory_ratio']:.2f}",
            ]
            for name, x in results.items()
        ],
    )
    if arguments.json:
        write_json(arguments.json, results, sequences=SEQUENCES, rank=RANK)


if __name__ == "__main__":
    main()
