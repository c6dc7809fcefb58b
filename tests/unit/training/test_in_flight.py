"""Micro-batches in flight: the result of one after the other, whoever finishes first."""

import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from blindtune.client.rounds.overlap import waiting
from blindtune.client.training.checkpoints import RandomState
from blindtune.client.training.in_flight import MicroBatches

pytestmark = pytest.mark.hf
PATIENCE = 60
MICRO_BATCHES = 5


def _number() -> int:
    """Of the micro-batch that this thread computes; -1 in the main thread."""
    name, _, number = threading.current_thread().name.rpartition(" ")
    return int(number) if name == "micro-batch" else -1


class LastOneFirst:
    """Lets micro-batches end in reverse, of as many as are in flight: each waits for the one after it.

    Attributes:
        ended: their numbers, as they ended.
    """

    def __init__(self, count: int, limit: int) -> None:
        self.ended: list[int] = []
        self._events = [threading.Event() for _ in range(count)]
        # 0 ... limit - 1 are in flight together, and then one comes in for each that is added up.
        self._waits = {number for number in range(count) if number % limit < limit - 1}
        self._count = count

    def hold(self) -> None:
        """Waits for the next micro-batch's end, as if for a worker; in the main thread for nothing."""
        number = _number()
        if number in self._waits and number + 1 < self._count:
            with waiting():
                assert self._events[number + 1].wait(PATIENCE)

    def end(self) -> None:
        """This thread's micro-batch is done."""
        self.ended.append(_number())
        self._events[_number()].set()


@contextmanager
def _checkpointed(model: Any, on: bool) -> Iterator[None]:
    if on:
        model.activation_checkpointing_enable()
    yield
    if on:
        model.activation_checkpointing_disable()


