"""Several micro-batches of one optimizer step in flight, with the result of one after the other.

Only waiting for workers overlaps: micro-batches compute one at a time (`blindtune.client.rounds.overlap`).
What is one for the whole process, random number generators and the parameters' ``grad``, is exchanged when
another micro-batch goes on, so that each finds its own. Each draws from generators of its own from the
start, seeded by the global one, and gradients are added in the order of the micro-batches, since
floating-point sums depend on it:

    grad = ((g_0 + g_1) + g_2) + ...

So neither the number in flight nor who finishes first changes a bit of the result.
"""

import contextvars
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np
import torch

from blindtune.client.rounds.overlap import Baton, Dropped
from blindtune.client.training.checkpoints import RandomState

__all__ = ["MicroBatches"]

T = TypeVar("T")
Gradients = list[torch.Tensor | None]


class MicroBatches:
    """Runs the micro-batches of a step.

    Args:
        limit: how many may be in flight, and keep their activations, at once.
        abandon: is called when the main thread is interrupted, and makes all waiting for workers end soon.
    """

    def __init__(self, limit: int = 1, abandon: Callable[[], None] = lambda: None) -> None:
        self.limit = limit
        self._abandon = abandon

    def run(self, parameters: Sequence[torch.Tensor], computations: Sequence[Callable[[], T]]) -> list[T]:
        """Computes all micro-batches of a step, two or more, and adds up their gradients.

        Args:
            parameters: those that are trained, on the CPU where more than one micro-batch may be in flight.
            computations: each computes one micro-batch, backward pass included, and leaves its gradients in
                the parameters' ``grad``.

        Returns:
            What they returned, in order.

        Raises:
            Exception: that of the first micro-batch in order that failed, when no other is in flight any
                more.
        """
        # A micro-batch may draw any number of random numbers, and the next must not depend on it.
        seeds = torch.randint(2**63 - 1, (len(computations),), device="cpu").tolist()
        afterwards = RandomState()
        limit = min(self.limit, len(computations))
        try:
            if limit > 1:
                return _SideBySide(parameters, computations, seeds, limit).run(self._abandon)
            results = []
            for seed, compute in zip(seeds, computations, strict=True):
                _seed_all(seed)
                results.append(compute())
            return results
        finally:
            afterwards.restore()


def _seed_all(seed: int) -> None:
    """Seeds the generators that `RandomState` keeps."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class _Own:
    """What is one for the whole process, as one micro-batch left it."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self.gradients: Gradients = [x.grad for x in parameters]
        self._random = RandomState()

    def restore(self, parameters: Sequence[torch.Tensor]) -> None:
        """Puts it back."""
        self._random.restore()
        _set_gradients(parameters, self.gradients)


def _set_gradients(parameters: Sequence[torch.Tensor], gradients: Gradients) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is not gradient:
            parameter.grad = gradient


class _SideBySide(Generic[T]):
    """One step with several micro-batches in flight, each in a thread of its own."""

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        computations: Sequence[Callable[[], T]],
        seeds: Sequence[int],
        limit: int,
    ) -> None:
        self._parameters = parameters
        self._computations = computations
        self._seeds = seeds
        self._baton = Baton(self._exchange)
        self._own: dict[int, _Own] = {}
        self._sum: Gradients = [x.grad for x in parameters]
        self._done: dict[int, tuple[T, Gradients]] = {}
        self._results: list[T] = []
        self._errors: dict[int, BaseException] = {}
        # One place for each micro-batch whose gradients are not added up yet.
        self._places = threading.Semaphore(limit)

    def run(self, abandon: Callable[[], None]) -> list[T]:
        threads: list[threading.Thread] = []
        try:
            for number in range(len(self._computations)):
                self._places.acquire()
                if self._errors:
                    break
                context = contextvars.copy_context()
                thread = threading.Thread(
                    target=context.run, args=(self._one, number), name=f"micro-batch {number}"
                )
                threads.append(thread)
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:
            self._baton.drop_from(0)
            if not isinstance(error, Exception):
                abandon()  # the user waits, and answers may take minutes
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        finally:
            _set_gradients(self._parameters, self._sum)
        if self._errors:
            raise self._errors[min(self._errors)]
        return self._results

    def _exchange(self, last: int | None, now: int) -> None:
        """Another micro-batch goes on where it stopped, or begins."""
        if last is not None:
            self._own[last] = _Own(self._parameters)
        own = self._own.pop(now, None)
        if own is not None:
            own.restore(self._parameters)
        else:
            _seed_all(self._seeds[now])
            _set_gradients(self._parameters, [None] * len(self._parameters))

    def _one(self, number: int) -> None:
        # Errors count before the baton is given away, or one more micro-batch might begin.
        with self._errors_of(number), self._baton.turn(number), self._errors_of(number):
            result = self._computations[number]()
            self._done[number] = result, [x.grad for x in self._parameters]
            _set_gradients(self._parameters, [None] * len(self._parameters))
            self._add_up()

    @contextmanager
    def _errors_of(self, number: int) -> Iterator[None]:
        """Keeps a micro-batch's error, to be raised in the main thread."""
        try:
            yield
        except Dropped:
            pass  # a micro-batch before this one failed
        except BaseException as error:
            # Those before it go on, for one of them may fail as well, and then its error is the first.
            self._errors[number] = error
            self._baton.drop_from(number + 1)
            self._places.release()

    @torch.no_grad()
    def _add_up(self) -> None:
        """Adds the gradients of all micro-batches whose turn to be added has come."""
        while (number := len(self._results)) in self._done:
            result, gradients = self._done.pop(number)
            for i, gradient in enumerate(gradients):
                total = self._sum[i]
                if gradient is not None:
                    self._sum[i] = gradient if total is None else total.add_(gradient)
            self._results.append(result)
            self._places.release()
