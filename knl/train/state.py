"""The tensors of a training: copied for a checkpoint, and put back, whatever their layout.

A checkpoint holds them in the shapes and the order of the plain network; weights that Intel's
extension has packed are unpacked for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from knl.comm.agreement import flat
from knl.comm.collectives import Ranks, waiting_for
from knl.errors import InputError
from knl.optim.lars import Lars
from knl.train.checkpoint import MOMENTUM, Tensors

_PACKED = ("_IPEXConv1d", "_IPEXConv2d", "_IPEXConv3d", "_IPEXLinear")


@dataclass(frozen=True)
class Place:
    """One tensor of a training, under its name in a checkpoint; `owner`: its module."""

    name: str
    tensor: torch.Tensor
    owner: nn.Module
    packed: bool

    @torch.no_grad()
    def copy(self) -> torch.Tensor:
        """As the plain network has it, in memory of its own; in the order of the tensor's memory,
        which training does not wait to be changed."""
        plain = _unpack(self.owner, self.tensor) if self.packed else self.tensor
        return plain.detach().clone()

    @torch.no_grad()
    def put(self, plain: torch.Tensor) -> None:
        """By torch's copy_, of which the optimiser learns."""
        self.tensor.copy_(_pack(self.owner, plain, self.tensor) if self.packed else plain)


def places(model: nn.Module, optimiser: Lars) -> list[Place]:
    """Weights and statistics of the network and the momentum of its weights, in an order that is
    the same on every rank."""
    found: list[Place] = []
    for prefix, module in model.named_modules():
        kept = {n: b for n, b in module._buffers.items() if _persistent(module, n)}
        for name, tensor in [*module._parameters.items(), *kept.items()]:
            if tensor is not None:
                full = f"{prefix}.{name}" if prefix else name
                packed = name == "weight" and type(module).__name__ in _PACKED
                found.append(Place(full, tensor, module, packed))
    by_name = {place.name: place for place in found}
    for name, momentum in zip(optimiser.names, optimiser.momentum_buffers):
        weight = by_name[name]
        found.append(Place(MOMENTUM + name, momentum, weight.owner, weight.packed))
    return found


def copied(found: list[Place]) -> Tensors:
    """All of them, in memory that training does not touch."""
    return {place.name: place.copy().numpy() for place in found}


def require_fit(found: list[Place], tensors: Tensors) -> None:
    """Raise InputError naming the first tensor that a checkpoint lacks, has too many or has in
    another shape."""
    here = {place.name: (tuple(s), _numpy_dtype(t)) for place, s, t in _plain_shapes(found)}
    there = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            raise InputError(
                f"its {name} is {_described(there.get(name))}, the recipe's network has "
                f"{_described(here.get(name))}: it was written by another version of knl; "
                "use that one, or --fresh to start anew without deleting anything"
            )


def put_back(found: list[Place], tensors: Tensors | None, ranks: Ranks, timeout: float) -> None:
    """Give every rank rank 0's `tensors`. One rank reads a file, and the network between the nodes
    carries it: hundreds that read it would stall a shared file system."""
    for place, shape, dtype in _plain_shapes(found):
        if tensors is not None:
            received = torch.from_numpy(np.array(tensors[place.name]))
        else:
            received = torch.empty(shape, dtype=dtype)
        if ranks.world.size > 1:
            with waiting_for(f"rank 0's {place.name} from the checkpoint"):
                ranks.collectives.broadcast(flat(received), root=0)
        place.put(received)


def _plain_shapes(found: list[Place]) -> list[tuple[Place, torch.Size, torch.dtype]]:
    plains = (place.copy() if place.packed else place.tensor for place in found)
    return [(place, plain.shape, plain.dtype) for place, plain in zip(found, plains)]


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype


def _described(tensor: tuple[tuple[int, ...], np.dtype[Any]] | None) -> str:
    return f"{tensor[1]} {list(tensor[0])}" if tensor else "not there"


def _persistent(module: nn.Module, name: str) -> bool:
    return name not in module._non_persistent_buffers_set


def _unpack(owner: Any, packed: torch.Tensor) -> torch.Tensor:
    """As the module's own state_dict does it."""
    ops = torch.ops.torch_ipex
    if type(owner).__name__ == "_IPEXLinear":
        return ops.linear_weight_unpack(
            packed.detach(), owner.out_features, owner.in_features, owner.weight_transposed,
            packed.dtype,
        )  # fmt: skip
    return ops.convolution_weight_unpack(
        packed.detach(), owner.padding, owner.stride, owner.dilation, owner.kernel_size,
        owner.groups, owner.out_channels, owner.in_channels, owner.weight_channels_last,
        packed.dtype,
    )  # fmt: skip


def _pack(owner: Any, plain: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    ops = torch.ops.torch_ipex
    if type(owner).__name__ == "_IPEXLinear":
        packed = ops.linear_weight_pack(plain)
    else:
        last = owner.weight_channels_last
        plain = plain.contiguous(memory_format=torch.channels_last) if last else plain
        packed = ops.convolution_weight_pack(
            plain, owner.padding, owner.stride, owner.dilation, owner.groups
        )
    assert packed.shape == like.shape  # packed at the start for the same place
    return packed


def all_finite(tensors: Tensors) -> str:
    """The name of the first tensor with something in it that is no number; "" where all are."""
    return next((n for n, array in tensors.items() if not _finite(array)), "")


def _finite(array: NDArray[Any]) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())