def _micro_batches(model: Any, ended: Callable[[], None]) -> list[Callable[[], torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(4, 60, (2, 3 + i), generator=generator) for i in range(MICRO_BATCHES)]

    def computation(ids: torch.Tensor) -> Callable[[], torch.Tensor]:
        def compute() -> torch.Tensor:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            random.random(), np.random.rand()  # whoever draws from these has its own as well
            ended()
            return loss.detach()

        return compute

    return [computation(ids) for ids in rows]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed_again"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_results_are_those_of_one_at_a_time_although_the_last_one_ends_first(
    family: str, checkpointing: bool, load: Callable[..., Any]
) -> None:
    set_seed(0)
    model = get_peft_model(load(family, masking="reference"), LoraConfig(lora_dropout=0.3, r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.train()
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    outcomes = []
    with _checkpointed(model, checkpointing):
        for limit in (1, 2, 4, 8):
            order = LastOneFirst(MICRO_BATCHES, min(limit, MICRO_BATCHES))
            layer = next(x for n, x in model.named_modules() if n.endswith(("layers.1", "h.1")))
            hook = layer.register_forward_pre_hook(lambda *_, order=order: order.hold())
            set_seed(7)
            model.zero_grad()
            losses = MicroBatches(limit).run(list(trained.values()), _micro_batches(model, order.end))
            hook.remove()
            gradients = {name: x.grad for name, x in trained.items()}
            after = torch.rand(1).item(), np.random.rand(), random.random()
            outcomes.append((losses, gradients, after))
            assert order.ended == sorted(order.ended) if limit == 1 else order.ended != sorted(order.ended)
    losses, gradients, after = outcomes[0]
    assert any(x is not None and x.any() for x in gradients.values())
    for others in outcomes[1:]:
        assert others[0] == losses and others[2] == after
        assert all(torch.equal(others[1][name], gradients[name]) for name in gradients)


class Step:
    """A parameter whose gradients are given, in the order of the micro-batches."""

    def __init__(self, *gradients: float) -> None:
        self.parameter = torch.zeros(1, requires_grad=True)
        self.unused = torch.zeros(1, requires_grad=True)
        self.order = LastOneFirst(len(gradients), len(gradients))
        self.gradients = gradients

    def run(self, limit: int) -> list[int]:
        return MicroBatches(limit).run(
            [self.parameter, self.unused], [lambda i=i: self._compute(i) for i in range(len(self.gradients))]
        )

    def _compute(self, number: int) -> int:
        self.order.hold()
        (self.parameter * self.gradients[number]).sum().backward()
        self.order.end()
        return number


def test_gradients_are_added_in_order_where_order_matters() -> None:
    given = (1.0, 2.0**-24, 2.0**-24)
    forwards, backwards = (np.cumsum(x, dtype=np.float32)[-1] for x in (given, given[::-1]))
    assert forwards != backwards
    one, three = Step(*given), Step(*given)
    assert one.run(1) == three.run(3) == [0, 1, 2]
    assert (one.order.ended, three.order.ended) == ([-1, -1, -1], [2, 1, 0])
    assert one.parameter.grad is not None and three.parameter.grad is not None
    assert one.parameter.grad.item() == three.parameter.grad.item() == forwards
    assert three.unused.grad is None


class Halves(Step):
    """Waits in the middle of its backward pass, as for the answers of a remote layer."""

    def _compute(self, number: int) -> int:
        half = self.gradients[number] / 2
        (self.parameter * half).sum().backward()
        self.order.hold()
        (self.parameter * half).sum().backward()
        self.order.end()
        return number


def test_gradients_that_a_micro_batch_has_already_wait_with_it() -> None:
    step = Halves(2.0, 20.0, 200.0)
    step.run(3)
    assert step.order.ended == [2, 1, 0]
    assert step.parameter.grad is not None and step.parameter.grad.item() == 222.0


def test_gradients_that_are_there_already_are_added_to() -> None:
    step = Step(1.0, 2.0)
    step.parameter.grad = torch.tensor([10.0])
    step.run(2)
    assert step.parameter.grad.item() == 13.0


def test_no_more_are_begun_than_may_be_in_flight() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    inside: set[int] = set()
    most = [0]

    def compute(number: int) -> None:
        inside.add(number)
        most[0] = max(most[0], len(inside))
        for _ in range(3):
            with waiting():
                threading.Event().wait(0.001)
        parameter.sum().backward()
        inside.remove(number)

    MicroBatches(3).run([parameter], [lambda i=i: compute(i) for i in range(12)])
    assert most == [3]


def test_the_first_error_in_order_is_raised_when_nothing_is_in_flight_any_more() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    failed = [threading.Event() for _ in range(4)]
    went_on: list[int] = []
    begun = threading.Barrier(4)

    def compute(number: int) -> None:
        with waiting():
            begun.wait(PATIENCE)
        if number == 1:
            with waiting():
                assert failed[2].wait(PATIENCE)
        if number in (0, 3):  # the first one ends after that: its place would be another's otherwise
            with waiting():
                assert failed[1].wait(PATIENCE)
        if number in (1, 2):
            failed[number].set()
            raise ConnectionError(f"no answer for {number}")
        went_on.append(number)

    before = threading.active_count()
    torch.manual_seed(3)
    with pytest.raises(ConnectionError, match="no answer for 1"):
        MicroBatches(4).run([parameter], [lambda i=i: compute(i) for i in range(8)])
    assert threading.active_count() == before
    assert went_on == [0], "later ones are not needed, and not begun"
    after = torch.rand(1)
    torch.manual_seed(3)
    MicroBatches(1).run([parameter], [lambda: None] * 8)
    assert torch.equal(torch.rand(1), after)


def test_an_interrupt_ends_the_waiting_and_leaves_no_thread() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    answered = threading.Event()
    abandoned: list[bool] = []
    begun = threading.Barrier(3)
    went_on: list[int] = []

    def abandon() -> None:
        abandoned.append(True)
        answered.set()

    def compute(number: int) -> None:
        with waiting():
            begun.wait(PATIENCE)
            if number == 0:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            assert answered.wait(PATIENCE)
        went_on.append(number)

    before = threading.active_count()
    state = RandomState()
    with pytest.raises(KeyboardInterrupt):
        MicroBatches(3, abandon).run([parameter], [lambda i=i: compute(i) for i in range(6)])
    state.restore()
    assert abandoned == [True]
    assert threading.active_count() == before
    assert went_on == []


def test_each_micro_batch_draws_its_own_random_numbers_whatever_others_draw() -> None:
    parameter = torch.zeros(1, requires_grad=True)

    def drawn(limit: int, first: int) -> list[Any]:
        def compute(number: int) -> tuple[float, float, float]:
            torch.rand(first if number == 0 else 1)
            with waiting():
                pass
            values = torch.rand(1).item(), np.random.rand(), random.random()
            torch.rand(first if number == 5 else 1)  # what the next step draws does not depend on the last
            return values

        set_seed(5)
        values = MicroBatches(limit).run([parameter], [lambda i=i: compute(i) for i in range(6)])
        return [*values, torch.rand(1).item(), np.random.rand(), random.random()]

    alone = drawn(1, 1)
    assert drawn(4, 1) == alone
    assert drawn(4, 100)[1:] == drawn(1, 100)[1:] == alone[1:]
    assert len(set(alone)) == len(alone)
