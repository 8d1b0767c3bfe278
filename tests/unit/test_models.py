"""The networks: their sizes as published, their structure, and how they start."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional

from knl.config import Model
from knl.models import build_model

PUBLISHED = {  # parameters, multiply-adds for one picture, pixels a side
    "resnet50": (25_557_032, 4.09e9, 224),
    "alexnet": (60_965_224, 0.724e9, 227),
    "alexnet-bn": (60_967_464, 0.724e9, 227),
    "alexnet-torch": (61_100_840, 0.714e9, 224),
}


def build(name, channels=3, classes=1000, **keys):
    torch.manual_seed(0)
    return build_model(Model(name=name, **keys), channels, classes).eval()


@pytest.fixture(scope="module", params=list(PUBLISHED))
def named(request):
    yield request.param, build(request.param)
    gc.collect()


@pytest.fixture(scope="module")
def resnet50():
    return build("resnet50", classes=10)


def of(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


@torch.no_grad()
def run(model, channels, pixels):
    return model(torch.rand(2, channels, pixels, pixels))


def multiplications(model, pixels):
    """Counted from the shapes that pass through convolutions and matrix products."""
    counts = []

    def count(module, _, output):
        counts.append(output[0].numel() * module.weight[0].numel())

    hooks = [m.register_forward_hook(count) for m in of(model, (nn.Conv2d, nn.Linear))]
    run(model, 3, pixels)
    for hook in hooks:
        hook.remove()
    return sum(counts)


def test_it_has_the_published_size_work_and_output(named):
    name, model = named
    parameters, work, pixels = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert multiplications(model, pixels) == pytest.approx(work, rel=0.005)
    scores = run(model, 3, pixels)
    assert scores.shape == (2, 1000) and torch.isfinite(scores).all()


def test_it_starts_as_the_seed_says(named):
    name, model = named
    torch.manual_seed(0)
    again = build_model(Model(name=name), 3, 1000)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_resnet50_has_the_papers_layers_with_strides_on_the_3x3(resnet50):
    convolutions = of(resnet50, nn.Conv2d)
    assert len(convolutions) == 53 == len(of(resnet50, nn.BatchNorm2d))
    assert all(c.bias is None for c in convolutions)
    halving = [c for c in convolutions if c.stride == (2, 2)]
    strided = [(c.kernel_size, c.in_channels, c.out_channels) for c in halving]
    bottlenecks = [((3, 3), w, w) for w in (128, 256, 512)]
    projections = [((1, 1), 2 * w, 4 * w) for w in (128, 256, 512)]
    assert sorted(strided) == sorted([((7, 7), 3, 64), *bottlenecks, *projections])
    widths = [c.out_channels for c in convolutions if c.kernel_size == (3, 3)]
    assert widths == [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(("name", "blocks"), [("resnet50", 16), ("resnet-small", 3)])
def test_zero_init_gamma_starts_the_last_norm_of_each_block_at_zero(name, blocks, zero):
    model = build(name, classes=10, zero_init_gamma=zero)
    zeros = [n for n in of(model, nn.BatchNorm2d) if not n.weight.any()]
    others = [n for n in of(model, nn.BatchNorm2d) if n.weight.any()]
    assert len(zeros) == (blocks if zero else 0)
    assert all((n.weight == 1).all() for n in others)
    assert all((n.bias == 0).all() for n in zeros + others)
    found = [block for block in model if hasattr(block, "body")]
    assert len(found) == blocks
    assert not zero or zeros == [block.norm for block in found]


@pytest.mark.parametrize("zero", [True, False])
def test_a_block_with_zero_gamma_passes_its_input_through(zero):
    block = [b for b in build("resnet50", classes=10, zero_init_gamma=zero) if hasattr(b, "body")][
        1
    ]
    x = torch.rand(2, 256, 7, 7)
    with torch.no_grad():
        assert torch.equal(block(x.clone()), x) == zero


@torch.no_grad()
def test_a_block_is_relu_of_norm_of_body_plus_projection(resnet50):
    for block, channels in zip((b for b in resnet50 if hasattr(b, "body")), (64, 256)):
        norm, x = copy.deepcopy(block.norm), torch.randn(2, channels, 7, 7)
        found = block(x.clone())
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        body = functional.batch_norm(block.body(x), *statistics, training=norm.training)
        assert torch.allclose(found, (body + block.project(x)).relu(), atol=1e-6)


def test_alexnet_has_two_towers_and_alexnet_bn_four_norms():
    layers = [(96, 1), (256, 2), (384, 1), (384, 2), (256, 2)]
    plain, normed = (build(name, classes=10, dropout=0.25) for name in ("alexnet", "alexnet-bn"))
    for model in (plain, normed):
        assert [(c.out_channels, c.groups) for c in of(model, nn.Conv2d)] == layers
        assert [d.p for d in of(model, nn.Dropout)] == [0.25, 0.25]
        assert not any(m.bias.any() for m in of(model, (nn.Conv2d, nn.Linear)))
        assert model[-1].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert len(of(plain, nn.LocalResponseNorm)) == 2 and not of(plain, nn.BatchNorm2d)
    kinds = [type(module).__name__ for module in normed]
    before = [kinds[i - 1] for i, kind in enumerate(kinds) if kind == "BatchNorm"]
    assert before == ["MaxPool2d", "MaxPool2d", "ReLU", "ReLU"]
    assert [n.num_features for n in of(normed, nn.BatchNorm2d)] == [96, 256, 384, 384]


@pytest.mark.parametrize("pixels", [32, 96, 224])
def test_resnet50_takes_pictures_of_many_sizes(resnet50, pixels):
    assert run(resnet50, 3, pixels).shape == (2, 10)


@pytest.mark.parametrize("pixels", [8, 28, 33, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_small_network_takes_small_pictures(channels, pixels):
    model = build("resnet-small", channels, classes=7)
    assert len(of(model, nn.Conv2d)) - 2 + 1 == 8  # two projections do not count as layers
    assert run(model, channels, pixels).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet50", "resnet-small"])
def test_weights_start_with_the_spread_of_he_et_al(name):
    for c in of(build(name, classes=10), nn.Conv2d):
        fan_out = c.out_channels * c.kernel_size[0] * c.kernel_size[1]
        tolerance = 5 / (2 * c.weight.numel()) ** 0.5  # five standard errors
        assert c.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=tolerance)


def test_every_parameter_gets_a_gradient():
    for name, pixels in (("resnet-small", 8), ("resnet50", 32), ("alexnet-bn", 227)):
        model = build(name, classes=4).train()
        torch.manual_seed(1)
        model(torch.rand(2, 3, pixels, pixels)).logsumexp(1).sum().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), (name, key)
