"""Layers whose weights are elsewhere compute what the quantized layers would, whatever they are given."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.transports import LocalWorker, honest_multiplier, remote_multiplier

from blindtune.checkpoint import Checkpoint
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import cached_kit
from blindtune.client.model.absent_weight import AbsentWeight
from blindtune.client.model.layer_group import LayerGroup
from blindtune.client.model.remote_linear import RemoteGroup, RemoteLinear
from blindtune.client.rounds.multiplier import PrivateMultiplier, ReferenceMultiplier
from blindtune.errors import UnsupportedError
from blindtune.protocol.masks import MaskedOperand
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import MAX_CONTRACTION, Product

ATTENTION = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
IN = 32
# The product's own error is about 2^-16 of the largest output of a row; bf16 keeps 8 bits.
CLOSE, CLOSE_BF16 = 1e-4, 2e-2


class Counting(PrivateMultiplier):
    """Passes products on and remembers which they were."""

    def __init__(self, inner: PrivateMultiplier) -> None:
        self.source = inner.source
        self.products: list[Product] = []
        self._inner = inner

    def _ask(self, masked: MaskedOperand, product: Product, decode: Any) -> Any:
        self.products.append(product)
        return self._inner._ask(masked, product, decode)


@dataclass
class Layers:
    """The remote layers of a group, and what they should compute."""

    remote: list[RemoteLinear]
    weights: list[torch.Tensor]
    multiplier: Counting

    @property
    def requests(self) -> int:
        return len(self.multiplier.products)

    def expected(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """float64, with the dequantized weights."""
        bias = self.remote[member].bias
        return x.detach().double() @ self.weights[member].T + (0 if bias is None else bias.detach().double())


@pytest.fixture(params=["reference", "shares"])
def multiplier(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, kit: Kit, honest: Multiplier
) -> Counting:
    if request.param == "reference":
        return Counting(ReferenceMultiplier(checkpoint, Q31))
    return Counting(remote_multiplier(kit, [[LocalWorker(honest)], [LocalWorker(honest)]]))


def _layers(
    checkpoint: Checkpoint, kit: Kit, multiplier: Counting, dtype: torch.dtype = torch.float32
) -> Layers:
    singles = [LayerGroup([name], kit, multiplier) for name in ATTENTION]
    group = RemoteGroup(LayerGroup(ATTENTION, kit, multiplier), singles)
    remote, weights = [], []
    found = {layer.name: layer for layer in checkpoint.layers}
    with checkpoint.reader() as reader:
        for member, name in enumerate(ATTENTION):
            layer = reader.read(found[name])
            weights.append(layer.integers.double() * torch.from_numpy(layer.scales).double()[:, None])
            module = RemoteLinear(
                IN, layer.out_features, member == 0, group, member, torch.device("cpu"), dtype, f"q{member}"
            )
            if module.bias is not None:
                torch.nn.init.normal_(module.bias)
            remote.append(module)
    return Layers(remote, weights, multiplier)


@pytest.fixture
def layers(checkpoint: Checkpoint, kit: Kit, multiplier: Counting) -> Layers:
    return _layers(checkpoint, kit, multiplier)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error in a row, relative to the row's largest value."""
    actual, expected = actual.detach().double().flatten(0, -2), expected.detach().double().flatten(0, -2)
    scale = expected.abs().amax(dim=1).clamp_min(1e-300)
    return float(((actual - expected).abs().amax(dim=1) / scale).max())


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1,), (4097,), (2, 3), (2, 3, 4)], ids=str)
def test_forward_and_backward_are_those_of_the_quantized_layers(
    layers: Layers, shape: tuple[int, ...]
) -> None:
    x = _random(*shape, IN).requires_grad_()
    outputs = [layer(x) for layer in layers.remote]
    gradients = [_random(*y.shape, seed=i + 1) for i, y in enumerate(outputs)]
    torch.autograd.backward(outputs, gradients)
    for member, y in enumerate(outputs):
        expected = layers.expected(member, x)
        assert y.shape == expected.shape
        assert _error(y.detach(), expected) < CLOSE
    expected = sum(g.double() @ w for g, w in zip(gradients, layers.weights, strict=True))
    assert x.grad is not None and isinstance(expected, torch.Tensor)
    assert _error(x.grad, expected) < CLOSE
    assert layers.requests == 2, "one product for the whole group, in each direction"
    bias = layers.remote[0].bias
    assert bias is not None and bias.grad is not None
    torch.testing.assert_close(bias.grad, gradients[0].flatten(0, -2).sum(0), rtol=1e-4, atol=1e-3)


