"""What trainings took in time and hardware, published ones beside one's own prediction; and the
operations of one, with the time that they would take at least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from knl.config import Recipe, nearest
from knl.errors import InputError
from knl.scaling.known import Known, work_of
from knl.scaling.layers import TRAINING_OVER_FORWARD, forward_flops
from knl.scaling.predict import WRITE_OFF_HOURS
from knl.scaling.published import PUBLISHED, Published

# USD of a node. A KNL 7250 and a DGX-1 of eight P100: prices of 2017 (You et al. 2017).
PRICES = {"KNL 7250": 2436.0, "P100": 129_000.0}
_HARDWARE = sorted({point.hardware for point in PUBLISHED})
# Single-precision operations/s of a fastest computer in 2017, as the paper argues with.
MACHINE_FLOPS = 2e17


def prices_with(changes: Sequence[str]) -> dict[str, float]:
    """Prices with `NAME=USD` put in. Raises InputError that names what is wrong."""
    prices = dict(PRICES)
    for change in changes:
        name, _, text = change.rpartition("=")
        if name not in _HARDWARE:
            raise InputError(
                f"--price {change}: must be NAME=USD, a node's{nearest(name, _HARDWARE)}; names: "
                f"{', '.join(_HARDWARE)}"
            )
        try:
            prices[name] = float(text)
        except ValueError:
            prices[name] = -1.0
        if not 0 < prices[name] < 1e9:
            raise InputError(f"--price {change}: USD must be a number above 0 and below 1e9")
    return prices


def published_systems(prices: Mapping[str, float]) -> list[dict[str, Any]]:
    """One row a published training. `hardware_usd`: of all nodes, None where no price is known."""
    return [_system(point, prices) for point in PUBLISHED]


def _system(point: Published, prices: Mapping[str, float]) -> dict[str, Any]:
    price = prices.get(point.hardware)
    whole = price * point.units / point.node_units if price else None
    return {
        "name": point.name,
        "source": point.source,
        "units": point.units,
        "hardware": point.hardware,
        "batch": point.batch,
        "epochs": point.epochs,
        "minutes": point.minutes,
        "top1": point.top1,
        "hardware_usd": whole,
        "cost_usd": whole * point.minutes / 60 / WRITE_OFF_HOURS if whole else None,
    }


def predicted_system(row: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """A row of knl scale predict as one of these. Its top-1 nobody knows before it was trained."""
    return {
        "name": f"{known.recipe.name}, {row['nodes']} nodes, predicted",
        "source": known.source,
        "units": row["nodes"],
        "hardware": "node",
        "batch": row["global_batch"],
        "epochs": known.recipe.train.epochs,
        "minutes": row["hours"] * 60,
        "top1": None,
        "hardware_usd": row["hardware_usd"],
        "cost_usd": row["cost_usd"],
    }


def budget(recipe: Recipe, machine_flops: float) -> dict[str, Any]:
    """Operations of a training, counted from the shapes of the network: two a multiplication with
    its addition, convolutions and fully connected layers alone."""
    layers, images, _ = work_of(recipe)
    forward = forward_flops(layers)
    passes = images * recipe.train.epochs
    training = forward * TRAINING_OVER_FORWARD * passes
    return {
        "recipe": recipe.name,
        "epochs": recipe.train.epochs,
        "images": images,
        "forward_flops_an_image": forward,
        "forward_flops": forward * passes,
        "training_flops": training,
        "machine_flops": machine_flops,
        "floor_s_forward": forward * passes / machine_flops,
        "floor_s": training / machine_flops,
    }


def describe(result: Mapping[str, Any]) -> str:
    """The table and the budget, for a reader."""
    lines = [
        f"{'training':42}{'batch':>7}{'epochs':>7}{'minutes':>9}{'top-1':>7}{'hardware USD':>14}"
        f"{'run USD':>9}"
    ]
    for row in result["systems"]:
        top1 = "-" if row["top1"] is None else f"{row['top1']:.1f}"
        usd = ["-" if row[k] is None else f"{row[k]:,.0f}" for k in ("hardware_usd", "cost_usd")]
        lines.append(
            f"{row['name']:42}{row['batch']:>7}{row['epochs']:>7g}{row['minutes']:>9.3g}{top1:>7}"
            f"{usd[0]:>14}{usd[1]:>9}"
        )
    need = result["budget"]
    lines += [
        "",
        f"{need['recipe']}: {need['epochs']:g} epochs of {need['images']:,} images, "
        f"{need['forward_flops_an_image'] / 1e9:.2f} Gflop an image forward: "
        f"{need['forward_flops']:.2g} operations forward, {need['training_flops']:.2g} with "
        "backward",
        f"at {need['machine_flops']:.1g} operations/s: {need['floor_s_forward']:.1f} s forward, "
        f"{need['floor_s']:.1f} s with backward, and no training can be faster there",
        "",
        f"run USD: the hardware's price over {WRITE_OFF_HOURS:,} hours of use, for the run's "
        "time. Prices: --price 'KNL 7250=2436' (a node), 'P100=129000' (eight, as a DGX-1).",
        "Where backward is left out, 90 epochs of ResNet-50 are the 10^18 operations and 5 s of "
        "the literature.",
    ]
    return "\n".join(lines)
