"""Networks in the blocked layout compute what torch's do, and name what they cannot take."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from knl.config import Model
from knl.errors import InputError
from knl.models import blocked as modules
from knl.models import build_model, onednn
from knl.models.blocked import blocked, plain, to_blocked
from knl.train.forward import to_layout

NETWORKS = [
    ("resnet-small", 8, 1), ("resnet-small", 28, 1), ("alexnet", 227, 3), ("alexnet-bn", 227, 3),
    ("alexnet-torch", 224, 3), ("resnet50", 64, 3),
]  # fmt: skip


def network(name: str, channels: int) -> nn.Module:
    torch.manual_seed(1)
    return build_model(Model(name=name, dropout=0.0), channels, 10)


def loss_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    labels = torch.arange(len(images)) % 10
    return nn.functional.cross_entropy(model(images), labels)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


@pytest.mark.parametrize(("name", "pixels", "channels"), NETWORKS)
def test_a_network_is_as_near_to_float64_as_torch_s_own_is(name, pixels, channels):
    model = network(name, channels)
    ours, exact = to_layout(copy.deepcopy(model), "blocked"), copy.deepcopy(model).double()
    images = torch.randn(8, channels, pixels, pixels)
    losses = [loss_of(m, x) for m, x in
              ((model, images), (ours, images), (exact, images.double()))]  # fmt: skip
    for loss in losses:
        loss.backward()
    assert abs(losses[1].item() - losses[2].item()) < 1e-5
    triples = zip(model.parameters(), ours.parameters(), exact.parameters())
    theirs, mine = zip(*((error(p.grad, e.grad), error(q.grad, e.grad)) for p, q, e in triples))
    # Where rounding tips a value over a ReLU's zero, deep networks magnify it: torch's do as well.
    assert max(mine) < max(1e-4, 2 * max(theirs))
    for found, wanted in zip(ours.buffers(), exact.buffers()):
        assert error(found, wanted.double()) < 1e-4


@pytest.mark.parametrize(("name", "pixels", "channels"), NETWORKS)
def test_evaluation_gives_torch_s_scores(name, pixels, channels):
    model = network(name, channels).eval()
    ours = to_layout(copy.deepcopy(model), "blocked")
    images = torch.randn(5, channels, pixels, pixels)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet50", "alexnet", "alexnet-bn", "alexnet-torch"])
def test_parameters_keep_their_names_shapes_and_plain_memory(name):
    model = network(name, 3)
    ours = to_layout(copy.deepcopy(model), "blocked")
    before, after = model.state_dict(), ours.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(parameter.is_contiguous() for parameter in ours.parameters())


@pytest.mark.parametrize("block", [8, 16])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_convolution_is_torch_s(block, data):
    def whole(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups, first = data.draw(st.sampled_from([1, 1, 2])), data.draw(st.sampled_from([0, 0, 1, 3]))
    inputs = first or block * groups * whole(1, 2)
    groups = 1 if first else groups
    size, dilation = data.draw(st.sampled_from([1, 3, 5])), data.draw(st.sampled_from([1, 1, 2]))
    conv = nn.Conv2d(
        inputs, block * groups * whole(1, 2), size, whole(1, 2), whole(0, size // 2), dilation,
        groups, bias=data.draw(st.booleans()),
    )  # fmt: skip
    ours = modules.Convolution(copy.deepcopy(conv))
    ours.relu = data.draw(st.booleans())
    side = dilation * (size - 1) + whole(1, 9)
    images = torch.randn(whole(1, 4), inputs, side, side + 1)
    try:
        check(conv, ours, images, block, relu=ours.relu, first=bool(first))
    except InputError as refusal:  # sizes that no network has, for which there is no fast kernel
        assert "no fast kernel for the network's convolution" in str(refusal)
        assume(False)


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (3, 2, 0), (2, 2, 0)])
@pytest.mark.parametrize("side", [7, 8, 55])
def test_max_pooling_is_torch_s(block, kernel, stride, padding, side):
    pool = nn.MaxPool2d(kernel, stride, padding)
    check(pool, modules.MaxPool(pool), torch.randn(3, 2 * block, side, side + 2), block)


@pytest.mark.parametrize("block", [8, 16])
def test_response_normalisation_is_torch_s(block):
    norm = nn.LocalResponseNorm(5, alpha=1e-1, beta=0.75, k=2.0)
    check(norm, modules.ResponseNorm(norm), torch.randn(2, 3 * block, 7, 5), block)


def test_pooling_and_flattening_leave_the_layout():
    x = torch.randn(3, 32, 4, 5)
    there = blocked(x, 16)
    assert torch.equal(plain(there), x)
    torch.testing.assert_close(modules.GlobalAveragePool()(there), x.mean((2, 3), keepdim=True))
    assert torch.equal(modules.Flatten()(there), x.flatten(1))
    assert torch.equal(modules.Flatten()(x), x.flatten(1))


def check(
    module: nn.Module, ours: nn.Module, x: torch.Tensor, block: int, *, relu=False, first=False
) -> None:
    """Output and all gradients, those of torch in float64."""
    exact = copy.deepcopy(module).double()
    reference = x.double().requires_grad_()
    wanted = exact(reference)
    wanted = wanted.relu() if relu else wanted
    given = (x.clone() if first else blocked(x, block)).requires_grad_(not first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "block", lambda: block)
        found = ours(given)
        torch.testing.assert_close(plain(found).double(), wanted, rtol=1e-4, atol=1e-4)
        gradient = torch.randn_like(wanted)
        # Where the two round to different sides of zero, a ReLU passes different gradients.
        gradient[wanted.abs() < 1e-4] = 0.0
        wanted.backward(gradient)
        found.backward(blocked(gradient.float(), block))
    if not first:
        torch.testing.assert_close(plain(given.grad).double(), reference.grad, rtol=1e-4, atol=1e-3)
    for mine, theirs in zip(ours.parameters(), exact.parameters()):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-3)


REFUSED = [
    (nn.Conv2d(16, 20, 3), "Conv2d '0' has 20 output channels, not a multiple of"),
    (nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), "Conv2d '0' pads with something"),
    (nn.MaxPool2d(3, 2, ceil_mode=True), "MaxPool2d '0' rounds sizes up"),
    (nn.AdaptiveAvgPool2d(7), "AdaptiveAvgPool2d '0' has an output of more than one pixel"),
    (nn.Sequential(nn.PixelShuffle(2)), "PixelShuffle '0' has no kernel"),
]


@pytest.mark.parametrize(("module", "words"), REFUSED)
def test_what_the_layout_cannot_take_is_named(module, words):
    with pytest.raises(InputError) as refusal:
        to_blocked(nn.Sequential(module))
    assert words in str(refusal.value)
    assert "train.layout = 'blocked'" in str(refusal.value)
    assert "use train.layout = 'channels_last'" in str(refusal.value)


def test_a_gradient_of_the_gradient_is_refused():
    conv = modules.Convolution(nn.Conv2d(16, 16, 1))
    x = torch.randn(1, 1, 4, 4, 16).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "block", lambda: 16)
        (gradient,) = torch.autograd.grad(conv(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
            gradient.sum().backward()


def fails(code: str) -> str:
    """The message of a fresh process that uses oneDNN after some code."""
    use = "from knl.errors import InputError\ntry:\n    onednn.block()\n"
    use += "except InputError as error:\n    print(error)\n"
    command = [sys.executable, "-c", f"from knl.models import onednn\n{code}\n{use}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_library_that_is_not_there_or_of_another_release_is_one_line_with_the_cure():
    from_nowhere = "import pathlib; onednn.library_path = lambda: pathlib.Path('/nowhere/libdnnl')"
    missing = fails(from_nowhere)
    assert "no oneDNN (/nowhere/libdnnl" in missing
    new = fails("onednn._version = lambda library: (3, 2, 0)")
    assert "is oneDNN 3.2.0, knl needs 2.5 (2.6 lost the AVX-512 kernels for KNL)" in new
    for message in (missing, new):
        assert "pip install onednn-cpu-gomp==2022.0.2" in message
        assert "\n" not in message