def test_a_vector_without_rows_of_its_own_works(layers: Layers) -> None:
    x = _random(IN)
    y = layers.remote[1](x)
    assert y.shape == (16,)
    assert _error(y[None], layers.expected(1, x[None])) < CLOSE


def test_very_large_very_small_and_zero_rows_do_not_disturb_each_other(layers: Layers) -> None:
    x = _random(5, IN)
    x[1] *= 1e30
    x[2] *= 1e-38
    x[3] = 0
    x.requires_grad_()
    y = layers.remote[1](x)
    gradient = _random(*y.shape, seed=1) * torch.tensor([1e-38, 1.0, 0.0, 1e30, 1.0])[:, None]
    y.backward(gradient)
    assert x.grad is not None
    assert _error(y.detach()[[0, 1, 4]], layers.expected(1, x)[[0, 1, 4]]) < CLOSE
    # Near float32's smallest numbers the result itself is rounded to few bits.
    assert torch.allclose(y.detach()[2].double(), layers.expected(1, x)[2], rtol=CLOSE, atol=1e-42)
    assert not y.detach()[3].any()
    expected = gradient.double() @ layers.weights[1]
    assert _error(x.grad[[1, 3, 4]], expected[[1, 3, 4]]) < CLOSE
    assert not x.grad[2].any()
    for row in range(5):
        alone = layers.remote[1](x[row : row + 1].detach())
        assert torch.equal(alone[0], y.detach()[row]), "a row must not depend on its neighbours"


def test_a_batch_of_zeros_is_exactly_the_bias(layers: Layers) -> None:
    x = torch.zeros(3, IN, requires_grad=True)
    y = layers.remote[0](x)
    assert torch.equal(y, layers.remote[0].bias.expand(3, -1))
    y.backward(torch.zeros_like(y))
    assert x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_in_both_directions(layers: Layers, value: float) -> None:
    x = _random(4, IN)
    x[2, 5] = value
    with pytest.raises(UnsupportedError, match="row 2 of 4 .*not finite"):
        layers.remote[0](x)
    x = _random(4, IN).requires_grad_()
    y = layers.remote[0](x)
    gradient = torch.ones_like(y)
    gradient[1, 3] = value
    with pytest.raises(UnsupportedError, match="row 1 of 4 .*not finite"):
        y.backward(gradient)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_an_empty_input_gives_an_empty_output_without_a_request(
    layers: Layers, shape: tuple[int, ...]
) -> None:
    y = layers.remote[0](torch.empty(*shape, IN))
    assert y.shape == (*shape, 32)
    assert layers.requests == 0


def test_an_empty_input_lets_gradients_through(layers: Layers) -> None:
    x = torch.empty(0, IN, requires_grad=True)
    layers.remote[1](x).sum().backward()
    assert x.grad is None or x.grad.shape == (0, IN)


def test_a_bf16_layer_answers_in_bf16(checkpoint: Checkpoint, kit: Kit, multiplier: Counting) -> None:
    layers = _layers(checkpoint, kit, multiplier, torch.bfloat16)
    x = _random(6, IN).bfloat16().requires_grad_()
    outputs = [layer(x) for layer in layers.remote]
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    outputs[1].backward(torch.ones_like(outputs[1]))
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert _error(outputs[1].detach(), layers.expected(1, x)) < CLOSE_BF16
    assert _error(x.grad, torch.ones(6, 16).double() @ layers.weights[1]) < CLOSE_BF16


