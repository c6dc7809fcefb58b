"""The client's process: connects, trains, and has every product held against the reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from support.buffers import WatchedBuffers

from blindtune.client.operators.operator import OperatorClient
from blindtune.client.rounds.connect import expectations
from blindtune.client.rounds.multiplier import PrivateMultiplier, RemoteMultiplier
from blindtune.protocol.fixed_point import quantize_rows
from blindtune.protocol.masks import MaskedOperand
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Centred
from simulation.scheduler import Pool
from simulation.training import train
from simulation.transport import SimulatedTransport
from simulation.watched import WatchedKit, WatchedSource

if TYPE_CHECKING:
    from simulation.world import World

__all__ = ["LEAST_BLOCK_ROWS", "Client"]

RETRY_SECONDS = 60.0
REQUEST_SECONDS = 30.0
LEAST_BLOCK_ROWS = 2


class Client:
    """One life of the client's process."""

    def __init__(self, world: "World", number: int) -> None:
        self.skew = 0.0
        self.name = f"client {number}"
        self._world = world
        scheduler = world.scheduler
        self.operators = [
            OperatorClient(
                index,
                f"operator {index}",
                [
                    (
                        f"10.0.{index}.{worker.index}:7100",
                        SimulatedTransport(
                            scheduler, world.ledger, worker, self.name, world.manifest(worker)
                        ),
                    )
                    for worker in workers
                ],
                expectations(world.assets.kit, Q31),
                RETRY_SECONDS,
                REQUEST_SECONDS,
                clock=self.clock,
                sleep=scheduler.sleep,
                later=scheduler.later,
                executor=lambda size: Pool(scheduler, size),  # type: ignore[arg-type,return-value]
            )
            for index, workers in enumerate(world.workers)
        ]
        self.buffers = [
            WatchedBuffers(lambda seen: world.ledger.broken("handed back", seen)).given_to(operator)
            for operator in self.operators
        ]
        self.multiplier = RemoteMultiplier(
            WatchedSource(world.source(), world.ledger),
            self.operators,
            WatchedKit(world.assets.kit, world.ledger),  # type: ignore[arg-type]
            ask_ahead=world.schedule.ahead,
        )
        self.judged = _Judged(world, self.multiplier)

    def clock(self) -> float:
        return self._world.scheduler.now + self.skew

    def live(self) -> None:
        """Connects, and trains from the last checkpoint to the end."""
        for operator in self.operators:
            operator.connect()
        world = self._world
        train(
            world.schedule.job,
            world.assets.kit,
            self.judged,
            world.saved,
            world.save,
            world.together,
        )
        ahead = self.multiplier._ahead
        for asked in [] if ahead is None else list(ahead._pending.values()):
            asked.exception()  # nobody needs its answer, and yet it has to come to an end


class _Judged(PrivateMultiplier):
    """Holds every product against the reference, and every request against the clock."""

    def __init__(self, world: "World", multiplier: RemoteMultiplier) -> None:
        self.source = multiplier.source
        self._world, self._multiplier = world, multiplier
        self._asked = self._answered = 0

    def multiply_integers(self, operand: Centred, product: Product) -> Centred:
        with self._timed(product, len(operand)):
            result = self._multiplier.multiply_integers(operand, product)
        self._judge(result.astype(np.int64), operand, product)
        return result

    def multiply_reals(
        self,
        x: NDArray[np.float32],
        product: Product,
        budget: int,
        column_scale: NDArray[np.float32] | None = None,
        output_scale: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        arguments = x, product, budget, column_scale, output_scale
        with self._timed(product, len(x)):
            result = self._multiplier.multiply_reals(*arguments)
        exact = not self.source.noise(1)
        if exact and not np.array_equal(result, self._world.assets.reference.multiply_reals(*arguments)):
            self._world.ledger.broken(
                "result", f"a product of {product.label} is not the reference's, in bits"
            )
        operand, scales = quantize_rows(x, budget, column_scale, product.diffused)
        outputs = 1.0 if output_scale is None else output_scale.astype(np.float64)
        # Of rows of zeros the scale is infinite, and the noise comes back as zero.
        factors = np.where(np.isfinite(scales), scales, 0.0)[:, np.newaxis]
        integers = result.astype(np.float64) / outputs * factors
        # Single precision gives them to one part in 2^24.
        self._judge(integers, operand, product, np.abs(integers) * 2.0**-23)
        return result

    def _ask(self, masked: MaskedOperand, product: Product, decode: Any) -> Any:
        raise AssertionError("products are asked for by the multiplier that is judged")

    @contextmanager
    def _timed(self, product: Product, rows: int) -> Iterator[None]:
        world = self._world
        world.ledger.asks()
        started = world.scheduler.now
        self._asked += 1
        answered_before = self._answered
        try:
            yield
        finally:
            self._answered += 1
            # Products that were under way meanwhile may have had the client's threads first.
            products = self._asked - answered_before
            # Each block of rows is tried for so long, and then once more at each worker, or eight times
            # where it says that it is busy: in less than 5 s each time, and after a pause of as much at most.
            # Blocks are cut to fit a worker, and for replicas; at worst one is asked for after the other.
            least = min(worker.limits.max_rows for worker in world.all_workers())
            blocks = max(-(-rows // least), rows // LEAST_BLOCK_ROWS)
            workers = max(world.schedule.workers)
            attempts = RETRY_SECONDS + (workers + 1) * REQUEST_SECONDS + workers * 8 * 10.0
            most = products * blocks * attempts
            if world.scheduler.now - started > most:
                world.ledger.broken("finite", f"{product.label} took {world.scheduler.now - started:.0f} s")

    def _judge(
        self,
        result: NDArray[np.int64] | NDArray[np.float64],
        operand: Centred,
        product: Product,
        rounding: NDArray[np.float64] | float = 0.0,
    ) -> None:
        assets, ledger = self._world.assets, self._world.ledger
        truth = assets.reference.multiply_integers(operand, product)
        bound = self.source.noise(assets.kit.column_absolute_sum(product)) + rounding
        if (np.abs(result - truth) > bound).any():
            ledger.broken("result", f"a product of {product.label} is not the reference's")
