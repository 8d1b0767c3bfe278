"""The object of `knl scale predict`: rows, sums, assumptions; as a table for a reader."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knl.config import Recipe
from knl.errors import InputError
from knl.scaling import allreduce
from knl.scaling.fit import NAMES, Fit, fit_sync, spread_of
from knl.scaling.known import JITTER, Known, from_profile, from_speed, from_study, usable_points
from knl.scaling.model import (
    Scaling,
    Setting,
    Sync,
    bounds,
    scaled_network,
    step_of,
    training_hours,
)
from knl.scaling.stragglers import interval
from knl.scaling.study import Study
from knl.site import Network, Queue, Site, load_site

# A price is written off over four years of use all around the clock.
WRITE_OFF_HOURS = 4 * 8760
# Ranks of one machine: where a fit starts.
_NO_NETWORK = Network(
    latency_us=10.0, node_gb_s=5.0, rank_gb_s=5.0, leaf_nodes=1_000_000, leaf_uplinks=1_000_000
)


@dataclass(frozen=True)
class Prediction:
    """What a prediction is made with. `fit`, `study`: where it starts from a study."""

    known: Known
    setting: Setting
    sync: Sync
    site: Site | None
    fit: Fit | None = None
    study: Study | None = None


def prepare(
    recipe: Recipe,
    source: Path | None,
    images_per_s: float | None,
    site_name: str | None,
    ranks_per_node: int | None,
    scaling: Scaling | None,
) -> Prediction:
    """Read what is known. Raises InputError where it is too little, or too much."""
    if (source is None) == (images_per_s is None):
        raise InputError(
            "how fast is one node? give --node-images-per-s N, or --from with a study's folder or "
            "a profile of knl tune"
        )
    if images_per_s is not None and not 0 < images_per_s < 1e9:
        raise InputError(f"--node-images-per-s {images_per_s:g}: must be above 0 and below 1e9")
    study: Study | None = None
    if images_per_s is not None:
        known = from_speed(recipe, images_per_s, f"{images_per_s:g} images/s a node, as given")
    elif source is not None and source.is_file():
        known = from_profile(recipe, source)
    else:
        assert source is not None
        known, study = from_study(recipe, source)
    name = site_name or (study.site if study else None)
    site = load_site(name) if name else None
    if site is None and study is None:
        raise InputError("whose network? give --site, such as --site stampede2")
    if site is not None and site.network is None:
        raise InputError(f"site {site.name}: has no [network]; add it to a copy of its TOML file")
    network = site.network if site and site.network else _NO_NETWORK
    ranks = ranks_per_node or (study.points[0].ranks_per_node if study else 0)
    ranks = ranks or (site.ranks_per_node if site else 1)
    setting = Setting(network, ranks, scaling or (study.scaling if study else "weak"))
    if study is None or source is None:
        return Prediction(known, setting, Sync(), site)
    fitted_at = Setting(network, study.points[0].ranks_per_node, study.scaling)
    fit = fit_sync(known, fitted_at, usable_points(study, source), site is not None)
    return Prediction(known, setting, fit.sync, site, fit, study)


def to_json(made: Prediction, nodes: tuple[int, ...]) -> dict[str, Any]:
    """The object that --json prints; its keys are a contract."""
    single = step_of(made.known, made.setting, made.sync, 1).images_per_s
    rows = [_row(made, count, single) for count in nodes]
    result: dict[str, Any] = {
        "recipe": made.known.recipe.name,
        "site": made.site.name if made.site else None,
        "scaling": made.setting.scaling,
        "ranks_per_node": made.setting.ranks_per_node,
        "rows": rows,
        "allreduce": [sums for count in nodes for sums in _sums(made, count)],
        "assumptions": _assumptions(made, max(nodes)),
    }
    if made.fit:
        result["fit"] = _fit(made.fit, made.setting.network)
    return result


def _row(made: Prediction, nodes: int, single: float) -> dict[str, Any]:
    step = step_of(made.known, made.setting, made.sync, nodes)
    if made.fit:
        fast, slow = spread_of(made.known, made.setting, made.fit, nodes)
    else:
        (quick, quick_sync), (late, late_sync) = bounds(made.setting, made.sync)
        fast = step_of(made.known, quick, quick_sync, nodes)
        slow = step_of(made.known, late, late_sync, nodes)
    queue = _queue(made.site, nodes)
    row: dict[str, Any] = {
        "nodes": nodes,
        "global_batch": step.global_batch,
        "node_images": step.node_images,
        "compute_s": step.compute_s,
        "fixed_s": step.fixed_s,
        "allreduce_s": step.allreduce_s,
        "exposed_s": step.exposed_s,
        "straggler_s": step.straggler_s,
        "step_s": step.step_s,
        "step_s_low": min(fast.step_s, step.step_s),
        "step_s_high": max(slow.step_s, step.step_s),
        "images_per_s": step.images_per_s,
        "efficiency": step.images_per_s / (nodes * single),
        "efficiency_low": min(slow.images_per_s, step.images_per_s) / (nodes * single),
        "efficiency_high": max(fast.images_per_s, step.images_per_s) / (nodes * single),
    }
    hours = training_hours(made.known, step)
    low = min(hours, training_hours(made.known, fast))
    high = max(hours, training_hours(made.known, slow))
    scales = {
        "hours": 1.0,
        "node_hours": float(nodes),
        "su": nodes * queue.su if queue else None,
        "energy_kwh": nodes * queue.watts / 1000 if queue and queue.watts else None,
        "cost_usd": nodes * queue.usd / WRITE_OFF_HOURS if queue and queue.usd else None,
    }
    for key, scale in scales.items():
        for suffix, time in (("", hours), ("_low", low), ("_high", high)):
            row[f"{key}{suffix}"] = None if scale is None else time * scale
    row["hardware_usd"] = nodes * queue.usd if queue and queue.usd else None
    row["queue"] = queue.name if queue else None
    return row


def _sums(made: Prediction, nodes: int) -> list[dict[str, Any]]:
    """Of the whole gradient and of its largest bucket, by each algorithm; the best is named."""
    ranks = made.setting.ranks_per_node
    net = scaled_network(made.setting.network, made.sync.latency, made.sync.bandwidth)
    crowd = 1.0 + made.sync.contention * math.log2(nodes)
    sizes = {made.known.gradient_bytes, max(bucket.size for bucket in made.known.buckets)}
    found = []
    for size in sorted(sizes):
        best = allreduce.best(size, nodes, ranks, net)[0] if nodes * ranks > 1 else None
        for name in allreduce.ALGORITHMS:
            time = allreduce.seconds(name, size, nodes, ranks, net) * crowd
            found.append(
                {"nodes": nodes, "bytes": size, "algorithm": name, "seconds": time}
                | {"best": name == best}
            )
    return found


def _queue(site: Site | None, nodes: int) -> Queue | None:
    """The first that takes so many nodes; else the widest, whose rates then stand for more."""
    if site is None or not site.queues:
        return None
    fits = [queue for queue in site.queues if queue.nodes >= nodes]
    return fits[0] if fits else max(site.queues, key=lambda queue: queue.nodes)


def _fit(fit: Fit, net: Network) -> dict[str, Any]:
    site = {"latency": net.latency_us, "bandwidth": net.node_gb_s}
    keys = {"latency": "latency_us", "bandwidth": "node_gb_s"}
    result: dict[str, Any] = {"points": fit.points, "residual": fit.residual}
    for name in NAMES:
        value, low, high = (number * site.get(name, 1.0) for number in fit.interval(name))
        result[keys.get(name, name)] = {"value": value, "low": low, "high": high}
    return result


def _assumptions(made: Prediction, most: int) -> dict[str, str]:
    known, recipe = made.known, made.known.recipe
    net, ranks = made.setting.network, made.setting.ranks_per_node
    lanes, lane_batch = recipe.train.lanes, recipe.train.lane_batch
    found = {
        "speed": f"{known.source}; the same at any number of images a node",
        "data": "images are there when a step wants them, but for the wait that was measured"
        if known.measured
        else "images are there when a step wants them; the update of the weights is in the speed",
        "network": f"{net.latency_us:g} us, {net.node_gb_s:g} GB/s a node, {net.rank_gb_s:g} GB/s "
        f"a rank, {ranks} rank(s) a node, leaves of {net.leaf_nodes} nodes with "
        f"{net.leaf_uplinks} links up; no other jobs on it",
        "sums": "the fastest algorithm for each bucket; additions cost nothing; buckets one after "
        "another, behind backward, which they do not slow down",
        "training": f"{recipe.train.epochs:g} epochs of {known.train_images:,} images, evaluations "
        f"of {known.test_images:,}; without the start, checkpoints and the queue",
        "cost": f"cost_usd: the price of the nodes over {WRITE_OFF_HOURS:,} hours of use, for the "
        "run's hours; hardware_usd: their whole price; energy_kwh: the processors' thermal design "
        "power; without memory, network, cooling, staff",
    }
    if known.measured:
        low, high = interval(known.sample, max(1.0, most / known.sample_nodes))
        found["stragglers"] = (
            f"the expected slowest of {most} nodes, from {len(known.sample)} measured steps with "
            f"an exponential tail: {low * 1e3:.3g} to {high * 1e3:.3g} ms (90 %)"
        )
    else:
        found["stragglers"] = (
            f"not measured: step times of a node are taken to scatter by {JITTER:.0%} (normal)"
        )
    if most > lanes and recipe.data.name != "synthetic":
        found["lanes"] = (
            f"beyond {lanes} nodes lanes become smaller and keep the global batch of "
            f"{lanes * lane_batch:,}: {math.ceil(lanes * lane_batch / most)} images a node on "
            f"{most}, which changes the BatchNorm groups and so the trajectory"
        )
    if made.fit:
        found["interval"] = "90 % of what the fit leaves open; stragglers half to one and a half"
    else:
        found["interval"] = (
            "no statistics, and the speed of a node is taken as it is. Low: a node's whole "
            "bandwidth, no stragglers. High: half the bandwidth, twice the latency, sums only "
            "after backward, twice the stragglers"
        )
    if made.site and most > max((queue.nodes for queue in made.site.queues), default=most):
        found["queue"] = f"no queue of {made.site.name} takes {most} nodes: rates of its widest"
    return found


def describe(result: dict[str, Any]) -> str:
    """The table and the assumptions, for a reader."""
    lines = [
        f"{result['recipe']} on {result['site'] or 'this machine'}, {result['scaling']} scaling",
        f"{'nodes':>6}{'batch':>7}{'compute':>9}{'sync':>8}{'exposed':>9}{'slowest':>9}"
        f"{'step ms':>9}{'(low to high)':>17}{'images/s':>10}{'effic.':>8}"
        f"{'hours':>10}{'node-h':>9}{'SU':>8}{'kWh':>8}{'USD':>9}",
    ]
    for row in result["rows"]:
        ms = {key: f"{row[key] * 1e3:.1f}" for key in row if key.endswith("_s") or "step_s" in key}
        span = f"({ms['step_s_low']} to {ms['step_s_high']})"
        money = [
            "-" if row[key] is None else f"{row[key]:,.0f}"
            for key in ("su", "energy_kwh", "cost_usd")
        ]
        lines.append(
            f"{row['nodes']:>6}{row['global_batch']:>7}{ms['compute_s']:>9}{ms['allreduce_s']:>8}"
            f"{ms['exposed_s']:>9}{ms['straggler_s']:>9}{ms['step_s']:>9}{span:>17}"
            f"{row['images_per_s']:>10,.0f}{row['efficiency']:>8.1%}{row['hours']:>10.3g}"
            f"{row['node_hours']:>9,.0f}{money[0]:>8}{money[1]:>8}{money[2]:>9}"
        )
    if "fit" in result:
        fit = result["fit"]
        shown = [
            f"{key} {fit[key]['value']:.3g} ({fit[key]['low']:.3g} to {fit[key]['high']:.3g})"
            for key in ("latency_us", "node_gb_s", "contention", "slowdown")
        ]
        lines += ["", f"fitted to {fit['points']} points, 90 %: " + ", ".join(shown)]
    lines += ["", *(f"{word}: {text}" for word, text in result["assumptions"].items())]
    return "\n".join(lines)