def test_autocast_decides_the_type_of_the_output(layers: Layers) -> None:
    x = _random(6, IN).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [layer(x) for layer in layers.remote]
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    outputs[0].backward(torch.ones_like(outputs[0]))
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert _error(outputs[0].detach(), layers.expected(0, x)) < CLOSE_BF16
    assert layers.remote[0](x).dtype == torch.float32


def test_fp16_is_refused(layers: Layers) -> None:
    with pytest.raises(UnsupportedError, match="fp16 is not supported.*bf16=True"):
        layers.remote[0](_random(2, IN).half())
    with torch.autocast("cpu", torch.float16), pytest.raises(UnsupportedError, match="fp16 is not supported"):
        layers.remote[0](_random(2, IN))
    assert layers.requests == 0


def test_an_input_of_another_width_is_refused(layers: Layers) -> None:
    with pytest.raises(ValueError, match="31 features, the layer 32"):
        layers.remote[0](_random(2, IN - 1))


def test_inputs_that_are_not_contiguous_give_the_same_result(layers: Layers) -> None:
    x = _random(IN, 6)
    assert torch.equal(layers.remote[0](x.t()), layers.remote[0](x.t().contiguous()))
    one = _random(1, IN)
    assert torch.equal(layers.remote[0](one.expand(4, IN)), layers.remote[0](one).expand(4, -1))


def test_a_member_that_gets_another_tensor_computes_its_own(layers: Layers) -> None:
    x, other = _random(3, IN), _random(3, IN, seed=9)
    layers.remote[0](x)
    assert _error(layers.remote[1](other), layers.expected(1, other)) < CLOSE
    assert _error(layers.remote[2](x), layers.expected(2, x)) < CLOSE


def test_members_called_in_another_order_or_twice_are_right(layers: Layers) -> None:
    x = _random(3, IN)
    for member in (2, 1, 0, 0, 2, 2, 1, 0):
        assert _error(layers.remote[member](x), layers.expected(member, x)) < CLOSE


def test_an_equal_tensor_is_not_taken_for_the_same(layers: Layers) -> None:
    """A view of the same memory can be part of another graph."""
    x = _random(3, IN).requires_grad_()
    layers.remote[0](x)
    y = layers.remote[1](x.view(3, IN))
    assert layers.requests == 2
    assert _error(y.detach(), layers.expected(1, x)) < CLOSE


MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_tensor_that_was_changed_in_place_is_asked_for_again(
    layers: Layers, mode: Callable[[], torch.no_grad]
) -> None:
    with mode():
        x = _random(3, IN)
        layers.remote[0](x)
        x.mul_(2).add_(1)
        y = layers.remote[1](x)
        assert _error(y, layers.expected(1, x)) < CLOSE


def test_an_output_computed_without_gradient_is_not_used_with_one(layers: Layers) -> None:
    x = _random(3, IN).requires_grad_()
    with torch.no_grad():
        layers.remote[0](x)
    y = layers.remote[1](x)
    assert y.requires_grad
    with torch.no_grad():
        assert not layers.remote[2](x).requires_grad


