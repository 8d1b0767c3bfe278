"""Residual networks (He et al. 2015, arXiv 1512.03385), made for 32 to 512 pixels a side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from knl.models.norm import BatchNorm

_Pair = tuple[torch.Tensor, torch.Tensor]


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    """Convolutions with BatchNorm and ReLU, added to the input, or to a projection of it where the
    shape changes. `body`: (kernel size, width) of each convolution; the first 3x3 has the stride,
    which for a bottleneck is the variant v1.5. Where `fork` is set, the output is a pair of the
    same tensor, for the two branches of the next block (BatchNorm.fork)."""

    def __init__(self, inputs: int, body: Sequence[tuple[int, int]], stride: int) -> None:
        super().__init__()
        self.fork = False
        layers: list[nn.Module] = []
        width, left = inputs, stride
        for size, outputs in body:
            step, left = (left, 1) if size == 3 else (1, left)
            layers += [_conv(width, outputs, size, step), BatchNorm(outputs, relu=True)]
            width = outputs
        self.body = nn.Sequential(*layers[:-1])
        self.norm = BatchNorm(width, relu=True)
        self.project: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.project = nn.Sequential(
                _conv(inputs, width, 1, stride), BatchNorm(width, relu=False)
            )

    def forward(self, x: torch.Tensor | _Pair) -> torch.Tensor | _Pair:
        branch, skipped = x if isinstance(x, tuple) else (x, x)
        inputs = self.body(branch), self.project(skipped)
        return self.norm.fork(*inputs) if self.fork else self.norm(*inputs)


def resnet50(channels: int, classes: int, zero_init_gamma: bool) -> nn.Sequential:
    """ResNet-50 v1.5: 25,557,032 parameters with 3 channels and 1,000 classes."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False),
        BatchNorm(64, relu=True),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(blocks):
            body = ((1, width), (3, width), (1, 4 * width))
            layers.append(Block(inputs, body, stride if number == 0 else 1))
            inputs = 4 * width
    return _finish(layers, inputs, classes, zero_init_gamma)


def resnet_small(channels: int, classes: int, zero_init_gamma: bool) -> nn.Sequential:
    """A residual network of eight layers for small pictures: 8 to 64 pixels a side."""
    layers: list[nn.Module] = [_conv(channels, 16, 3), BatchNorm(16, relu=True)]
    inputs = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        layers.append(Block(inputs, ((3, width), (3, width)), stride))
        inputs = width
    return _finish(layers, inputs, classes, zero_init_gamma)


def _finish(
    layers: list[nn.Module], width: int, classes: int, zero_init_gamma: bool
) -> nn.Sequential:
    """Pool, classify, and initialise as He et al. 2015 (1502.01852) and Goyal et al. 2017 (5.1)."""
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    if zero_init_gamma:
        for module in model.modules():
            if isinstance(module, Block):
                nn.init.zeros_(module.norm.weight)
    return model
