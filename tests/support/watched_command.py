"""The command ``blindtune``, whose private numbers are written down: what a search for leaks looks for.

    python -m support.watched_command FILE ARGUMENTS...

FILE gets one line of JSON for each number: [what it is, its bytes in hexadecimal].
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from blindtune.client.cli import main
from blindtune.protocol.fixed_point import quantize_rows
from blindtune.protocol.residues import from_centred
from blindtune.protocol.shares.source import ShareSource
from support.standard import SHARES


def watch(path: Path) -> None:
    """Writes down the first values, integers, scales, seeds and shares of every operand from now on."""
    file = path.open("w", buffering=1)
    hide = ShareSource.hide_reals
    calls = 0

    def keep(what: str, value: bytes) -> None:
        file.write(json.dumps([what, value.hex()]) + "\n")

    def watched(x: Any, budget: int, column_scale: Any, diffused: bool) -> None:
        nonlocal calls
        integers, scales = quantize_rows(x, budget, column_scale, diffused)
        calls += 1
        values = x[0][:8].detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x[0][:8])
        if integers[0][:8].any():
            words = ", ".join(map(str, integers[0][:8].tolist()))
            keep(f"integers {calls} in words", words.encode())
            keep(f"integers {calls} in hexadecimal", integers[0][:8].astype("<i4").tobytes().hex().encode())
        keep(f"values {calls}", np.ascontiguousarray(values).tobytes())
        keep(f"integers {calls}", integers[0][:8].astype("<i4").tobytes())
        keep(f"residues {calls}", from_centred(integers, SHARES)[0][:8].astype("<u4").tobytes())
        for row, scale in enumerate(scales[:4]):
            if scale == 1:
                continue  # of a row of zeros, which is no secret
            keep(f"scale {calls}.{row}", np.float64(scale).tobytes())
            for digits in {f"{scale:.12g}", f"{scale:.8g}", repr(float(scale))}:
                if len(digits) >= 9:  # a shorter one could be there by chance
                    keep(f"scale {calls}.{row} in digits", digits.encode())

    def watched_hide(
        self: ShareSource, x: Any, product: Any, budget: int, column_scale: Any = None, *others: Any
    ) -> Any:
        masked, scales = hide(self, x, product, budget, column_scale, *others)
        watched(x, budget, column_scale, product.diffused)
        for share in masked.shares:
            if share.seed is not None:
                keep("seed", share.seed.key)
                keep("seed in digits", share.seed.key.hex().encode())
            keep("share", share.residues[0][:8].tobytes())
            keep("share in hexadecimal", share.residues[0][:8].tobytes().hex().encode())
        return masked, scales

    ShareSource.hide_reals = watched_hide  # type: ignore[method-assign]


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
    sys.argv = ["blindtune", *sys.argv[2:]]
    main()
