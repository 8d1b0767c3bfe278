"""One training step of a network, and how far each of its convolutions, poolings and response norms
is from the same in double precision. Runs in a child of pretend.py."""

from __future__ import annotations

from pathlib import Path

import torch
from operations import replaced_by
from torch.nn import functional

from knl.config import Model
from knl.models import build_model
from knl.models.blocked import plain
from knl.models.onednn import BACKWARD_DATA, BACKWARD_WEIGHTS, FORWARD, Shape
from knl.train.forward import to_layout


def run(name: str, images: int, pixels: int, path: str) -> list[tuple[str, str, float]]:
    """What was asked for, which kernel took it, and its error, for each operation in its turn. The
    loss and the gradients are saved to `path`."""
    torch.manual_seed(7)
    model = to_layout(build_model(Model(name=name), 3, 1000), "blocked")
    batch = torch.randn(images, 3, pixels, pixels)
    labels = torch.randint(1000, (images,))
    found = []
    pooled: dict[Shape, torch.Tensor] = {}  # sources of poolings, which backward does not read

    class Checked:
        def __init__(self, kind, shape, what, settings, make) -> None:
            self.operation = make()
            self.bytes_of = self.operation.bytes_of
            self.kind, self.shape, self.what, self.settings = kind, shape, what, settings

        def run(self, *tensors: torch.Tensor | None) -> None:
            self.operation.run(*tensors)
            given = [_double(t) for t in tensors if t is not None and t.is_floating_point()]
            if self.kind == "max_pooling" and self.what == FORWARD:
                pooled[self.shape] = given[0]
            if self.kind == "max_pooling" and self.what == BACKWARD_DATA:
                given.insert(0, pooled[self.shape])
            wanted = _wanted(given, self.kind, self.shape, self.what, self.settings)
            outputs = given[-len(wanted) :]
            error = max(float((a - b).norm() / b.norm()) for a, b in zip(outputs, wanted))
            asked = f"{self.kind} {self.what} {self.shape} {self.settings}"
            found.append((asked, self.operation.implementation, error))

    with replaced_by(Checked):
        loss = functional.cross_entropy(model(batch), labels)
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save({"loss": loss.detach(), **gradients}, Path(path))
    return found


@torch.enable_grad()  # which is off in a backward
def _wanted(given, kind: str, shape: Shape, what: int, settings) -> list[torch.Tensor]:
    """The outputs by torch's own functions, from the tensors of a call in onednn.cpp's order."""
    s = shape
    window = (s.stride_height, s.stride_width), (s.pad_height, s.pad_width)
    if kind == "max_pooling":
        kernel = s.kernel_height, s.kernel_width
        return _of_source(given, what, lambda x: functional.max_pool2d(x, kernel, *window))
    if kind == "response_norm":
        return _of_source(given, what, lambda x: functional.local_response_norm(x, *settings))

    def convolve(x, weight, bias=None):
        dilation = s.dilation_height, s.dilation_width
        return functional.conv2d(x, weight, bias, *window, dilation, s.groups)

    if what == BACKWARD_DATA:
        dy, weight, dx = given
        source = torch.zeros_like(dx).requires_grad_()  # which one does not matter to the gradient
        return list(torch.autograd.grad(convolve(source, weight), source, dy))
    if what == BACKWARD_WEIGHTS:
        source, dy, *outputs = given
        parameters = [torch.zeros_like(output).requires_grad_() for output in outputs]
        return list(torch.autograd.grad(convolve(source, *parameters), parameters, dy))
    y = convolve(*given[:-1])
    return [y.relu() if s.relu else y]


def _of_source(given, what: int, function) -> list[torch.Tensor]:
    source = given[0].requires_grad_()
    y = function(source)
    return list(torch.autograd.grad(y, source, given[1])) if what == BACKWARD_DATA else [y.detach()]


def _double(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (plain(tensor) if tensor.dim() == 5 else tensor).double()
