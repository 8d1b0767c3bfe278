"""BatchNorm in the blocked layout, with the ReLU and the residual sum that follow it.

The kernels are in knl/native/norm_blocked.cpp. `knl.models.norm` chooses them.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from knl import native


class How(NamedTuple):
    """Settings of a normalisation. `fork`: the output twice, for two uses."""

    eps: float
    momentum: float
    relu: bool
    fork: bool


class BlockedNorm(torch.autograd.Function):
    """One training step: statistics of the batch, normalisation, residual sum, ReLU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        how: How,
    ) -> tuple[torch.Tensor, ...]:
        if x.numel() == weight.numel():
            raise ValueError(
                f"one value a channel has no variance: {list(x.shape)}"
            )  # as torch does
        x = x.contiguous()
        affine = x.new_empty(4, weight.numel())
        _kernels().knl_norm_blocked_statistics(
            x.data_ptr(), *_sizes(x), weight.data_ptr(), bias.data_ptr(), how.eps, how.momentum,
            running_mean.data_ptr(), running_var.data_ptr(), affine.data_ptr(),
        )  # fmt: skip
        signs = None
        if how.relu and residual is not None:
            signs = torch.empty(_kernels().knl_norm_blocked_signs(*_sizes(x)), dtype=torch.int32)
        y = _applied(x, residual, affine[2], affine[3], how.relu, signs)
        ctx.save_for_backward(x, weight, affine, signs)
        ctx.relu, ctx.adds = how.relu, residual is not None
        return (y, y.detach()) if how.fork else (y,)

    # The kernels leave no graph: a gradient of the gradient would be wrong and say nothing.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, affine, signs = ctx.saved_tensors
        given = [gradient.contiguous() for gradient in gradients if gradient is not None]
        dy, more = given[0], given[1] if len(given) > 1 else None
        through = torch.empty_like(x) if signs is not None or more is not None else None
        dx, dweight, dbias = (torch.empty_like(tensor) for tensor in (x, weight, weight))
        _kernels().knl_norm_blocked_backward(
            dy.data_ptr(), _pointer(more), x.data_ptr(), _pointer(signs), *_sizes(x),
            affine.data_ptr(), weight.data_ptr(), ctx.relu, _pointer(through), dx.data_ptr(),
            dweight.data_ptr(), dbias.data_ptr(),
        )  # fmt: skip
        dresidual = (dy if through is None else through) if ctx.adds else None
        return dx, dresidual, dweight, dbias, None, None, None


def apply(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
    relu: bool,
) -> torch.Tensor:
    """Normalise with given statistics, without a gradient, as in evaluation."""
    scale = weight / torch.sqrt(variance + eps)
    return _applied(x.contiguous(), residual, scale, bias - mean * scale, relu)


def _applied(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    relu: bool,
    signs: torch.Tensor | None = None,
) -> torch.Tensor:
    y = torch.empty_like(x)
    added = None if residual is None else residual.contiguous()
    _kernels().knl_norm_blocked_apply(
        x.data_ptr(), _pointer(added), y.data_ptr(), *_sizes(x),
        scale.data_ptr(), shift.data_ptr(), relu, _pointer(signs),
    )  # fmt: skip
    return y


def _sizes(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Samples, blocks, pixels, and channels of a block."""
    samples, blocks, height, width, block = x.shape
    return samples, blocks, height * width, block


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _kernels() -> ctypes.CDLL:
    pointer, size, real, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
    sizes = [size] * 4
    kernels = native.load_kernels()
    kernels.knl_norm_blocked_statistics.argtypes = [
        pointer, *sizes, pointer, pointer, real, real, *[pointer] * 3,
    ]  # fmt: skip
    kernels.knl_norm_blocked_apply.argtypes = [
        *[pointer] * 3, *sizes, pointer, pointer, flag, pointer,
    ]  # fmt: skip
    kernels.knl_norm_blocked_backward.argtypes = [
        *[pointer] * 4, *sizes, pointer, pointer, flag, *[pointer] * 4,
    ]  # fmt: skip
    for name in ("statistics", "apply", "backward"):
        getattr(kernels, f"knl_norm_blocked_{name}").restype = None
    kernels.knl_norm_blocked_signs.argtypes = sizes
    kernels.knl_norm_blocked_signs.restype = size
    return kernels
