"""LARS: momentum SGD whose step is scaled, layer by layer, to the size of the layer's weights.

With the trust ratio r = eta |w| / (|g| + wd |w|) of each tensor, the forms in use are

  paper  v = m v + lr r (g + wd w);   w -= v          You, Gitman, Ginsburg 2017, algorithm 1
  torch  v = m v + r (g + wd w);      w -= lr v       as in timm and torch_optimizer
  nus    v = m v + (g + wd w);        w -= lr r v     You's group; r at most 50
  larc   v = m v + r' (g + wd w);     w -= lr v       r' = min(r / lr, 1); clipping, as in apex
  sgd    v = m v + (g + wd w);        w -= lr v       no ratio: the Goyal et al. baseline

`paper` keeps the learning rate inside the momentum, so it differs from `torch` whenever the rate
changes. Where |w| or |g| is zero, r and r' are 1, as in the paper's own code (NVCaffe, Intel
Caffe). A tensor on the skip list moves at the global rate, r = 1, without weight decay, as in
MLPerf's reference. So do biases and BatchNorm by default: it lifted a run at batch 8K from 74.3 to
76.1 % (PaddlePaddle pull request 26733).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from knl import native
from knl.comm.agreement import Named
from knl.errors import InputError, NonFiniteError

FORMS = ("paper", "torch", "nus", "larc", "sgd")  # in the order of lars.cpp's Form
NUS_MAX_TRUST = 50.0


@dataclass(frozen=True)
class StepReport:
    """The trust ratios of one step, over the tensors that are not skipped."""

    trust_min: float
    trust_max: float


class Lars:
    """Updates float32 parameters in place, many tensors in one native call.

    `named`: dense parameters. `skip`: "bias" leaves out every tensor of that name, "norm" every
    other of one dimension (the gains of normalisation layers), any other word the tensors with it
    in their name. Raises InputError naming a parameter that is not float32.
    `momentum_buffers` and the last `trust` (one number a tensor) may be read at any time. Weights
    that others change (a checkpoint is loaded) are to be changed by torch's in-place operations: of
    writes through `.data` or NumPy it learns nothing, and takes the last update's norms.
    """

    def __init__(
        self,
        named: Named,
        *,
        form: str,
        momentum: float,
        weight_decay: float,
        eta: float,
        skip: Sequence[str],
    ) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        for name, parameter in named:
            if parameter.dtype != torch.float32:
                raise InputError(f"{name} is {parameter.dtype}: LARS updates torch.float32 alone")
        self.momentum_buffers = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.form, self.momentum, self.eta = FORMS.index(form), momentum, eta
        self.skipped = np.array([_skipped(name, p, skip) for name, p in named], dtype=bool)
        self.trust = np.ones(len(named))
        self._max_trust = NUS_MAX_TRUST if form == "nus" else float("inf")
        self._decays = np.where(self.skipped, 0.0, weight_decay).astype(np.float32)
        kernels = native.load_kernels()
        kernels.knl_lars_pieces.argtypes = [ctypes.c_int64]
        # The kernel leaves the squares of the weights here. They are good for as long as a tensor
        # is where it was and torch has counted no other change to it.
        pieces = [kernels.knl_lars_pieces(p.numel()) for p in self.parameters]
        self.pieces = np.array(pieces, dtype=np.int64)
        self._squares = np.empty(sum(pieces))
        firsts = np.cumsum([0, *pieces[:-1]], dtype=np.uint64)
        self._squares_at = self._squares.ctypes.data + firsts * np.uint64(self._squares.itemsize)
        self._sizes = np.array([p.numel() for p in self.parameters], dtype=np.int64)
        self._momenta_at = _addresses(self.momentum_buffers)
        self._seen: list[tuple[int, int] | None] = [None] * len(self.parameters)
        self._update = kernels.knl_lars_update
        self._update.argtypes = [
            ctypes.c_int, ctypes.c_int, *[ctypes.c_void_p] * 9, *[ctypes.c_double] * 5,
            *[ctypes.c_void_p] * 2,
        ]  # fmt: skip

    def step(self, lr: float, grad_scale: float) -> StepReport:
        """One update of all parameters from their `grad`; see `update`."""
        numbers = range(len(self.parameters))
        self.update(numbers, [self.parameters[n].grad for n in numbers], lr, grad_scale)
        return self.report()

    def update(
        self,
        numbers: Sequence[int],
        gradients: Sequence[torch.Tensor | None],
        lr: float,
        grad_scale: float,
        squares: NDArray[np.float64] | None = None,
    ) -> None:
        """Update the parameters of these `numbers` with learning rate `lr`.

        `gradients`: float32 or bfloat16, in the shapes of the parameters, None where backward did
        not come; they count `grad_scale` times themselves. Raises NonFiniteError naming the layer
        whose gradient or weight is infinite or not a number: its weights are as they were, but
        layers before it in the call may have moved, so training goes on from a checkpoint.
        `squares`: sums of squares of these gradients, of each one every so many elements in the
        order of memory (native/squares.h; `pieces` says how many), where somebody has made them as
        he had the gradients at hand; then they are read once.
        """
        parameters = [self.parameters[n] for n in numbers]
        sources = [_like(p, gradient) for p, gradient in zip(parameters, gradients)]
        which = np.asarray(numbers)
        now = [(p.data_ptr(), p._version) for p in parameters]
        trust = np.ones(len(parameters))
        if squares is not None and len(squares) != (pieces := self.pieces[which].sum()):
            raise InputError(f"{len(squares)} sums of squares for {pieces} pieces of gradients")
        arrays = (
            np.array([address for address, _ in now], dtype=np.uint64),
            _addresses(sources),
            self._momenta_at[which],
            self._squares_at[which],
            self._sizes[which],
            self._decays[which],
            (~self.skipped[which]).astype(np.uint8),
            np.array([source.dtype == torch.bfloat16 for source in sources], dtype=np.uint8),
            np.array([self._seen[n] == seen for n, seen in zip(numbers, now)], dtype=np.uint8),
        )
        broken = self._update(
            self.form, len(parameters), *(array.ctypes.data for array in arrays),
            lr, self.momentum, self.eta, self._max_trust, grad_scale, trust.ctypes.data,
            None if squares is None else squares.ctypes.data,
        )  # fmt: skip
        for n, seen in zip(numbers, now):
            self._seen[n] = seen if broken < 0 else None
        if broken >= 0:
            raise NonFiniteError(self.names[numbers[broken]])
        self.trust[which] = trust

    def trust_by_name(self) -> dict[str, float]:
        """The last trust ratio of each tensor that has one."""
        if FORMS[self.form] == "sgd":
            return {}
        rows = zip(self.names, self.trust.tolist(), self.skipped.tolist())
        return {name: trust for name, trust, skipped in rows if not skipped}

    def report(self) -> StepReport:
        """Of the last update of each parameter."""
        adapted = self.trust[~self.skipped]
        if not adapted.size:
            return StepReport(1.0, 1.0)
        return StepReport(float(adapted.min()), float(adapted.max()))


def _like(parameter: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """The gradient in the parameter's memory order."""
    if gradient is None:
        return torch.zeros_like(parameter)
    if gradient.stride() != parameter.stride():
        return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
    return gradient


def _skipped(name: str, parameter: torch.Tensor, skip: Sequence[str]) -> bool:
    is_bias = name.rsplit(".", 1)[-1] == "bias"
    for word in skip:
        if (word == "bias" and is_bias) or (
            word == "norm" and parameter.dim() <= 1 and not is_bias
        ):
            return True
        if word not in ("bias", "norm") and word in name:
            return True
    return False


def _addresses(tensors: Sequence[torch.Tensor]) -> NDArray[Any]:
    return np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uint64)
