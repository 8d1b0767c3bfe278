"""The gradients and the floating-point operations of each layer, from shapes alone: without torch,
so that a prediction takes no longer than a look-up. A test holds them against knl.models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from knl.config import Recipe

# What a step costs in forwards: the forward, the gradient of the inputs, that of the weights.
TRAINING_OVER_FORWARD = 3
_FLOAT = 4


class _Stage(NamedTuple):
    """Blocks alike: (kernel size, width) of their convolutions, and how many."""

    body: tuple[tuple[int, int], ...]
    blocks: int


@dataclass(frozen=True)
class Layer:
    """A convolution or a fully connected layer, or a normalisation (flops not counted: under 1 %).
    `tensors`: bytes of the gradient of each parameter, in the order of definition; `flops`: of one
    image forward, two a multiplication with its addition."""

    name: str
    tensors: tuple[int, ...]
    flops: float


def layers_of(recipe: Recipe, pixels: int, classes: int, channels: int = 3) -> list[Layer]:
    """Of the recipe's network in the order of forward. `pixels`: a side of its pictures."""
    name = recipe.model.name
    if name.startswith("resnet"):
        return list(_resnet(name == "resnet50", pixels, classes, channels))
    return list(_alexnet(name, classes, channels))


def parameters(layers: list[Layer]) -> int:
    """How many weights."""
    return sum(sum(layer.tensors) for layer in layers) // _FLOAT


def forward_flops(layers: list[Layer]) -> float:
    """Of one image."""
    return sum(layer.flops for layer in layers)


def _conv(
    name: str, inputs: int, outputs: int, size: int, side: int, groups: int = 1, bias: bool = False
) -> Layer:
    """`side`: pixels a side of the output."""
    weights = size * size * inputs // groups * outputs
    tensors = (weights * _FLOAT, outputs * _FLOAT) if bias else (weights * _FLOAT,)
    return Layer(name, tensors, 2.0 * weights * side * side)


def _norm(name: str, channels: int) -> Layer:
    return Layer(name, (channels * _FLOAT, channels * _FLOAT), 0.0)


def _linear(name: str, inputs: int, outputs: int) -> Layer:
    weights = inputs * outputs
    return Layer(name, (weights * _FLOAT, outputs * _FLOAT), 2.0 * weights)


def _resnet(large: bool, pixels: int, classes: int, channels: int) -> Iterator[Layer]:
    if large:
        side = (pixels + 1) // 2
        width = 64
        yield _conv("conv1", channels, width, 7, side)
        side = (side + 1) // 2
        stages = [_Stage(((1, w), (3, w), (1, 4 * w)), n) for w, n in _STAGES]
    else:
        side, width = pixels, 16
        yield _conv("conv1", channels, width, 3, side)
        stages = [_Stage(((3, w), (3, w)), 1) for w in (16, 32, 64)]
    yield _norm("norm1", width)
    for stage, (body, blocks) in enumerate(stages):
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 0 else 1
            yield from _block(f"block{stage + 1}.{block + 1}", width, body, side, stride)
            side, width = -(-side // stride), body[-1][1]
    yield _linear("fc", width, classes)


_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))


def _block(
    name: str, inputs: int, body: tuple[tuple[int, int], ...], side: int, stride: int
) -> Iterator[Layer]:
    """As knl.models.resnet.Block defines them: the body, its last normalisation, the projection."""
    width, left = inputs, stride
    for number, (size, outputs) in enumerate(body):
        if size == 3:
            side, left = -(-side // left), 1
        yield _conv(f"{name}.conv{number + 1}", width, outputs, size, side)
        yield _norm(f"{name}.norm{number + 1}", outputs)
        width = outputs
    if stride != 1 or inputs != width:
        yield _conv(f"{name}.project", inputs, width, 1, side)
        yield _norm(f"{name}.project.norm", width)


def _alexnet(name: str, classes: int, channels: int) -> Iterator[Layer]:
    if name == "alexnet-torch":
        shapes = [
            (64, 11, 55, 1),
            (192, 5, 27, 1),
            (384, 3, 13, 1),
            (256, 3, 13, 1),
            (256, 3, 13, 1),
        ]
    else:
        shapes = [
            (96, 11, 55, 1),
            (256, 5, 27, 2),
            (384, 3, 13, 1),
            (384, 3, 13, 2),
            (256, 3, 13, 2),
        ]
    width = channels
    for number, (outputs, size, side, groups) in enumerate(shapes, 1):
        yield _conv(f"conv{number}", width, outputs, size, side, groups, bias=True)
        width = outputs
        if name == "alexnet-bn" and number < len(shapes):
            yield _norm(f"norm{number}", outputs)
    for number, (inputs, outputs) in enumerate(
        ((width * 36, 4096), (4096, 4096), (4096, classes)), 6
    ):
        yield _linear(f"fc{number}", inputs, outputs)
