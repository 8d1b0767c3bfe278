"""The fused BatchNorm against torch's own modules in double precision."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from knl.models import norm as fused
from knl.models.norm import BatchNorm

SHAPES = [(2, 3, 1, 1), (4, 17, 5, 3), (1, 1, 9, 9), (3, 300, 4, 4), (2, 16, 40, 30)]
# More than 2**20 numbers: written past the caches where channels fill whole lines.
LARGE = (4, 96, 56, 56)
WIDE, ODD = (5, 272, 28, 28), (3, 359, 33, 30)


def channels_last(*shape: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator) * 2.0 + shift
    return values.contiguous(memory_format=torch.channels_last)


def made(channels: int, relu: bool) -> BatchNorm:
    module = BatchNorm(channels, relu)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-1.0, 2.0, channels))
        module.bias.copy_(torch.linspace(0.5, -0.5, channels))
    return module


def in_double(module: BatchNorm, x, residual, dy):
    """Output and gradients by torch's modules, and the statistics they keep."""
    reference = nn.BatchNorm2d(module.num_features, momentum=module.momentum).double()
    reference.load_state_dict(module.state_dict())
    x = x.detach().double().requires_grad_()
    add = None if residual is None else residual.detach().double().requires_grad_()
    y = reference(x)
    y = y if add is None else y + add
    y = torch.relu(y) if module.relu else y
    y.backward(dy.double())
    gradients = [x.grad, reference.weight.grad, reference.bias.grad]
    return y, gradients + ([] if add is None else [add.grad]), reference


def by_kernels(module: BatchNorm, x, residual, dy):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    add = None if residual is None else residual.detach().clone().requires_grad_()
    y = module(x) if add is None else module(x, add)
    assert type(y.grad_fn).__name__ == "_FusedBackward"
    y.backward(dy)
    gradients = [x.grad, module.weight.grad, module.bias.grad]
    return y, gradients + ([] if add is None else [add.grad])


def require_close(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    wanted = wanted.detach()
    difference = (found.detach().double() - wanted).norm()
    assert difference <= 2e-6 * (wanted.norm() + 1.0), what


def require_like_torch(shape, relu: bool, with_residual: bool, shift: float = 0.0) -> None:
    module = made(shape[1], relu)
    x = channels_last(*shape, shift=shift)
    residual = channels_last(*shape, seed=1) if with_residual else None
    dy = channels_last(*shape, seed=2)
    wanted, wanted_gradients, reference = in_double(module, x, residual, dy)
    found, gradients = by_kernels(module, x, residual, dy)
    require_close(found, wanted, "output")
    assert found.is_contiguous(memory_format=torch.channels_last)
    for name, a, b in zip(("x", "weight", "bias", "residual"), gradients, wanted_gradients):
        if name != "x" or shape[0] * shape[2] * shape[3] > 2:  # of two, dx is rounding alone
            require_close(a, b, f"gradient of {name}")
    require_close(module.running_mean, reference.running_mean, "running mean")
    require_close(module.running_var, reference.running_var, "running variance")
    assert module.num_batches_tracked == reference.num_batches_tracked == 1


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, LARGE, WIDE, ODD])
def test_output_gradients_and_statistics_are_torchs(shape, relu, with_residual):
    require_like_torch(shape, relu, with_residual)


def require_rounded_float(shape, relu: bool, with_residual: bool) -> None:
    """In bfloat16 to the bit what float32 gives for the same numbers, rounded to nearest."""
    names = ("output", "x", "weight", "bias", "residual")
    numbers = [channels_last(*shape, seed=n).bfloat16() for n in range(3)]
    results, statistics = [], []
    for dtype in (torch.float32, torch.bfloat16):
        x, residual, dy = (values.to(dtype) for values in numbers)
        module = made(shape[1], relu)
        y, gradients = by_kernels(module, x, residual if with_residual else None, dy)
        results.append([y.detach(), *gradients])
        statistics.append([module.running_mean, module.running_var])
    for name, wanted, found in zip(names, *results):
        kept = name in ("weight", "bias")  # parameters' gradients are not rounded
        assert found.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(found, wanted if kept else wanted.bfloat16()), name
    assert all(map(torch.equal, *statistics))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, LARGE, WIDE, ODD])
def test_bfloat16_is_float32_rounded_once(shape, relu, with_residual):
    require_rounded_float(shape, relu, with_residual)


@settings(deadline=None, max_examples=30)
@given(
    samples=st.integers(2, 5), channels=st.integers(1, 70), height=st.integers(1, 12),
    width=st.integers(1, 12), relu=st.booleans(), residual=st.booleans(),
)  # fmt: skip
def test_every_shape_in_bfloat16_is_float32_rounded(
    samples, channels, height, width, relu, residual
):
    require_rounded_float((samples, channels, height, width), relu, residual)


