"""BatchNorm with the ReLU and the residual sum that follow it, in one module and few passes.

Eager torch reads or writes the activations fourteen times for BatchNorm and ReLU in one training
step; statistics of the batch allow eight. In ResNet-50 that is a tenth of the step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from knl import native
from knl.models.blocked_norm import BlockedNorm, How, apply

_CHANNELS_LAST = torch.channels_last
_TYPES = (torch.float32, torch.bfloat16)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation (Ioffe, Szegedy 2015, arXiv 1502.03167), plus `residual`, then ReLU where
    wanted: the same numbers as torch's modules one after another, up to rounding.

    In training on float32 or bfloat16 in channels_last it runs knl's kernels, else torch's
    functions: for other layouts and types, in evaluation, and under torch.compile, which fuses on
    its own. Of bfloat16 activations all is computed in float32 and rounded once; weights and
    statistics stay float32. The kernels' gradient has none of its own: asking for it raises
    RuntimeError.
    """

    def __init__(self, channels: int, relu: bool) -> None:
        super().__init__(channels)
        self.relu = relu

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`x`, `residual`: [samples, channels, height, width], or blocked."""
        return self._run(x, residual, False)[0]

    def fork(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output twice, for two uses: the kernels for blocked activations add their gradients
        up on the way, where torch would take a pass of its own."""
        outputs = self._run(x, residual, True)
        return outputs[0], outputs[-1]

    def _run(
        self, x: torch.Tensor, residual: torch.Tensor | None, fork: bool
    ) -> tuple[torch.Tensor, ...]:
        if x.dim() == 5:
            return self._run_blocked(x, residual, fork)
        if self._fused(x, residual):
            self._count()
            y = _Fused.apply(
                x, residual, self.weight, self.bias, self.running_mean, self.running_var,
                self.eps, self.momentum, self.relu,
            )  # fmt: skip
            return (y,)
        y = super().forward(x)
        if residual is not None:
            y = y.add_(residual)
        return (functional.relu_(y) if self.relu else y,)

    def _run_blocked(
        self, x: torch.Tensor, residual: torch.Tensor | None, fork: bool
    ) -> tuple[torch.Tensor, ...]:
        running = self.running_mean, self.running_var
        if not (self.training and torch.is_grad_enabled()):
            return (apply(x, residual, self.weight, self.bias, *running, self.eps, self.relu),)
        self._count()
        how = How(self.eps, float(self.momentum or 0.0), self.relu, fork)
        return BlockedNorm.apply(x, residual, self.weight, self.bias, *running, how)  # type: ignore[no-any-return]

    def _count(self) -> None:
        assert self.num_batches_tracked is not None  # tracks by default
        self.num_batches_tracked.add_(1)

    def _fused(self, x: torch.Tensor, residual: torch.Tensor | None) -> bool:
        fits = all(
            t.dtype == x.dtype and t.is_contiguous(memory_format=_CHANNELS_LAST)
            for t in (x, residual)
            if t is not None
        )
        fits = fits and x.dtype in _TYPES and self.weight.dtype == torch.float32
        fits = fits and x.dim() == 4 and x.size(1) == self.num_features
        fits = fits and (residual is None or residual.shape == x.shape)
        several = fits and x.numel() > x.size(1)  # of one value there is no variance
        plain = self.momentum is not None and not _is_compiling()
        return fits and several and plain and self.training and torch.is_grad_enabled()


class _Fused(torch.autograd.Function):
    """BatchNorm's training step on knl/native/norm.cpp."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        eps: float,
        momentum: float,
        relu: bool,
    ) -> torch.Tensor:
        y = torch.empty_like(x, memory_format=_CHANNELS_LAST)
        mean, inverse = torch.empty_like(running_mean), torch.empty_like(running_var)
        _kernel("forward", x)(
            x.data_ptr(), _pointer(residual), y.data_ptr(), x.numel() // x.size(1), x.size(1),
            weight.data_ptr(), bias.data_ptr(), eps, momentum, relu,
            running_mean.data_ptr(), running_var.data_ptr(), mean.data_ptr(), inverse.data_ptr(),
        )  # fmt: skip
        needs_output = relu and residual is not None
        ctx.save_for_backward(x, weight, bias, mean, inverse, *([y] if needs_output else []))
        ctx.relu, ctx.adds = relu, residual is not None
        return y

    # The kernels leave no graph: a gradient of the gradient would be wrong and say nothing.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, mean, inverse, *output = ctx.saved_tensors
        dy = dy.contiguous(memory_format=_CHANNELS_LAST)
        y = output[0] if output else None
        dx = torch.empty_like(x, memory_format=_CHANNELS_LAST)
        dresidual = torch.empty_like(dx) if output else dy if ctx.adds else None
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        _kernel("backward", x)(
            dy.data_ptr(), x.data_ptr(), _pointer(y), x.numel() // x.size(1), x.size(1),
            weight.data_ptr(), bias.data_ptr(), mean.data_ptr(), inverse.data_ptr(), ctx.relu,
            dx.data_ptr(), _pointer(dresidual if output else None),
            dweight.data_ptr(), dbias.data_ptr(),
        )  # fmt: skip
        return dx, dresidual, dweight, dbias, None, None, None, None, None


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _is_compiling() -> bool:
    compiler = getattr(torch, "compiler", None)  # none in torch 1
    return compiler is not None and bool(compiler.is_compiling())


def _kernel(name: str, x: torch.Tensor) -> Callable[..., None]:
    suffix = "_bf16" if x.dtype == torch.bfloat16 else ""
    return getattr(_kernels(), f"knl_norm_{name}{suffix}")  # type: ignore[no-any-return]


@cache
def _kernels() -> ctypes.CDLL:
    pointer, size, real, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
    kernels = native.load_kernels()
    arguments = {
        "forward": [*[pointer] * 3, size, size, pointer, pointer, real, real, flag, *[pointer] * 4],
        "backward": [*[pointer] * 3, size, size, *[pointer] * 4, flag, *[pointer] * 4],
    }
    for name, types in arguments.items():
        for suffix in ("", "_bf16"):
            kernel = getattr(kernels, f"knl_norm_{name}{suffix}")
            kernel.argtypes, kernel.restype = types, None
    return kernels
