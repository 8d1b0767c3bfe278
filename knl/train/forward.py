"""From a batch of arrays through the network: what training and evaluation have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def to_tensors(
    batch: tuple[NDArray[Any], NDArray[Any]], layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in the layout the network wants, and labels."""
    images, labels = batch
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    return tensor.contiguous(memory_format=_LAYOUTS[layout]), torch.from_numpy(labels)


def to_layout(model: nn.Module, layout: str) -> nn.Module:
    """The network with its weights in that layout."""
    return model.to(memory_format=_LAYOUTS[layout])  # type: ignore[call-overload]


def forward(model: nn.Module, images: torch.Tensor, dtype: str) -> torch.Tensor:
    """The scores. "bf16": convolutions and matrix products in bfloat16; weights stay float32."""
    if dtype == "bf16":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(images)
    return model(images)
