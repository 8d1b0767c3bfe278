"""Networks in oneDNN's blocked layout, from the first convolution to the last pooling.

`to_blocked` replaces the modules of a network by ones that take and give activations of
[samples, channels / block, height, width, block]. Parameters and their names stay: plain tensors,
so that checkpoints, LARS and gradient sync are the same in every layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Union

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from knl.errors import InputError
from knl.models import onednn
from knl.models.norm import BatchNorm
from knl.models.onednn import BACKWARD_DATA, BACKWARD_WEIGHTS, FORWARD, INFERENCE, Shape
from knl.models.resnet import Block

_Pair = Union[int, "tuple[int, int]"]


def to_blocked(model: nn.Module) -> nn.Module:
    """The network with its modules replaced, in place.

    Raises InputError naming the first module that cannot take the layout.
    """
    for name, module in model.named_children():
        _adopt(model, name, module)
    if isinstance(model, nn.Sequential):
        _fuse(model)
    return model


def plain(x: torch.Tensor) -> torch.Tensor:
    """Activations as [samples, channels, height, width]; those that are so already unmodified."""
    if x.dim() == 4:
        return x
    samples, blocks, height, width, block = x.shape
    return x.permute(0, 1, 4, 2, 3).reshape(samples, blocks * block, height, width)


def blocked(x: torch.Tensor, block: int) -> torch.Tensor:
    """[samples, channels, height, width] as [samples, channels / block, height, width, block]."""
    samples, channels, height, width = x.shape
    split = x.reshape(samples, channels // block, block, height, width)
    return split.permute(0, 1, 3, 4, 2).contiguous()


class Convolution(nn.Module):
    """nn.Conv2d on blocked activations; a plain input, as of images, is taken too. `relu`: whether
    one follows, which the convolution then computes."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.kernel_size, self.stride = _pair(conv.kernel_size), _pair(conv.stride)
        self.padding, self.dilation = _pair(conv.padding), _pair(conv.dilation)  # type: ignore[arg-type]
        self.groups, self.relu = conv.groups, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: float32, [samples, channels, height, width] or blocked."""
        what = FORWARD if torch.is_grad_enabled() else INFERENCE
        return _Convolution.apply(  # type: ignore[no-any-return]
            x.contiguous(), self.weight, self.bias, self.shape_for(x), what
        )

    def shape_for(self, x: torch.Tensor) -> Shape:
        """What oneDNN has to compute for an input such as `x`."""
        (kh, kw), (sh, sw), (ph, pw) = self.kernel_size, self.stride, self.padding
        samples, channels, height, width, block = _sizes(x)
        return Shape(
            samples, channels, height, width, self.weight.shape[0],
            _outputs(height, kh, sh, ph, self.dilation[0]),
            _outputs(width, kw, sw, pw, self.dilation[1]),
            kh, kw, sh, sw, ph, pw, *self.dilation, self.groups, block, onednn.block(),
            int(self.bias is not None), int(self.relu),
        )  # fmt: skip


class MaxPool(nn.Module):
    """nn.MaxPool2d on blocked activations."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.kernel_size, self.stride = _pair(pool.kernel_size), _pair(pool.stride)
        self.padding = _pair(pool.padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: float32, blocked."""
        (kh, kw), (sh, sw), (ph, pw) = self.kernel_size, self.stride, self.padding
        samples, channels, height, width, block = _sizes(x)
        shape = Shape(
            samples, channels, height, width, channels,
            _outputs(height, kh, sh, ph), _outputs(width, kw, sw, pw),
            kh, kw, sh, sw, ph, pw, in_block=block, out_block=block,
        )  # fmt: skip
        return _Kept.apply(x, shape, onednn.max_pooling, False, ())  # type: ignore[no-any-return]


class ResponseNorm(nn.Module):
    """nn.LocalResponseNorm on blocked activations."""

    def __init__(self, norm: nn.LocalResponseNorm) -> None:
        super().__init__()
        self.settings = (norm.size, float(norm.alpha), float(norm.beta), float(norm.k))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: float32, blocked."""
        samples, channels, height, width, block = _sizes(x)
        shape = Shape(
            samples, channels, height, width, channels, height, width,
            in_block=block, out_block=block,
        )  # fmt: skip
        return _Kept.apply(x, shape, onednn.response_norm, True, self.settings)  # type: ignore[no-any-return]


class GlobalAveragePool(nn.Module):
    """nn.AdaptiveAvgPool2d(1) on blocked activations; the output is plain."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)).reshape(x.shape[0], -1, 1, 1)


class Flatten(nn.Module):
    """nn.Flatten on blocked or plain activations: [samples, features], in plain order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (plain(x) if x.dim() == 5 else x).flatten(1)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shape: Shape,
        what: int,
    ) -> torch.Tensor:
        y = _activations(x, shape.samples, shape.out_channels, shape.out_height, shape.out_width)
        weight = weight.contiguous()
        onednn.convolution(shape, what).run(x, weight, bias, y)
        ctx.save_for_backward(x, weight, y if shape.relu else None)
        ctx.shape = shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, y = ctx.saved_tensors
        shape: Shape = ctx.shape
        dy = dy.contiguous()
        if y is not None:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        backward = shape._replace(relu=0)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            onednn.convolution(backward, BACKWARD_DATA).run(dy, weight, dx)
        if ctx.needs_input_grad[1]:
            dweight = torch.empty_like(weight)
            dbias = weight.new_empty(shape.out_channels) if shape.bias else None
            onednn.convolution(backward, BACKWARD_WEIGHTS).run(x, dy, dweight, dbias)
        return dx, dweight, dbias, None, None


