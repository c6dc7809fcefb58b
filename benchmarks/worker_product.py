"""How close is a worker's product to four int8 passes?

    python benchmarks/worker_product.py [--device cuda] [--models 1b 8b] [--rows 64 1024] [--json FILE]

Times operand . M mod q for the layer groups of Llama models, from uint32 rows in the host's memory to
uint32 rows in the host's memory, as a worker does it, against `torch._int_mm` on four times the rows (the
four passes that the product cannot do without: 1.0), and against bf16 and fp32 products of the same
shape. All four take turns in one process, and the figures are medians. Weights are random.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from blindtune.protocol.modular_product import Multiplier, exact_method
from blindtune.protocol.parameters import MODULUS
from blindtune.protocol.products import Direction, Product, Span

# Hidden size, features of k and v, features of gate and up.
MODELS = {"1b": (2048, 512, 8192), "8b": (4096, 1024, 14336), "70b": (8192, 1024, 28672)}
ROWS = (64, 256, 1024, 4096)


def groups(model: str) -> dict[str, tuple[int, int]]:
    """[out, in] of each layer group, stacked."""
    hidden, kv, inner = MODELS[model]
    return {
        "q,k,v": (hidden + 2 * kv, hidden),
        "o": (hidden, hidden),
        "gate,up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def medians(
    functions: dict[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, float]:
    """Median seconds of each function, all of them in turns for about so long."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    begun = time.perf_counter()
    while len(times[next(iter(times))]) < 5 or time.perf_counter() - begun < seconds:
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure(shape: tuple[int, int], rows: int, device: torch.device, seconds: float) -> dict[str, float]:
    """Seconds of the worker's product and of what it is compared with."""
    contraction = shape[1]
    generator = np.random.default_rng(0)
    weight = torch.from_numpy(generator.integers(-127, 128, shape, dtype=np.int8)).to(device)
    multiplier = Multiplier({"w": weight}, exact_method([contraction], device))
    product = Product(Direction.FORWARD, (Span("w", 0, contraction),))
    operand = generator.integers(0, MODULUS, (rows, contraction), dtype=np.uint32)
    limbs = torch.from_numpy(generator.integers(-128, 128, (4 * rows, contraction), dtype=np.int8))
    limbs = limbs.to(device)
    x, w = torch.randn(rows, contraction, device=device), weight.t().float()
    bf16 = x.bfloat16(), w.bfloat16()
    return medians(
        {
            "product": lambda: multiplier.multiply(product, operand),
            "four int8 passes": lambda: torch._int_mm(limbs, weight.t()),
            "bf16": lambda: bf16[0] @ bf16[1],
            "fp32": lambda: x @ w,
        },
        device,
        seconds,
    ) | {"method": multiplier.method.name}  # type: ignore[dict-item]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1b"])
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each shape")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':18}{'rows':>6}{'product':>12}{'/ 4 int8':>10}{'/ bf16':>9}{'/ fp32':>9}")
    results = []
    for model in options.models:
        for group, shape in groups(model).items():
            for rows in options.rows:
                seconds = measure(shape, rows, device, options.seconds)
                results.append({"model": model, "group": group, "shape": shape, "rows": rows} | seconds)
                ratios = [seconds["product"] / seconds[x] for x in ("four int8 passes", "bf16", "fp32")]
                print(
                    f"{model + ' ' + group:18}{rows:>6}{seconds['product'] * 1e3:>9.3f} ms"
                    + "".join(f"{ratio:>9.2f}" for ratio in ratios),
                    flush=True,
                )
    if options.json:
        machine = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
