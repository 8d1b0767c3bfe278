"""The process that loads the stack and runs a convolution, so that its death is not doctor's.

Run as `python -m knl.doctor.probe`. It says each thing as one JSON object a line on stdout, as soon
as it knows it: {"doing": part} before a part, then {"found": {...}} or {"problem": {part: why}}.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knl import native

if TYPE_CHECKING:
    from knl.comm.world import World

_STDERR = 2
# The shape of ResNet-50's second stage, small enough to take well under a second.
_BATCH, _CHANNELS, _SIZE = 8, 64, 56


def main() -> None:
    """Go through the parts in order; a part that fails does not keep the others from being said."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "torch": _torch,
        "convolution": _convolution,
        "blocked": _blocked,
        "ipex": _ipex,
        "mpi": _mpi,
        "collectives": _collectives,
        "libraries": _libraries,
    }
    with native.stdout_to(_STDERR) as stdout:
        for name, part in parts.items():
            _say(stdout, {"doing": name})
            try:
                _say(stdout, {"found": part()})
            except Exception as error:
                text = " ".join(str(error).split())
                _say(stdout, {"problem": {name: f"{type(error).__name__}: {text}"}})
        _say(stdout, {"doing": ""})


def _say(stdout: int, message: dict[str, Any]) -> None:
    os.write(stdout, json.dumps(message).encode() + b"\n")


def _torch() -> dict[str, Any]:
    import torch

    build = torch.__config__.show()
    return {
        "torch": torch.__version__,
        "mkl": _match(r"Math Kernel Library Version (\S+?)(?:-Product| Product)", build),
        "aten": _match(r"CPU capability usage: (.+)", build),
    }


def _convolution() -> dict[str, Any]:
    """What oneDNN prints while a convolution trains, in torch's two memory layouts."""
    import torch

    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return {name: _verbose_of(_block, layout) for name, layout in layouts.items()}


def _blocked() -> dict[str, Any]:
    """The same in the blocked layout, by the oneDNN that knl brings for it."""
    from torch import nn

    from knl.models import blocked, onednn
    from knl.models.norm import BatchNorm

    def build() -> Any:
        convolution = nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, bias=False)
        layers = convolution, BatchNorm(_CHANNELS, relu=True), nn.AdaptiveAvgPool2d(1)
        return blocked.to_blocked(nn.Sequential(*layers))

    return {"blocked": _verbose_of(build, None, lambda x: blocked.blocked(x, onednn.block()))}


def _ipex() -> dict[str, Any]:
    """IPEX has a oneDNN of its own, which runs the convolutions of a model it has optimised."""
    import torch

    ipex = importlib.import_module("intel_extension_for_pytorch")

    def optimised() -> Any:
        model = _block()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        return ipex.optimize(model, optimizer=optimiser)[0]

    return {
        "ipex": ipex.__version__,
        "ipex_optimized": _verbose_of(optimised, torch.channels_last),
    }


def _block() -> Any:
    """Convolution, batch norm and ReLU, as in a ResNet: oneDNN's kernels and ATen's."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, bias=False),
        nn.BatchNorm2d(_CHANNELS),
        nn.ReLU(),
    )


def _verbose_of(
    build: Callable[[], Any], layout: Any, arrange: Callable[[Any], Any] | None = None
) -> list[str]:
    """The lines that oneDNN prints while a model is built and trains for a step. `layout`: one of
    torch's memory formats; else `arrange` gives the images theirs."""
    import torch

    images = torch.randn(_BATCH, _CHANNELS, _SIZE, _SIZE)
    images = arrange(images) if arrange else images.to(memory_format=layout)
    images.requires_grad_()
    with tempfile.TemporaryFile() as printed:
        with native.stdout_to(printed.fileno()):
            model = build() if arrange else build().to(memory_format=layout)
            scores = model(images).mean((2, 3))
            torch.nn.functional.cross_entropy(scores, torch.arange(_BATCH)).backward()
        printed.seek(0)
        lines = printed.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.startswith(("onednn_verbose", "dnnl_verbose"))]


def _mpi() -> dict[str, Any]:
    """MPI's version without MPI_Init, which would want a launcher and a network."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    lines = MPI.Get_library_version().strip("\0 \n").splitlines()
    return {"mpi": lines[0].strip(), "mpi4py": mpi4py.__version__}


def _collectives() -> dict[str, Any]:
    """Why `--provider auto` would pass each provider over in a launch of this MPI; "" if it would
    not."""
    from knl.comm.bootstrap import SingleBootstrap
    from knl.comm.collectives import PROVIDERS, ProviderUnavailable
    from knl.comm.world import World

    mpi = sys.modules.get("mpi4py.MPI")
    is_open = mpi is not None and "Open MPI" in mpi.Get_library_version()
    world = World(0, 2, 0, 2, "openmpi" if is_open else "mpi")
    reasons: dict[str, str] = {}
    found: dict[str, str] = {}
    for name in PROVIDERS:
        reasons[name] = ""
        try:
            if name == "oneccl":
                found = _oneccl(world)
            elif name != "mpi":
                from knl.comm import torch_dist

                torch_dist.load(name, world, SingleBootstrap(), 1.0)
            elif mpi is None:
                reasons[name] = "mpi4py loads no MPI"
        except ProviderUnavailable as reason:
            reasons[name] = str(reason)
    return {"collectives": reasons, **found}


def _oneccl(world: World) -> dict[str, str]:
    from knl.comm import oneccl
    from knl.comm.bootstrap import SingleBootstrap

    oneccl.load(world, SingleBootstrap(), 1.0)
    path, text = oneccl.find_libccl(), ctypes.create_string_buffer(128)
    native.load_ccl(path).knl_ccl_version(text, ctypes.c_size_t(len(text)))
    version = text.value.decode().split(" ")[0].replace("Gold-", "")
    return {"oneccl": version, "libccl": str(path)}


def _libraries() -> dict[str, Any]:
    """What all the parts before have loaded, and libfabric's providers, None where it is not said
    where they are."""
    replaced = [p for p in native.loaded_libraries() if re.search(r"/lib(tc|je|mi)malloc", p)]
    folders = os.environ.get("FI_PROVIDER_PATH", "")
    files = [p.name for folder in folders.split(":") for p in Path(folder).glob("lib*-fi.so")]
    return {
        "openmp": native.openmp_runtimes(),
        "allocator": ", ".join(map(os.path.basename, replaced)) or " ".join(platform.libc_ver()),
        "providers": sorted(files) if folders else None,
    }


def _match(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1].strip() if found else ""


if __name__ == "__main__":
    main()