@pytest.mark.parametrize("shape", [(4, 17, 5, 3), (8, 64, 14, 14)])
def test_bfloat16_is_like_torch_in_double_precision(shape):
    module = made(shape[1], True)
    x, residual, dy = (channels_last(*shape, seed=n).bfloat16() for n in range(3))
    wanted, wanted_gradients, reference = in_double(module, x, residual, dy)
    found, gradients = by_kernels(module, x, residual, dy)
    half_a_step = wanted.abs() * 2**-8 + 1e-6
    assert ((found.double() - wanted).abs() <= half_a_step).all()
    for a, b in zip(gradients, wanted_gradients):
        assert (a.double() - b).norm() <= 2**-8 * b.norm()
    require_close(module.running_mean, reference.running_mean, "running mean")
    require_close(module.running_var, reference.running_var, "running variance")


@settings(deadline=None, max_examples=30)
@given(
    samples=st.integers(2, 5), channels=st.integers(1, 70), height=st.integers(1, 12),
    width=st.integers(1, 12), relu=st.booleans(), residual=st.booleans(),
)  # fmt: skip
def test_every_shape_is_like_torch(samples, channels, height, width, relu, residual):
    require_like_torch((samples, channels, height, width), relu, residual)


def test_channels_far_from_zero_keep_their_variance():
    module = made(8, False)
    x = channels_last(8, 8, 16, 16, shift=1000.0)
    wanted, _, reference = in_double(module, x, None, torch.ones_like(x))
    found = module(x)
    assert (found.double() - wanted).abs().max() < 2e-3  # of x itself: 1000 has 6e-5 of rounding
    assert torch.allclose(module.running_var.double(), reference.running_var, rtol=1e-4)


@pytest.mark.parametrize("shape", [(8, 20, 9, 9), LARGE])
def test_the_number_of_threads_does_not_change_a_bit(shape):
    results = []
    before = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        x, residual, dy = (channels_last(*shape, seed=n) for n in range(3))
        y, gradients = by_kernels(made(shape[1], True), x, residual, dy)
        results.append([y.detach(), *gradients])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("channels", [4, 40])  # fewer than a vector has, and more
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_comes_through(value, dtype, channels):
    x = channels_last(2, channels, 3, 3)
    x[1, 2, 0, 0] = value
    y = made(channels, True)(x.to(dtype).requires_grad_())
    others = [c for c in range(channels) if c != 2]
    assert y[:, 2].isnan().all() and y[:, others].isfinite().all()


def test_a_gradient_in_another_layout_counts_the_same():
    x = channels_last(2, 6, 5, 5)
    results = []
    for order in (torch.channels_last, torch.contiguous_format):
        dy = channels_last(2, 6, 5, 5, seed=3).contiguous(memory_format=order)
        results.append(by_kernels(made(6, True), x, None, dy)[1])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_shapes_that_do_not_fit_are_torchs_to_judge():
    with pytest.raises((RuntimeError, ValueError)):
        made(6, True)(channels_last(2, 12, 5, 5))
    x, residual = channels_last(2, 6, 5, 5), channels_last(1, 6, 1, 1, seed=1)
    reference, module = nn.BatchNorm2d(6), made(6, True)
    reference.load_state_dict(module.state_dict())
    assert torch.allclose(module(x, residual), torch.relu(reference(x) + residual), atol=1e-6)


def test_types_that_differ_are_torchs_to_judge():
    x, residual = channels_last(2, 6, 5, 5).bfloat16(), channels_last(2, 6, 5, 5, seed=1)
    module = made(6, True)
    assert module._fused(x, residual.bfloat16())
    assert not module._fused(x, residual)
    assert not module.bfloat16()._fused(x, residual.bfloat16())


@pytest.mark.parametrize("case", ["layout", "type", "evaluation", "no gradients", "no momentum"])
def test_elsewhere_torchs_own_functions_give_the_same(case, monkeypatch):
    monkeypatch.setattr(fused, "_kernels", lambda: pytest.fail("the kernels ran"))
    module, x, residual = (
        made(6, True),
        channels_last(4, 6, 5, 5),
        channels_last(4, 6, 5, 5, seed=1),
    )
    if case == "layout":
        x = x.contiguous()
    if case == "type":
        module, x, residual = module.double(), x.double(), residual.double()
    if case == "no momentum":
        module.momentum = None
    module.train(case != "evaluation")
    reference = nn.BatchNorm2d(6, momentum=module.momentum).to(x.dtype).train(module.training)
    reference.load_state_dict(copy.deepcopy(module.state_dict()))
    with torch.set_grad_enabled(case != "no gradients"):
        found, wanted = module(x, residual), torch.relu(reference(x) + residual)
    assert torch.allclose(found, wanted, rtol=1e-6)


def test_one_value_a_channel_is_refused_as_by_torch():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        made(3, True)(channels_last(1, 3, 1, 1))


def test_a_gradient_of_the_gradient_is_refused_and_not_made_up():
    x = channels_last(4, 6, 5, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(made(6, True)(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.add(x).pow(2).sum().backward()
