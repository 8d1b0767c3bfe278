"""`knl bench lars`: the update of a whole network beside torch's SGD and a LARS of torch calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from knl.bench.timing import in_turn, medians
from knl.config import Recipe
from knl.models import build_model
from knl.optim.lars import Lars

_ROUNDS = 25
# weight, gradient and momentum are read; weight and momentum are written
_PASSES = 5
# Larger than any cache of a node
_TRIAD_ELEMENTS = 1 << 26
_LR, _ETA = 1e-3, 1e-3


def bench_lars(recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Milliseconds of one update of the recipe's network, each rival on parameters of its own.

    `rounds`: measurements of each, 0 for the usual. `knl_summed` is given the squares of its
    gradients, as where the ranks of a node have just summed them. The limit is the time in which
    memory moves `_PASSES` times the parameters, at the rate of the triad a = b + s c (torch.add),
    measured in the same rounds and counted as STREAM does: two arrays read, one written.
    """
    model = build_model(recipe.model, 3, recipe.data.classes)
    named = [(name, p) for name, p in model.named_parameters()]
    numel = sum(p.numel() for _, p in named)
    torch.manual_seed(0)
    momentum, decay = recipe.optim.momentum, recipe.optim.weight_decay
    ours = _with_gradients(named)
    lars = Lars(
        list(zip((name for name, _ in named), ours)),
        form=recipe.optim.form,
        momentum=momentum,
        weight_decay=decay,
        eta=recipe.optim.eta,
        skip=recipe.optim.skip,
    )
    rivals: dict[str, Callable[[], object]] = {
        "knl": lambda: lars.step(_LR, 1.0),
        "knl_summed": _with_squares(lars),
        "torch_sgd": _sgd(named, momentum, decay),
        "per_tensor_lars": _per_tensor(_with_gradients(named), momentum, decay),
        "triad": _triad(),
    }
    why_not = ""
    try:
        rivals["torch_fused_sgd"] = _sgd(named, momentum, decay, fused=True)
    except (TypeError, RuntimeError) as error:
        why_not = f"torch {torch.__version__}: {str(error).splitlines()[0]}"
    seconds = in_turn(rivals, rounds or _ROUNDS)
    ms = {name: 1e3 * value for name, value in medians(seconds).items()}
    triad_gbs = 3 * 4 * _TRIAD_ELEMENTS / ms["triad"] / 1e6
    limit_ms = _PASSES * 4 * numel / triad_gbs / 1e6
    fused_ms = ms.get("torch_fused_sgd")
    return {
        "model": recipe.model.name,
        "tensors": len(named),
        "parameters": numel,
        "threads": torch.get_num_threads(),
        "rounds": rounds or _ROUNDS,
        "knl_ms": ms["knl"],
        "knl_summed_ms": ms["knl_summed"],
        "torch_fused_sgd_ms": fused_ms,
        "torch_fused_sgd_reason": why_not,
        "torch_sgd_ms": ms["torch_sgd"],
        "per_tensor_lars_ms": ms["per_tensor_lars"],
        "triad_gbs": triad_gbs,
        "limit_ms": limit_ms,
        "ratio_to_fused_sgd": ms["knl"] / fused_ms if fused_ms else None,
        "summed_ratio_to_fused_sgd": ms["knl_summed"] / fused_ms if fused_ms else None,
        "ratio_to_limit": ms["knl"] / limit_ms,
        "speedup_vs_per_tensor": ms["per_tensor_lars"] / ms["knl"],
    }


def describe(result: dict[str, Any]) -> str:
    """The result in lines for a reader."""
    fused = result["torch_fused_sgd_ms"]
    lines = [
        f"one update of {result['model']}: {result['tensors']} tensors, "
        f"{result['parameters']:,} parameters, {result['threads']} thread(s), medians of "
        f"{result['rounds']} rounds in turn",
        f"{'knl LARS':28} {result['knl_ms']:8.2f} ms",
        f"{'with the squares of a sum':28} {result['knl_summed_ms']:8.2f} ms",
        f"{'torch SGD, fused (no norms)':28} "
        + (f"{fused:8.2f} ms" if fused else f"none: {result['torch_fused_sgd_reason']}"),
        f"{'torch SGD (no norms)':28} {result['torch_sgd_ms']:8.2f} ms",
        f"{'LARS of torch calls':28} {result['per_tensor_lars_ms']:8.2f} ms",
        f"{'limit: ' + str(_PASSES) + ' passes over memory':28} {result['limit_ms']:8.2f} ms at "
        f"{result['triad_gbs']:.1f} GB/s (triad)",
        f"knl takes {result['ratio_to_limit']:.2f} of the limit, a LARS of torch calls "
        f"{result['speedup_vs_per_tensor']:.1f} times as long as knl",
    ]
    if fused:
        lines.append(
            f"and {result['ratio_to_fused_sgd']:.2f} of torch's fused SGD, "
            f"{result['summed_ratio_to_fused_sgd']:.2f} with the squares of a sum"
        )
    return "\n".join(lines)


def _with_gradients(named: list[tuple[str, torch.nn.Parameter]]) -> list[torch.nn.Parameter]:
    """Copies of the parameters, each with a gradient of its own."""
    copies = [copy.deepcopy(p) for _, p in named]
    for parameter in copies:
        parameter.grad = torch.randn_like(parameter)
    return copies


def _with_squares(lars: Lars) -> Callable[[], None]:
    """Updates of the same parameters with squares given: as many bytes, but for the second reading
    of gradients. They are spread evenly over the pieces of a tensor, which is as good here."""
    numbers = range(len(lars.parameters))
    gradients = [p.grad for p in lars.parameters]
    sums = [float(g.double().square().sum()) for g in gradients if g is not None]
    squares = np.repeat(np.array(sums) / lars.pieces, lars.pieces)
    return lambda: lars.update(numbers, gradients, _LR, 1.0, squares)


def _sgd(
    named: list[tuple[str, torch.nn.Parameter]], momentum: float, decay: float, **options: bool
) -> Callable[[], object]:
    return torch.optim.SGD(  # type: ignore[no-any-return]
        _with_gradients(named), lr=_LR, momentum=momentum, weight_decay=decay, **options
    ).step


def _per_tensor(
    parameters: list[torch.nn.Parameter], momentum: float, decay: float
) -> Callable[[], None]:
    """The torch form of LARS (knl.optim.lars) as a user would write it: calls for each tensor."""
    velocities = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step() -> None:
        for p, velocity in zip(parameters, velocities):
            gradient = p.grad
            assert gradient is not None  # given by _with_gradients
            if p.dim() > 1:
                w, g = p.norm(), gradient.norm()
                ratio = torch.where(
                    (w > 0) & (g > 0), _ETA * w / (g + decay * w), torch.ones_like(w)
                )
                gradient = gradient.add(p, alpha=decay).mul_(ratio)
            velocity.mul_(momentum).add_(gradient)
            p.add_(velocity, alpha=-_LR)

    return step


def _triad() -> Callable[[], object]:
    a, b, c = (torch.ones(_TRIAD_ELEMENTS) for _ in range(3))
    return lambda: torch.add(b, c, alpha=0.5, out=a)