def test_an_input_that_comes_to_need_a_gradient_gets_one(layers: Layers) -> None:
    x = _random(3, IN)
    layers.remote[0](x)
    x.requires_grad_()
    y = layers.remote[1](x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert _error(x.grad, torch.ones(3, 16).double() @ layers.weights[1]) < CLOSE


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_results_are_the_same_with_and_without_gradients(
    layers: Layers, mode: Callable[[], torch.no_grad]
) -> None:
    x = _random(3, IN)
    expected = [layer(x.clone().requires_grad_()).detach() for layer in layers.remote]
    with mode():
        y = x.clone()
        assert all(
            torch.allclose(layer(y), e, rtol=1e-3, atol=1e-4)
            for layer, e in zip(layers.remote, expected, strict=True)
        )
        assert torch.equal(layers.remote[0](y), expected[0])


def test_a_single_call_gives_what_the_group_gives(layers: Layers) -> None:
    x = _random(50, IN)
    group = [layer(x) for layer in layers.remote]
    for member in (1, 2):
        single = layers.remote[member](x.clone())
        assert _error(single, group[member]) < CLOSE
    assert layers.requests == 3


@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2], [1, 2]], ids=str)
def test_outputs_that_carry_no_gradient_count_as_zeros(layers: Layers, used: list[int]) -> None:
    x = _random(4, IN).requires_grad_()
    outputs = [layer(x) for layer in layers.remote]
    torch.stack([outputs[member].square().sum() for member in used]).sum().backward()
    expected = sum(2 * layers.expected(member, x) @ layers.weights[member] for member in used)
    assert x.grad is not None and isinstance(expected, torch.Tensor)
    assert _error(x.grad, expected) < CLOSE


def test_no_backward_product_is_asked_for_where_the_input_needs_no_gradient(layers: Layers) -> None:
    y = layers.remote[0](_random(4, IN))
    y.sum().backward()
    assert layers.requests == 1
    bias = layers.remote[0].bias
    assert bias is not None and bias.grad is not None


