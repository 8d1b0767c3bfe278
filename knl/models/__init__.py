"""The networks, by the name that a recipe gives them."""

from __future__ import annotations

from torch import nn

from knl.config import Model
from knl.errors import InputError
from knl.models.alexnet import alexnet, alexnet_bn, alexnet_torch
from knl.models.resnet import resnet50, resnet_small

# Networks whose classifier fixes the size of their pictures.
_PIXELS = {"alexnet": 227, "alexnet-bn": 227, "alexnet-torch": 224}


def require_pixels(model: Model, pixels: int) -> None:
    """Raise InputError where the network cannot take pictures of so many pixels a side."""
    wanted = _PIXELS.get(model.name, pixels)
    if pixels != wanted:
        raise InputError(
            f"model.name = {model.name!r}: takes {wanted} pixels a side, the data has {pixels}; "
            f"set data.crop = {wanted} with a data.image_size of at least that, or another model"
        )


def build_model(model: Model, channels: int, classes: int) -> nn.Module:
    """A network for pictures of `channels` planes. Weights come from torch's default generator."""
    if model.name == "resnet50":
        return resnet50(channels, classes, model.zero_init_gamma)
    if model.name == "resnet-small":
        return resnet_small(channels, classes, model.zero_init_gamma)
    make = {"alexnet": alexnet, "alexnet-bn": alexnet_bn, "alexnet-torch": alexnet_torch}
    return make[model.name](channels, classes, model.dropout)
