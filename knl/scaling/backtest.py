"""The model against published results, and its allreduce against SimGrid's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from msgspec import structs

from knl.config import Recipe, load_recipe
from knl.errors import FailedError
from knl.scaling import allreduce
from knl.scaling.known import from_speed
from knl.scaling.model import Setting, Sync, bounds, step_of, training_hours
from knl.scaling.published import KNL_RESNET, PUBLISHED, Published
from knl.scaling.smpi import SELECTORS, compile_allreduce, require_smpi, simulate
from knl.site import Network, Site, load_site

# The Omni-Path of all of them: 100 Gb/s. Stampede2's tree stands for the others', not published.
_SITE = "stampede2"
_RECIPES = {"resnet50": "resnet50-32k", "alexnet": "alexnet-bn-32k"}
# Nothing in the sources says that sums went on behind backward.
_SYNC = Sync(overlap=False)
SIMULATED_NODES = (8, 16, 32, 64, 128)
SIMULATED_BYTES = (1_048_576, 16_777_216)
ASSUMPTIONS = {
    "network": f"the site {_SITE}, one rank a node, for all: their own trees are not published",
    "overlap": "none: sums begin after backward; the low bound has sums behind backward",
    "speed": "79 (ResNet-50) and 640 (AlexNet) images/s of a KNL at large batches, whatever the "
    "images a node; where none is published, the speed that the model needs for the published time",
    "rest": "evaluation after each epoch; no start, no reading of images, no scatter but 1 %",
}


def recipe_of(point: Published) -> Recipe:
    """Of knl's recipes, the one for that network, with the width and the length of the source."""
    settings = (
        f"train.lanes={point.nodes}",
        f"train.lane_batch={max(1, round(point.batch / point.nodes))}",
        f"train.epochs={point.epochs}",
    )
    return load_recipe(_RECIPES[point.net], settings)


def minutes(point: Published, speed: float, setting: Setting, sync: Sync) -> float:
    """That the model has for a published training. `speed`: images/s of a node."""
    known = from_speed(recipe_of(point), speed, "published")
    return 60 * training_hours(known, step_of(known, setting, sync, point.nodes))


def needed_speed(point: Published, setting: Setting) -> float:
    """Images/s of a node with which the model comes to the published time, by bisection; 0 where
    the sums alone take longer."""
    low, high = 1.0, 1e5
    if minutes(point, high, setting, _SYNC) > point.minutes:
        return 0.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (
            (low, middle)
            if minutes(point, middle, setting, _SYNC) < point.minutes
            else (
                middle,
                high,
            )
        )
    return high


def published_rows() -> list[dict[str, Any]]:
    """One row a published training on CPUs: minutes, the model's, its error, and why."""
    setting = Setting(_network(load_site(_SITE)))
    rows = []
    for point in PUBLISHED:
        if not point.cpu:
            continue
        row: dict[str, Any] = {
            "name": point.name,
            "source": point.source,
            "nodes": point.nodes,
            "node_images": point.batch / point.nodes,
            "published_minutes": point.minutes,
            "node_images_per_s": point.node_speed or None,
            "needed_images_per_s": needed_speed(point, setting),
            "predicted_minutes": None,
            "low_minutes": None,
            "high_minutes": None,
            "error": None,
            "why": point.why,
        }
        if point.node_speed:
            (quick, _), (late, late_sync) = bounds(setting, _SYNC)
            predicted = minutes(point, point.node_speed, setting, _SYNC)
            row["predicted_minutes"] = predicted
            row["low_minutes"] = minutes(point, point.node_speed, quick, Sync())
            row["high_minutes"] = minutes(point, point.node_speed, late, late_sync)
            row["error"] = predicted / point.minutes - 1
        rows.append(row)
    return rows