def test_a_second_derivative_is_refused_and_not_wrong(layers: Layers) -> None:
    x = _random(2, IN).requires_grad_()
    (gradient,) = torch.autograd.grad(layers.remote[1](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_threads_that_share_a_model_get_their_own_outputs(layers: Layers) -> None:
    inputs = [_random(3, IN, seed=seed) for seed in range(16)]

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in layers.remote]

    with ThreadPoolExecutor(4) as pool:
        for x, outputs in zip(inputs, pool.map(run, inputs), strict=True):
            for member, y in enumerate(outputs):
                assert _error(y.detach(), layers.expected(member, x)) < CLOSE


def test_the_weight_is_absent_and_yet_tells_its_shape_device_and_type(layers: Layers) -> None:
    layer = layers.remote[0]
    assert isinstance(layer, torch.nn.Linear)
    assert layer.weight.shape == (32, IN) and layer.weight.numel() == 32 * IN
    assert (layer.weight.device, layer.weight.dtype) == (torch.device("cpu"), torch.float32)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert [*layer.state_dict()] == ["bias"] and not [*layer.buffers()]
    moved = layer.to(torch.bfloat16).weight
    assert isinstance(moved, AbsentWeight)
    assert (moved.dtype, moved.shape) == (torch.bfloat16, (32, IN))
    assert layer.to("meta").weight.device.type == "meta"


def test_a_weight_that_is_put_in_place_of_the_absent_one_is_refused(layers: Layers) -> None:
    for weight in (torch.zeros(32, IN), torch.nn.Parameter(torch.zeros(32, IN))):
        with pytest.raises(UnsupportedError, match="q0.weight cannot be replaced"):
            layers.remote[0].weight = weight
    torch.utils.swap_tensors(layers.remote[0].weight, torch.nn.Parameter(torch.zeros(32, IN)))
    with pytest.raises(UnsupportedError, match="q0.weight cannot be replaced"):
        layers.remote[0](_random(2, 3, IN))


def test_a_gradient_lies_in_memory_as_the_input_does(layers: Layers) -> None:
    """Where it does not, batch norm in eval mode sums the wrong numbers up (torch 2.13)."""
    for made in (_random(2, IN, 5, 4), _random(2, 5, 4, IN).permute(0, 3, 1, 2)):
        image = made.requires_grad_()
        norm = torch.nn.BatchNorm2d(IN).eval()
        x = norm(image).flatten(2).transpose(1, 2)
        strides = []
        x.register_hook(lambda gradient: strides.append(gradient.stride()))  # noqa: B023
        layers.remote[0](x).sum().backward()
        assert strides == [x.stride()]
        expected = layers.weights[0].sum(0) * 2 * 5 * 4
        assert norm.bias.grad is not None and _error(norm.bias.grad[None], expected[None]) < CLOSE


def test_outputs_can_be_changed_in_place_and_gradients_stay_right(layers: Layers) -> None:
    x = _random(2, 3, IN).requires_grad_()
    a, b = (layers.remote[member](x) for member in (1, 2))
    expected = [layers.expected(member, x) for member in (1, 2)]
    a += 1
    b.mul_(2)
    assert _error(a, expected[0] + 1) < CLOSE and _error(b, 2 * expected[1]) < CLOSE
    torch.autograd.backward([a, b], [torch.ones_like(a), torch.ones_like(b)])
    gradient = (layers.weights[1].sum(0) + 2 * layers.weights[2].sum(0)).expand(2, 3, IN)
    assert x.grad is not None and _error(x.grad, gradient) < CLOSE


def test_outputs_of_a_group_are_not_copied(layers: Layers) -> None:
    x = _random(5, IN)
    outputs = [layer(x) for layer in layers.remote][1:]  # the first has a bias, and so another tensor
    assert {y.stride(0) for y in outputs} == {64}, "they are columns of one array"


def test_a_copied_layer_asks_the_same_workers_and_has_its_own_bias(layers: Layers) -> None:
    copies = copy.deepcopy(torch.nn.ModuleList(layers.remote))
    x = _random(3, IN)
    before = [layer(x) for layer in layers.remote]
    assert layers.requests == 1
    after = [layer(x) for layer in copies]
    assert layers.requests == 2
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert copies[0].bias is not layers.remote[0].bias


def test_a_copy_does_not_take_outputs_that_wait_for_the_original(layers: Layers) -> None:
    x = _random(3, IN)
    layers.remote[0](x)
    copies = copy.deepcopy(torch.nn.ModuleList(layers.remote))
    assert _error(copies[1](x), layers.expected(1, x)) < CLOSE
    assert layers.requests == 2


def test_pickling_is_refused_since_a_copy_could_use_a_mask_twice(layers: Layers, tmp_path: Path) -> None:
    for what in (layers.remote[0], layers.remote[0]._group, layers.multiplier, layers.multiplier.source):
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(what)
    with pytest.raises(TypeError, match="save its adapter"):
        torch.save(layers.remote[0], tmp_path / "layer.pt")


def test_data_parallel_is_refused(layers: Layers) -> None:
    with pytest.raises(UnsupportedError, match="DataParallel.*CUDA_VISIBLE_DEVICES"):
        layers.remote[0]._replicate_for_data_parallel()


def test_a_head_wider_than_one_product_is_cut_and_added_up(tmp_path: Path) -> None:
    """Its backward pass contracts over the vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = MAX_CONTRACTION + 500
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    kit = cached_kit(checkpoint)
    worker = LocalWorker(honest_multiplier(checkpoint))
    multiplier = Counting(remote_multiplier(kit, [[worker], [worker]]))
    group = LayerGroup(["lm_head.weight"], kit, multiplier)
    with checkpoint.reader() as reader:
        layer = reader.read(next(layer for layer in checkpoint.layers if layer.head))
    weight = layer.integers.double() * torch.from_numpy(layer.scales).double()[:, None]
    g = _random(3, vocabulary)
    # Rounding to the integers that fit costs about sqrt(contraction) of precision.
    assert _error(torch.from_numpy(group.backward([g.numpy()])), g.double() @ weight) < 20 * CLOSE
    assert len(multiplier.products) == 2
    x = _random(3, 8)
    (y,) = group.forward(x.numpy())
    assert _error(torch.from_numpy(np.ascontiguousarray(y)), x.double() @ weight.T) < CLOSE
