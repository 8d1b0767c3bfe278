"""The ranks of `knl bench sync`: backward and sync of one network under several layers, in turn.

`python -m knl.bench.sync_ranks WANTED`, as one of several MPI ranks. WANTED is JSON: {"recipe",
"images": of a rank, "pixels": a side or 0, "rounds", "what": "step" or "overlap"}. Rank 0 tells
{"seconds": {rival: of forward, backward and sync, a sample a round}, "versions": {rival: ...}}, or
{"compute_s", "comm_s", "step_s"} of a backward that only sleeps.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from knl.bench.ranks import as_rank
from knl.comm.bootstrap import MpiBootstrap, open_bootstrap
from knl.comm.collectives import Ranks, open_ranks
from knl.comm.gradient_sync import GradientSync
from knl.comm.world import world_from
from knl.config import Recipe, load_recipe
from knl.errors import FailedError
from knl.models import build_model
from knl.train.forward import to_layout
from knl.train.job import bucket_mb_of_plan

_LIMIT_S = 60.0
_MB = 1 << 20
_WARMUP = 2
# A backward of so many layers, each of which sleeps and then has so many bytes of gradient. The
# sum of the last one finds nothing to hide behind: a sixteenth of all.
_LAYERS, _LAYER_BYTES = 16, 8 << 20
_TOLERANCE = 1e-3


def _measure(wanted: dict[str, Any]) -> dict[str, Any] | None:
    world = world_from(os.environ)
    bootstrap = open_bootstrap(world)
    assert isinstance(bootstrap, MpiBootstrap)  # knl bench starts MPI ranks
    ranks = open_ranks(world, bootstrap, "oneccl", _LIMIT_S, shared=False)
    work = _overlap if wanted["what"] == "overlap" else _step
    told = work(wanted, ranks, bootstrap)
    ranks.collectives.close()
    return told if world.rank == 0 else None


def _step(wanted: dict[str, Any], ranks: Ranks, bootstrap: MpiBootstrap) -> dict[str, Any]:
    # gloo is what DistributedDataParallel takes on CPUs; its group lives beside oneCCL.
    gloo = open_ranks(ranks.world, bootstrap, "gloo", _LIMIT_S, shared=False)
    shared = open_ranks(ranks.world, bootstrap, "oneccl", _LIMIT_S)
    layout = os.environ.get("KNL_LAYOUT", "channels_last")
    seconds = _in_turn(wanted, {"knl": shared, "knl-oneccl": ranks}, layout, bootstrap.comm)
    shared.collectives.close()
    gc.collect()  # DDP must be gone before its process group
    gloo.collectives.close()
    versions = {
        "knl": shared.describe(),
        "knl-oneccl": ranks.describe(),
        "ddp-gloo": f"torch {torch.__version__}",
    }
    missing = {
        f"ddp-{name}": f"this torch has no backend {name}"
        for name in ("mpi", "ccl")
        if not getattr(torch.distributed, f"is_{name}_available", lambda: False)()
    }
    return {"seconds": seconds, "versions": versions, "layout": layout, "missing": missing}


def _in_turn(
    wanted: dict[str, Any], layers: dict[str, Ranks], layout: str, comm: Any
) -> dict[str, list[float]]:
    """Seconds of the slowest rank, of each layer in turn; all must come to the same gradients."""
    world = next(iter(layers.values())).world
    recipe = load_recipe(wanted["recipe"])
    images = torch.rand(wanted["images"], 3, wanted["pixels"], wanted["pixels"])
    labels = torch.arange(wanted["images"]) % recipe.data.classes
    images = images.add_(world.rank)  # ranks see different pictures
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    loss = nn.CrossEntropyLoss()
    models = {name: _model(recipe, layout) for name in layers}
    other = _model(recipe, layout)
    ddp = nn.parallel.DistributedDataParallel(other)

    def by(ranks: Ranks, model: nn.Module) -> Callable[[], None]:
        sync = GradientSync(
            list(model.named_parameters()),
            ranks,
            bucket_bytes=int(bucket_mb_of_plan() * _MB),
            first_bucket_bytes=_MB,
            timeout=_LIMIT_S,
        )

        def ours() -> None:
            sync.zero()
            sync.arm()
            loss(model(images), labels).backward()
            sync.finish()

        return ours

    def theirs() -> None:
        for parameter in other.parameters():
            parameter.grad = None
        loss(ddp(images), labels).backward()

    rivals = {name: by(ranks, models[name]) for name, ranks in layers.items()}
    rivals["ddp-gloo"] = theirs
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(_WARMUP + wanted["rounds"]):
        for name, rival in rivals.items():
            comm.Barrier()
            began = time.perf_counter()
            rival()
            taken = max(comm.allgather(time.perf_counter() - began))
            if number >= _WARMUP:
                seconds[name].append(taken)
        if number == 0:
            for model in models.values():
                _require_alike(model, other, world.size)
    return seconds


def _model(recipe: Recipe, layout: str) -> nn.Module:
    torch.manual_seed(recipe.train.seed)
    return to_layout(build_model(recipe.model, 3, recipe.data.classes), layout)


def _require_alike(ours: nn.Module, theirs: nn.Module, size: int) -> None:
    """Both layers saw the same data, so our sums are DDP's means times the ranks."""
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert mine.grad is not None and other.grad is not None
        difference = (mine.grad - other.grad * size).norm() / other.grad.norm().clamp(min=1e-6)
        if float(difference) > _TOLERANCE * size:
            raise FailedError(f"{name}: the gradients under knl and DDP differ by {difference:.1e}")