class _Kept(torch.autograd.Function):
    """An operation that keeps a workspace between forward and backward; `reads`: whether backward
    reads the source as well."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        shape: Shape,
        make: Callable[..., onednn.Operation],
        reads: bool,
        settings: tuple[float, ...],
    ) -> torch.Tensor:
        x = x.contiguous()
        y = _activations(x, shape.samples, shape.out_channels, shape.out_height, shape.out_width)
        if not ctx.needs_input_grad[0]:
            make(shape, INFERENCE, *settings).run(x, y)
            return y
        operation = make(shape, FORWARD, *settings)
        kept = torch.empty(operation.bytes_of(2), dtype=torch.uint8)
        operation.run(x, y, kept)
        ctx.save_for_backward(kept, x if reads else None)
        ctx.backward_operation, ctx.source = make(shape, BACKWARD_DATA, *settings), x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        kept, x = ctx.saved_tensors
        dx = dy.new_empty(ctx.source)
        ctx.backward_operation.run(x, dy.contiguous(), kept, dx)
        return dx, None, None, None, None


def _adopt(parent: nn.Module, name: str, module: nn.Module) -> None:
    reason = _refused(module)
    if reason:
        raise InputError(
            f"train.layout = 'blocked': {type(module).__name__} {name!r} {reason}; "
            "use train.layout = 'channels_last'"
        )
    for kind, replacement in _REPLACEMENTS.items():
        if type(module) is kind:
            setattr(parent, name, replacement(module))
            return
    to_blocked(module)


def _refused(module: nn.Module) -> str:
    """Why a module cannot take blocked activations; "" where it can."""
    if isinstance(module, nn.Conv2d):
        channels = onednn.block()
        if module.out_channels % channels or module.out_channels // module.groups % channels:
            return f"has {module.out_channels} output channels, not a multiple of {channels}"
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return "pads with something other than a number of zeros"
    elif isinstance(module, nn.MaxPool2d):
        if module.ceil_mode or module.return_indices or _pair(module.dilation) != (1, 1):
            return "rounds sizes up, returns indices or is dilated"
    elif isinstance(module, nn.AdaptiveAvgPool2d):
        if _pair(module.output_size) != (1, 1):  # type: ignore[arg-type]
            return "has an output of more than one pixel"
    elif isinstance(module, nn.Flatten):
        if (module.start_dim, module.end_dim) != (1, -1):
            return "does not flatten all dimensions of a sample"
    elif not isinstance(module, (*_REPLACEMENTS, *_ANY_LAYOUT)) and not list(module.children()):
        return "has no kernel for it"
    return ""


def _fuse(model: nn.Sequential) -> None:
    """Let a convolution compute the ReLU that follows it, and a residual block add up the gradients
    that come back from both branches of the next one."""
    for number in range(len(model) - 1):
        first, second = model[number], model[number + 1]
        if isinstance(first, Convolution) and type(second) is nn.ReLU:
            first.relu = True
            model[number + 1] = nn.Identity()
        if isinstance(first, Block) and isinstance(second, Block):
            first.fork = True


_REPLACEMENTS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.Conv2d: Convolution,
    nn.MaxPool2d: MaxPool,
    nn.LocalResponseNorm: ResponseNorm,
    nn.AdaptiveAvgPool2d: lambda _: GlobalAveragePool(),
    nn.Flatten: lambda _: Flatten(),
}
# Modules that work on any tensor, or that come after the last pooling.
_ANY_LAYOUT = (BatchNorm, nn.ReLU, nn.Identity, nn.Dropout, nn.Linear)


def _activations(
    like: torch.Tensor, samples: int, channels: int, height: int, width: int
) -> torch.Tensor:
    block = onednn.block()
    return like.new_empty((samples, channels // block, height, width, block))


def _sizes(x: torch.Tensor) -> tuple[int, int, int, int, int]:
    """Samples, channels, height, width, and channels of a block (1 for a plain tensor)."""
    if x.dim() == 4:
        samples, channels, height, width = x.shape
        return samples, channels, height, width, 1
    samples, blocks, height, width, block = x.shape
    return samples, blocks * block, height, width, block


def _outputs(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _pair(value: _Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