def claims() -> list[dict[str, Any]]:
    """Published efficiencies between two numbers of nodes, and the model's."""
    setting = Setting(_network(load_site(_SITE)))
    recipe = load_recipe("resnet50-32k")
    knl = from_speed(recipe, KNL_RESNET, "published")
    speeds = [step_of(knl, setting, _SYNC, nodes).images_per_s / nodes for nodes in (512, 2048)]
    surf = next(point for point in PUBLISHED if "SURFsara" in point.name)
    wide = load_recipe("resnet50-32k", ("train.lanes=1024", "train.lane_batch=32"))
    skx = from_speed(wide, needed_speed(surf, setting), "needed")
    ends = [step_of(skx, setting, _SYNC, nodes).images_per_s / nodes for nodes in (1, 1024)]
    return [
        {
            "claim": "Nurion, 512 to 2048 KNL, batch 32,768",
            "published": 0.65,
            "predicted": speeds[1] / speeds[0],
            "why": "from 64 to 16 images a node the node itself becomes slower, which the model "
            "does not know unless it is told",
        },
        {
            "claim": "SURFsara, 1 to 1024 SKX nodes, 32 images a node",
            "published": 0.90,
            "predicted": ends[1] / ends[0],
            "why": "published as more than 90 %; the node's speed is the one that the model needs "
            "for SURFsara's hour on 448 nodes, so this is no independent test",
        },
    ]


def smpi_rows(
    nodes: tuple[int, ...] = SIMULATED_NODES, sizes: tuple[int, ...] = SIMULATED_BYTES
) -> list[dict[str, Any]]:
    """The model's allreduce beside a simulated one on the site's tree, one rank a node. Raises
    InputError where SimGrid is not there, FailedError where it fails."""
    require_smpi()
    network = _network(load_site(_SITE))
    # SimGrid's fat trees have links of one speed: a rank fills its node's.
    network = structs.replace(network, rank_gb_s=network.node_gb_s)
    with tempfile.TemporaryDirectory(prefix="knl-smpi-") as folder:
        program = compile_allreduce(Path(folder))
        return [
            _compare(program, algorithm, count, size, network)
            for algorithm in SELECTORS
            for count in nodes
            for size in sizes
        ]


def _compare(program: Path, algorithm: str, nodes: int, size: int, net: Network) -> dict[str, Any]:
    simulated = simulate(program, algorithm, size, nodes, net)
    predicted = allreduce.seconds(algorithm, size, nodes, 1, net)
    return {
        "algorithm": algorithm,
        "nodes": nodes,
        "bytes": size,
        "simulated_s": simulated,
        "predicted_s": predicted,
        "error": predicted / simulated - 1,
    }


def _network(site: Site) -> Network:
    if site.network is None:
        raise FailedError(f"site {site.name}: has no [network]; install knl again")
    return site.network


def describe(result: dict[str, Any]) -> str:
    """The tables, for a reader."""
    lines = [
        f"{'published':38}{'nodes':>6}{'a node':>7}{'minutes':>9}{'model':>7}{'(low to high)':>16}"
        f"{'error':>7}{'images/s given, needed':>24}"
    ]
    for row in result["published"]:
        model, span, error = "-", "", "-"
        if row["error"] is not None:
            model, error = f"{row['predicted_minutes']:.1f}", f"{row['error']:+.0%}"
            span = f"({row['low_minutes']:.1f} to {row['high_minutes']:.1f})"
        given = f"{row['node_images_per_s'] or '-'}, {row['needed_images_per_s']:.0f}"
        lines.append(
            f"{row['name']:38}{row['nodes']:>6}{row['node_images']:>7.0f}"
            f"{row['published_minutes']:>9g}{model:>7}{span:>16}{error:>7}{given:>24}"
        )
    lines += ["", f"{'efficiency':52}{'published':>10}{'model':>8}"]
    for row in result["efficiency"]:
        lines.append(f"{row['claim']:52}{row['published']:>10.0%}{row['predicted']:>8.0%}")
    if "smpi" in result:
        lines += [
            "",
            f"{'allreduce':18}{'nodes':>6}{'bytes':>12}{'SMPI ms':>10}{'model ms':>10}{'error':>7}",
        ]
        lines += [
            f"{row['algorithm']:18}{row['nodes']:>6}{row['bytes']:>12}"
            f"{row['simulated_s'] * 1e3:>10.3f}{row['predicted_s'] * 1e3:>10.3f}"
            f"{row['error']:>+7.1%}"
            for row in result["smpi"]
        ]
    lines += ["", "where the model is wrong, and why:"]
    lines += [f"{row['name']}: {row['why']}" for row in result["published"] if row["why"]]
    lines += [f"{row['claim']}: {row['why']}" for row in result["efficiency"]]
    lines += ["", *(f"{word}: {text}" for word, text in result["assumptions"].items())]
    return "\n".join(lines)
