"""Something else in place of the oneDNN operations that knl's modules ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from knl.models import onednn
from knl.models.onednn import Operation, Shape

_KINDS = ("convolution", "max_pooling", "response_norm")

# From a kind, a shape, a pass and its settings to what knl gets; the last makes oneDNN's operation.
Substitute = Callable[[str, Shape, int, tuple[float, ...], Callable[[], Operation]], Any]


@contextmanager
def replaced_by(substitute: Substitute) -> Iterator[None]:
    """What knl asks of oneDNN is asked of `substitute`."""
    real = {kind: getattr(onednn, kind) for kind in _KINDS}

    def through(kind: str) -> Callable:
        def ask(shape, what, *settings):
            make = partial(real[kind], shape, what, *settings)
            return substitute(kind, shape, what, settings, make)

        return ask

    try:
        for kind in _KINDS:
            setattr(onednn, kind, through(kind))
        yield
    finally:
        for kind in _KINDS:
            setattr(onednn, kind, real[kind])
