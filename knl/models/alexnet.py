"""AlexNet (Krizhevsky et al. 2012) for 227 pixels a side, its BatchNorm form, and torch's form."""

from __future__ import annotations

from torch import nn

from knl.models.norm import BatchNorm

_POOL = (3, 2)  # overlapping: windows of 3, steps of 2


def alexnet(channels: int, classes: int, dropout: float) -> nn.Sequential:
    """The paper's two-tower network in one: groups of 2 in convolutions 2, 4 and 5, response
    normalisation. 60,965,224 parameters with 3 channels and 1,000 classes."""
    model = nn.Sequential(
        nn.Conv2d(channels, 96, 11, 4), nn.ReLU(True), _response_norm(), nn.MaxPool2d(*_POOL),
        nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(True), _response_norm(),
        nn.MaxPool2d(*_POOL),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(True),
        nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU(True),
        nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(True), nn.MaxPool2d(*_POOL),
        *_classifier(classes, dropout),
    )  # fmt: skip
    return _initialise(model)


def alexnet_bn(channels: int, classes: int, dropout: float) -> nn.Sequential:
    """AlexNet-BN as in Intel Caffe's LARS runs: BatchNorm after pools 1 and 2 and ReLUs 3 and 4
    instead of response normalisation. 60,967,464 parameters with 3 channels, 1,000 classes."""
    model = nn.Sequential(
        nn.Conv2d(channels, 96, 11, 4), nn.ReLU(True), nn.MaxPool2d(*_POOL),
        BatchNorm(96, relu=False),
        nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(True), nn.MaxPool2d(*_POOL),
        BatchNorm(256, relu=False),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(True), BatchNorm(384, relu=False),
        nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU(True), BatchNorm(384, relu=False),
        nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(True), nn.MaxPool2d(*_POOL),
        *_classifier(classes, dropout),
    )  # fmt: skip
    return _initialise(model)


def alexnet_torch(channels: int, classes: int, dropout: float) -> nn.Sequential:
    """The one-tower network that torch users know (Krizhevsky 2014, arXiv 1404.5997), for 224
    pixels a side. 61,100,840 parameters with 3 channels and 1,000 classes."""
    model = nn.Sequential(
        nn.Conv2d(channels, 64, 11, 4, padding=2), nn.ReLU(True), nn.MaxPool2d(*_POOL),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(True), nn.MaxPool2d(*_POOL),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(True),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(True),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(*_POOL),
        *_classifier(classes, dropout),
    )  # fmt: skip
    return _initialise(model)


def _response_norm() -> nn.Module:
    return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)


def _classifier(classes: int, dropout: float) -> list[nn.Module]:
    return [
        nn.Flatten(),
        nn.Linear(256 * 6 * 6, 4096), nn.ReLU(True), nn.Dropout(dropout),
        nn.Linear(4096, 4096), nn.ReLU(True), nn.Dropout(dropout),
        nn.Linear(4096, classes),
    ]  # fmt: skip


def _initialise(model: nn.Sequential) -> nn.Sequential:
    """He et al. 2015: without it the plain network does not start at large rates."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    last = model[-1]
    assert isinstance(last, nn.Linear)
    nn.init.normal_(last.weight, std=0.01)
    return model
