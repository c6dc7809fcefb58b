"""Fifty clients at one worker: who gets how much, and who waits for how long.

    python -m benchmarks.worker.many_clients [--model FOLDER] [--clients 50] [--seconds 20] [--only TEXT]
        [--certificates] [--before FOLDER] [--rows 64] [--options "--max-concurrent 4"] [--json FILE]

Starts a real worker (`blindtune-worker serve`, with a token for each client, or a certificate) and clients of
different appetite, which ask for products of 64 rows (`--rows`) without a pause and verify them:

    equal        one request in flight each
    four each    four requests in flight each
    unequal      every other client has four in flight, the others one
    sizes        one in flight each; operands of 16 and of 256 rows
    greedy       one client has 64 in flight, the others one

`--before` names a folder with another version (``pip install --no-deps --target FOLDER ...``), whose worker
takes turns with this one's. A wait is the time from asking to the verified answer, tries that failed
included. Of clients with the same appetite it prints

    products a second   of all of them together
    fewest              products of the client that got fewest
    most/fewest         products of the client with most, divided by those
    wait                median and longest, over products
    worst/median        the longest of the clients' mean waits, by the median of them
    retries             requests that were sent again, in percent of all that were sent
    ended               the worker's exit code and how long it took, once all had left
"""

import argparse
import shlex
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common.crowd import Access, Appetite, Told, ask_all, small_model, worker
from benchmarks.common.measuring import print_table, write_json

FEW_ROWS, MANY_ROWS = 16, 256


def appetites(clients: int, rows: int) -> dict[str, list[Appetite]]:
    """What each client asks for, by scenario."""
    return {
        "equal": [Appetite(1, rows)] * clients,
        "four each": [Appetite(4, rows)] * clients,
        "unequal": [Appetite(4 if i % 2 else 1, rows) for i in range(clients)],
        "sizes": [Appetite(1, MANY_ROWS if i % 2 else FEW_ROWS) for i in range(clients)],
        "greedy": [Appetite(64, rows), *[Appetite(1, rows)] * (clients - 1)],
    }


@dataclass
class Outcome:
    """What clients of the same appetite got.

    Attributes:
        scenario, version, appetite: whose.
        clients: how many.
        rate: products a second of all of them.
        fewest: products of the client that got fewest.
        most_by_fewest: products of the client that got most, by those of the one that got fewest.
        median_wait, longest_wait: seconds, over requests.
        worst_by_median: the longest of the clients' mean waits, by the median of them.
        retries: of requests sent, as a fraction.
        errors: products that there were none of.
        ended: the worker's exit code, and how long it took to end.
    """

    scenario: str
    version: str
    appetite: Appetite
    clients: int
    rate: float
    fewest: int
    most_by_fewest: float
    median_wait: float
    longest_wait: float
    worst_by_median: float
    retries: float
    errors: int
    ended: str = ""


def outcomes(scenario: str, version: str, told: list[Told], seconds: float) -> list[Outcome]:
    """One for each appetite."""
    found = []
    for appetite in dict.fromkeys(x.appetite for x in told):
        group = [x for x in told if x.appetite == appetite]
        counts = [len(x.waits) for x in group]
        waits = [wait for x in group for wait in x.waits]
        # Whoever got nothing has waited all the time.
        means = [statistics.fmean(x.waits) if x.waits else seconds for x in group]
        found.append(
            Outcome(
                scenario,
                version,
                appetite,
                len(group),
                sum(counts) / seconds,
                min(counts),
                max(counts) / max(1, min(counts)),
                statistics.median(waits or [seconds]),
                max(waits or [seconds]),
                max(means) / statistics.median(means),
                sum(x.retries for x in group) / max(1, sum(x.sent for x in group)),
                sum(len(x.errors) for x in group),
            )
        )
    return found


HEADINGS = (
    "scenario", "worker", "clients", "products a second", "fewest", "most/fewest", "wait, s", "longest, s",
    "worst/median", "retries", "errors", "ended",
)  # fmt: skip


def _row(x: Outcome) -> tuple[object, ...]:
    appetite = f"{x.clients} with {x.appetite.in_flight} of {x.appetite.rows} rows"
    return (
        x.scenario, x.version, appetite, f"{x.rate:.1f}", x.fewest, f"{x.most_by_fewest:.2f}",
        f"{x.median_wait:.2f}", f"{x.longest_wait:.2f}", f"{x.worst_by_median:.2f}", f"{x.retries:.1%}",
        x.errors, x.ended,
    )  # fmt: skip


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint folder; a small random one unless given")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rows", type=int, default=64, help="of an operand, but in the scenario of sizes")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each scenario, without warming up")
    parser.add_argument("--rounds", type=int, default=1, help="how often versions take turns")
    parser.add_argument("--only", default="", help="scenarios whose name begins with this")
    parser.add_argument("--certificates", action="store_true", help="instead of tokens")
    parser.add_argument("--before", type=Path, help="folder where another version is installed")
    parser.add_argument("--options", default="", help="more options of the workers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    versions = {"this": None} if options.before is None else {"before": options.before, "this": None}
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = options.model or small_model(folder / "model")
        access = Access(folder, options.clients, options.certificates)
        for scenario, wanted in appetites(options.clients, options.rows).items():
            if not scenario.startswith(options.only):
                continue
            for _ in range(options.rounds):
                for version, code in versions.items():
                    with worker(model, access, folder, shlex.split(options.options), code) as (
                        running,
                        ended,
                    ):
                        clients = list(zip(access.clients, wanted, strict=True))
                        told = ask_all(model, running.address, clients, options.seconds)
                    new = outcomes(scenario, version, told, options.seconds)
                    for outcome in new:
                        outcome.ended = ended[0]
                        print(*_row(outcome), sep="  ", file=sys.stderr, flush=True)
                    found += new
    print_table(HEADINGS, [_row(x) for x in found])
    if options.json:
        write_json(options.json, [asdict(x) for x in found], seconds=options.seconds, options=options.options)


if __name__ == "__main__":
    main()
