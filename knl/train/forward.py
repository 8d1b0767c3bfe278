"""From a batch of arrays through the network: what training and evaluation have in common."""

from __future__ import annotations

import torch
from torch import nn

from knl.errors import InputError
from knl.models.blocked import to_blocked

_LAYOUTS = {
    "blocked": torch.contiguous_format,
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "ipex": torch.channels_last,
}


def to_layout(model: nn.Module, layout: str) -> nn.Module:
    """The network with its weights in that layout. Raises InputError where IPEX is wanted and is
    not installed."""
    model = model.to(memory_format=_LAYOUTS[layout])  # type: ignore[call-overload]
    if layout == "blocked":
        return to_blocked(model)
    return _packed(model) if layout == "ipex" else model


def _packed(model: nn.Module) -> nn.Module:
    """Weights in oneDNN's blocked layout, so that no step reorders them (ipex.optimize)."""
    try:
        import intel_extension_for_pytorch as ipex
    except ImportError as error:
        raise InputError(
            f"train.layout = 'ipex': Intel's extension for PyTorch does not import ({error}); "
            "use channels_last, or the knl stack"
        ) from None
    # It insists on an optimiser, whose state it would pack, too; ours has none yet.
    stateless = torch.optim.SGD(model.parameters(), lr=1.0)
    return ipex.optimize(model, optimizer=stateless, inplace=True)[0]  # type: ignore[no-any-return]


def forward(model: nn.Module, images: torch.Tensor, dtype: str) -> torch.Tensor:
    """The scores. "bf16": convolutions and matrix products in bfloat16; weights stay float32."""
    if dtype == "bf16":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(images)
    return model(images)
