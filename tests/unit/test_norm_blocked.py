"""The fused BatchNorm of the blocked layout against torch's own modules in double precision."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from knl.models.blocked import blocked, plain
from knl.models.norm import BatchNorm

BLOCKS = (8, 16)
# More than 2**20 numbers are written past the caches; 129 pixels are more than a chunk.
LARGE, CHUNKS = (5, 96, 56, 56), (2, 32, 3, 43)


def norm_of(channels: int, relu: bool) -> BatchNorm:
    module = BatchNorm(channels, relu)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-1.0, 2.0, channels))
        module.bias.copy_(torch.linspace(0.5, -0.5, channels))
    return module


def values(*shape: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2.0 + shift


def require_like_torch(
    shape: tuple[int, ...], block: int, relu: bool, adds: bool, forks: bool, shift: float = 0.0
) -> None:
    module = norm_of(shape[1], relu)
    exact = nn.BatchNorm2d(shape[1]).double()
    exact.load_state_dict(module.state_dict())
    x, residual, *gradients = (values(*shape, seed=n, shift=shift * (n == 0)) for n in range(4))
    given, added = (blocked(t, block).requires_grad_() for t in (x, residual))
    wanted_x, wanted_added = x.double().requires_grad_(), residual.double().requires_grad_()
    wanted = exact(wanted_x) + (wanted_added if adds else 0.0)
    wanted = wanted.relu() if relu else wanted
    if forks:
        found, again = module.fork(given, added) if adds else module.fork(given, None)
        assert torch.equal(found, again)
        torch.autograd.backward((found, again), [blocked(g, block) for g in gradients])
        wanted.backward((gradients[0] + gradients[1]).double())
    else:
        found = module(given, added if adds else None)
        found.backward(blocked(gradients[0], block))
        wanted.backward(gradients[0].double())
    pairs = [(plain(found), wanted), (plain(given.grad), wanted_x.grad)]
    pairs += [(plain(added.grad), wanted_added.grad)] if adds else []
    pairs += [(p.grad, e.grad) for p, e in zip(module.parameters(), exact.parameters())]
    pairs += [(b, e) for b, e in zip(module.buffers(), exact.buffers()) if e.is_floating_point()]
    for mine, theirs in pairs:
        difference = (mine.detach().double() - theirs.detach()).norm()
        assert difference <= (2e-6 + abs(shift) * 2e-7) * (theirs.detach().norm() + 1.0)
    assert int(module.num_batches_tracked) == 1


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("forks", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_output_gradients_and_statistics_are_torch_s(block, relu, adds, forks):
    for shape in ((2, 16, 5, 3), (4, 32, 1, 1), CHUNKS):
        require_like_torch(shape, block, relu, adds, forks)


@pytest.mark.parametrize("adds", [False, True])
def test_large_activations_are_as_exact(adds):
    require_like_torch(LARGE, 16, True, adds, adds)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 4), st.integers(1, 3), st.integers(2, 14), st.integers(3, 14),
    st.sampled_from(BLOCKS), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_shape_is_torch_s(samples, blocks, height, width, block, relu, adds):
    require_like_torch((samples, blocks * block, height, width), block, relu, adds, False)


def test_the_variance_of_channels_far_from_zero_is_not_lost():
    require_like_torch((8, 16, 16, 16), 16, False, False, False, shift=1000.0)


@pytest.mark.parametrize("block", BLOCKS)
def test_evaluation_takes_the_running_statistics(block):
    module = norm_of(32, relu=True).eval()
    with torch.no_grad():
        module.running_mean.copy_(values(32, seed=5))
        module.running_var.copy_(values(32, seed=6).abs() + 0.1)
    x, residual = values(3, 32, 5, 4, seed=0), values(3, 32, 5, 4, seed=1)
    with torch.no_grad():
        found = module(blocked(x, block), blocked(residual, block))
        torch.testing.assert_close(plain(found), module(x, residual))
    assert int(module.num_batches_tracked) == 0


def test_no_bit_depends_on_the_number_of_threads():
    found = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        module = norm_of(64, relu=True)
        x, residual, dy = (blocked(values(6, 64, 28, 28, seed=n), 16) for n in range(3))
        x.requires_grad_()
        y = module(x, residual)
        y.backward(dy)
        found.append([y.detach(), x.grad, module.weight.grad, module.running_var.clone()])
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others))


def test_a_value_that_is_no_number_stays_one():
    x = values(2, 16, 4, 4, seed=0)
    x[0, 3, 0, 0] = float("nan")
    y = plain(norm_of(16, relu=True)(blocked(x, 16).requires_grad_()))
    assert torch.isnan(y[:, 3]).all()
    assert torch.isfinite(y[:, :3]).all()


def test_one_of_two_gradients_may_be_missing():
    x, residual = (blocked(values(2, 16, 4, 4, seed=n), 16).requires_grad_() for n in range(2))
    module, other = norm_of(16, relu=True), norm_of(16, relu=True)
    first, _ = module.fork(x, residual)
    first.sum().backward()
    gradient = copy.deepcopy(x.grad)
    x.grad = None
    other(x, residual).sum().backward()
    torch.testing.assert_close(x.grad, gradient)


def test_one_value_a_channel_is_refused_as_torch_refuses_it():
    for x in (values(1, 16, 1, 1, seed=0), blocked(values(1, 16, 1, 1, seed=0), 16)):
        with pytest.raises(ValueError, match="value"):
            norm_of(16, relu=True)(x)
