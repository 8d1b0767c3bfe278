"""What networks ask of oneDNN, and which kernels it takes: blocked as knl asks, or channels-last.

Runs in a child of pretend.py. Nothing is computed, so the host needs no AVX-512.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import NamedTuple

import torch
from operations import replaced_by
from torch import nn

from knl.config import Model
from knl.models import build_model, onednn
from knl.models.onednn import BACKWARD_DATA, BACKWARD_WEIGHTS, FORWARD, INFERENCE, Shape
from knl.train.forward import to_layout

IMAGES = 64
PASSES = {
    INFERENCE: "inference", FORWARD: "forward", BACKWARD_DATA: "backward data",
    BACKWARD_WEIGHTS: "backward weights",
}  # fmt: skip

# As oneDNN's headers number them.
_CPU, _F32, _ANY, _DIRECT, _TRAINING, _IMPLEMENTATION = 1, 3, 1, 1, 64, 8
_DESCRIPTION = 1 << 14  # bytes, more than any structure of oneDNN's for a description


class Question(NamedTuple):
    """What was asked of oneDNN, in a step or in an evaluation."""

    when: str
    kind: str
    shape: Shape
    what: int
    settings: tuple[float, ...]


def kernels(networks: dict[str, int], layout: str, threads: int) -> dict[str, dict]:
    """For each network, by its pixels a side: how many convolutions it has, and for each operation
    that a step and an evaluation on 64 images ask for, how often, and the names of oneDNN's kernels
    in that layout and, of convolutions, in channels-last. `threads`: of a rank."""
    found = {}
    for name, pixels in networks.items():
        number, questions = _questions(name, pixels, layout)
        found[name] = {"convolutions": number, "asked": questions}
    torch.set_num_threads(threads)
    for one in found.values():
        one["asked"] = [
            {
                "when": q.when, "kind": q.kind, "pass": PASSES[q.what], "times": times,
                "shape": list(q.shape), "kernel": _kernel(q),
                "channels_last": _channels_last(q.shape, q.what) if q.kind == "convolution" else "",
            }
            for q, times in one["asked"].items()
        ]  # fmt: skip
    return found


def _kernel(q: Question) -> str:
    return getattr(onednn, q.kind)(q.shape, q.what, *q.settings).implementation


def _questions(name: str, pixels: int, layout: str) -> tuple[int, Counter]:
    """Found by running the network on two images without its operations: on more, the number of
    images is all that is asked differently."""
    model = build_model(Model(name=name), 3, 1000)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    model = to_layout(model, layout)
    asked: Counter = Counter()

    class NotRun:
        def __init__(self, kind, shape, what, settings, _) -> None:
            when = "step" if model.training else "evaluation"
            asked[Question(when, kind, shape._replace(samples=IMAGES), what, settings)] += 1

        def bytes_of(self, _) -> int:
            return 0

        def run(self, *_) -> None:
            pass

    images = torch.zeros(2, 3, pixels, pixels)
    with replaced_by(NotRun):
        model.train()(images).sum().backward()
        with torch.no_grad():
            model.eval()(images)
    return convolutions, asked


def _channels_last(shape: Shape, what: int) -> str:
    """The kernel for a convolution between channels-last activations. knl never asks for one, so
    this is oneDNN's own C API."""
    library = ctypes.CDLL(str(onednn.library_path()))
    source = _activations(library, shape.in_channels, shape.in_height, shape.in_width)
    output = _activations(library, shape.out_channels, shape.out_height, shape.out_width)
    groups = [shape.groups] if shape.groups > 1 else []
    weights = _described(
        library, "tag",
        [*groups, shape.out_channels // shape.groups, shape.in_channels // shape.groups,
         shape.kernel_height, shape.kernel_width], _ANY,
    )  # fmt: skip
    bias = _described(library, "tag", [shape.out_channels], _ANY) if shape.bias else None
    window = [
        _dims(shape.stride_height, shape.stride_width),
        *[_dims(shape.pad_height, shape.pad_width)] * 2,
    ]
    forward, wanted = (ctypes.create_string_buffer(_DESCRIPTION) for _ in range(2))
    _require(
        library.dnnl_convolution_forward_desc_init(
            forward, _TRAINING, _DIRECT, source, weights, bias, output, *window
        )
    )
    if what == BACKWARD_DATA:
        init = library.dnnl_convolution_backward_data_desc_init
        _require(init(wanted, _DIRECT, source, weights, output, *window))
    elif what == BACKWARD_WEIGHTS:
        init = library.dnnl_convolution_backward_weights_desc_init
        _require(init(wanted, _DIRECT, source, weights, bias, output, *window))
    engine, hint, chosen, name = (ctypes.c_void_p() for _ in range(4))
    _require(library.dnnl_engine_create(ctypes.byref(engine), _CPU, ctypes.c_size_t(0)))
    create = library.dnnl_primitive_desc_create
    _require(create(ctypes.byref(hint), forward, None, engine, None))
    if what in (BACKWARD_DATA, BACKWARD_WEIGHTS):
        _require(create(ctypes.byref(chosen), wanted, None, engine, hint))
    query = library.dnnl_primitive_desc_query
    _require(query(chosen if chosen.value else hint, _IMPLEMENTATION, 0, ctypes.byref(name)))
    return ctypes.string_at(name.value).decode()


def _activations(library, channels: int, height: int, width: int):
    sizes = IMAGES, channels, height, width
    strides = _dims(height * width * channels, 1, width * channels, channels)
    return _described(library, "strides", sizes, strides)


def _described(library, by: str, sizes, how):
    made = ctypes.create_string_buffer(_DESCRIPTION)
    init = getattr(library, f"dnnl_memory_desc_init_by_{by}")
    _require(init(made, len(sizes), _dims(*sizes), _F32, how))
    return made


def _dims(*sizes: int):
    return (ctypes.c_int64 * 12)(*sizes)


def _require(status: int) -> None:
    assert status == 0, f"oneDNN: status {status}"