class Sleep(torch.autograd.Function):
    """Passes its input on; its backward sleeps, and so stands for a layer's computing. The weight's
    gradient is left as it lies in the bucket, so that it costs nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, seconds: float) -> torch.Tensor:
        """`seconds`: that backward will take."""
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient as it came, later."""
        time.sleep(ctx.seconds)
        return gradients[0], None, None


class SleepingLayers(nn.Module):
    """Layers whose backward sleeps `seconds` each, before the gradient of their weight comes."""

    def __init__(self, layers: int, elements: int, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(elements)) for _ in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: any tensor that wants a gradient."""
        for weight in self.weights:
            x = Sleep.apply(x, weight, self.seconds)
        return x


def _overlap(wanted: dict[str, Any], ranks: Ranks, bootstrap: MpiBootstrap) -> dict[str, Any]:
    """Seconds of communication alone, of the sleeps alone, and of both together."""
    buffers = [torch.ones(_LAYER_BYTES // 4) for _ in range(_LAYERS)]

    def communicate() -> None:
        for handle in [ranks.collectives.allreduce(buffer) for buffer in buffers]:
            handle.wait(_LIMIT_S)

    def slept(action: Callable[[], None]) -> float:
        times = []
        for _ in range(_WARMUP + wanted["rounds"]):
            bootstrap.comm.Barrier()
            began = time.perf_counter()
            action()
            times.append(max(bootstrap.comm.allgather(time.perf_counter() - began)))
        return median(times[_WARMUP:])

    comm_s = slept(communicate)
    model = SleepingLayers(_LAYERS, _LAYER_BYTES // 4, comm_s / _LAYERS)
    sync = GradientSync(
        list(model.named_parameters()),
        ranks,
        bucket_bytes=_LAYER_BYTES,
        first_bucket_bytes=_LAYER_BYTES,
        timeout=_LIMIT_S,
    )
    x = torch.zeros((), requires_grad=True)

    def backward() -> None:
        model(x).backward()

    def step() -> None:
        sync.arm()
        backward()
        sync.finish()

    return {"compute_s": slept(backward), "comm_s": comm_s, "step_s": slept(step)}


if __name__ == "__main__":
    as_rank(_measure)
