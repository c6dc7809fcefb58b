"""Which way to multiply is exact on this machine: seen, and not believed.

``torch._int_mm`` can be silently wrong: without VNNI instructions pairs of products saturate at 16 bits,
which some extreme inputs do not show. So `exact_method` compares it with 64-bit integers, on random
and extreme inputs at every contraction length in use, before anything is served, and falls back to a product
that is exact everywhere.
"""

import logging
from collections.abc import Callable, Iterable
from importlib.util import find_spec

import numpy as np
import torch

from blindtune.protocol.kernels.dot_products import have_dot_products
from blindtune.protocol.kernels.tiles import are_usable
from blindtune.protocol.multiplication.expansion_probes import probes
from blindtune.protocol.multiplication.methods import (
    FloatProduct,
    Int8Product,
    Method,
    TorchInt8Product,
)
from blindtune.protocol.multiplication.tile_product import TileProduct, VectorProduct
from blindtune.protocol.parameters import ParameterSet
from blindtune.protocol.products import MAX_CONTRACTION
from blindtune.protocol.residues import Residues

__all__ = ["exact_method", "expand_on_host_unless_exact", "int8_methods", "is_exact"]

_logger = logging.getLogger(__name__)


def _test_operands(
    rows: int, contraction: int, parameters: ParameterSet, generator: np.random.Generator
) -> Iterable[Residues]:
    """Random residues; the largest and smallest lifted ones; and limbs that are all -128 or 127."""
    modulus, lift, most = parameters.modulus, parameters.lift, 256 ** (parameters.limbs - 1)
    yield generator.integers(0, modulus, (rows, contraction), dtype=np.uint32)
    yield np.where(generator.integers(0, 2, (rows, contraction)) == 1, lift, lift + 1).astype(np.uint32)
    for limb, extreme in ((-128, lift - modulus + 1), (127, lift)):
        # All limbs full but for the highest, which keeps the value inside the range of lifted ones.
        rest = limb * ((most - 1) // 255)
        top = -((rest - extreme) // most) if limb < 0 else (extreme - rest) // most
        yield np.full((rows, contraction), (rest + top * most) % modulus, np.uint32)


def _layouts(matrix: torch.Tensor, device: torch.device) -> Iterable[torch.Tensor]:
    """A matrix [contraction, outputs] as layers store it: whole, transposed, and as a span of either."""
    rows, columns = matrix.shape
    wide = torch.zeros((rows + 16, columns + 16), dtype=torch.int8)
    wide[8 : 8 + rows, 8 : 8 + columns] = matrix
    for stored, view in (
        (matrix, lambda m: m),
        # A copy, for strides as a layer has them: of one column they are ambiguous, and torch errs.
        (matrix.t().clone(memory_format=torch.contiguous_format), lambda m: m.t()),
        (wide, lambda m: m[8 : 8 + rows, 8 : 8 + columns]),
        (wide.t().contiguous(), lambda m: m.t()[8 : 8 + rows, 8 : 8 + columns]),
    ):
        yield view(stored.to(device))


def is_exact(method: Method, contraction: int, device: torch.device) -> bool:
    """Compares a method with products in 64-bit integers at one contraction length.

    All memory layouts in use are tried, few and many rows, and few and many outputs, since libraries
    choose their kernels by shape. The inputs are fixed: they are public, and a failure must be
    repeatable.
    """
    parameters, generator = method.parameters, np.random.default_rng(contraction)
    for rows, outputs, repeats in ((1, 264, 1), (17, 24, 1), (5, 40, 1), (17, 24, 16)):
        matrices = [
            generator.integers(-127, 128, (contraction, outputs), dtype=np.int8),
            np.where(generator.integers(0, 2, (contraction, outputs)) == 1, 127, -127).astype(np.int8),
            np.full((contraction, outputs), 127, np.int8),
        ]
        for operand in _test_operands(rows, contraction, parameters, generator):
            centred = torch.from_numpy(operand.astype(np.int64))
            centred[centred > parameters.half] -= parameters.modulus
            prepared = method.prepare(np.tile(operand, (repeats, 1)))
            for matrix in map(torch.from_numpy, matrices):
                # |sum| < 2^30 * 2^7 * 2^15: the product in int64 is exact.
                expected = torch.remainder(centred @ matrix.to(torch.int64), parameters.modulus)
                expected = expected.tile(repeats, 1)
                for layout in _layouts(matrix, device):
                    answer = method.multiply(prepared, layout).astype(np.int64)
                    if not np.array_equal(answer, expected.numpy()):
                        return False
    return True


def exact_method(
    contractions: Iterable[int],
    parameters: ParameterSet,
    device: torch.device | str = "cpu",
    log: Callable[[str], None] = _logger.warning,
) -> Method:
    """The fastest method on a device that is exact at all of these contraction lengths.

    Args:
        contractions: every contraction length that will be multiplied, each at most MAX_CONTRACTION.
        parameters: of the operands.
        device: where the matrices lie.
        log: told when the int8 product is not exact here, and what is used instead.

    Raises:
        RuntimeError: no method is exact, which means broken hardware or libraries.
    """
    device = torch.device(device)
    lengths = sorted(set(contractions))
    if not lengths:
        raise ValueError("there is no contraction length to check a method at")
    if lengths[-1] > MAX_CONTRACTION:
        raise ValueError(f"a contraction of {lengths[-1]} must be cut into spans of {MAX_CONTRACTION}")
    for method in (*int8_methods(parameters, device), FloatProduct(parameters, device)):
        try:
            wrong = next((n for n in lengths if not is_exact(method, n, device)), None)
            reason = f"is not exact at contraction length {wrong}" if wrong else None
        except (torch.OutOfMemoryError, MemoryError):
            raise  # a slower method would need more
        except Exception as error:  # a compiler's errors have no class in common
            reason = f"does not run ({_first_line(error)})"
        if reason is None:
            expand_on_host_unless_exact(method, device, log)
            return method
        log(f"the {method.name} product on {device} {reason}; trying a slower exact method")
    raise RuntimeError(f"no exact modular product on {device}: the hardware or its libraries are faulty")


def expand_on_host_unless_exact(method: Method, device: torch.device, log: Callable[[str], None]) -> None:
    """Compares a method's expansion of seeds with the host's, through products with unit matrices."""
    expand = method.expand
    if expand is None:
        return
    reason = None
    try:
        for rows in probes(method.parameters):
            unit = torch.eye(rows.columns, dtype=torch.int8, device=device)
            if not np.array_equal(method.multiply(expand(rows), unit), rows.residues()):
                reason = f"differs from the host's in the rows from {rows.seed.row_offset} on"
                break
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's errors have no class in common
        reason = f"does not run ({_first_line(error)})"
    if reason is not None:
        log(f"the {method.name} product's expansion of seeds on {device} {reason}; the host expands them")
        method.expand = None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def int8_methods(parameters: ParameterSet, device: torch.device) -> list[Method]:
    """The ways to multiply int8 on a device, the fastest first."""
    if device.type == "cpu":
        found: list[Method] = [TileProduct(parameters)] if are_usable() else []
        if have_dot_products():
            found.append(VectorProduct(parameters))
        return [*found, Int8Product(parameters)]
    methods: list[Method] = [TorchInt8Product(parameters, device)]
    if find_spec("triton"):
        from blindtune.protocol.multiplication.cuda_product import TritonInt8Product

        methods.insert(0, TritonInt8Product(parameters, device))
    return methods
