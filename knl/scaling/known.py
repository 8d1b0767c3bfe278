"""What a prediction starts from: a recipe's work, and the speed of a node, given or measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from knl.config import Recipe
from knl.errors import InputError
from knl.profile import load_profile
from knl.scaling.layers import Layer, layers_of, parameters
from knl.scaling.overlap import Bucket, buckets_of
from knl.scaling.stragglers import assumed_sample
from knl.scaling.study import Point, Study, read_folder

# Images to train and to test on, pixels a side, planes, classes (ILSVRC 2012 for packed sets).
_SETS = {
    "packed": (1_281_167, 50_000, 224, 3, 1000),
    "fashion-mnist": (60_000, 10_000, 28, 1, 10),
    "digits": (1_437, 360, 8, 1, 10),
}
# Of step times of one node, where none were measured: a guess, and said to be one.
JITTER = 0.01
# Backward has two of the three products of each layer (knl.scaling.layers).
_BACKWARD = 2 / 3


@dataclass(frozen=True)
class Known:
    """The work of a recipe, and how fast one node does it.

    `image_s`: seconds of forward and backward of an image; `backward`: backward's share of them;
    `fixed_s`: seconds of a step whatever the batch (update, data, the rest); `sample`: seconds of
    measured steps, each the slowest of `sample_nodes`; `node_images`: images of a node in a step of
    the sample; `measured`: whether it is one. `train_images`, `test_images`: of the set;
    `source`: says where the speed is from.
    """

    recipe: Recipe
    layers: list[Layer]
    buckets: list[Bucket]
    image_s: float
    backward: float
    fixed_s: float
    sample: tuple[float, ...]
    sample_nodes: int
    node_images: int
    measured: bool
    train_images: int
    test_images: int
    source: str

    @property
    def gradient_bytes(self) -> int:
        return sum(bucket.size for bucket in self.buckets)


def from_speed(recipe: Recipe, images_per_s: float, source: str) -> Known:
    """Known by the images/s of one node, all of a step but the sums included."""
    layers, train_images, test_images = work_of(recipe)
    image_s = 1.0 / images_per_s
    images = recipe.train.lane_batch
    return Known(
        recipe=recipe,
        layers=layers,
        buckets=buckets_of(layers, recipe.comm),
        image_s=image_s,
        backward=_BACKWARD,
        fixed_s=0.0,
        sample=tuple(assumed_sample(image_s * images, JITTER)),
        sample_nodes=1,
        node_images=images,
        measured=False,
        train_images=train_images,
        test_images=test_images,
        source=source,
    )


def work_of(recipe: Recipe) -> tuple[list[Layer], int, int]:
    """Layers of the network, and images to train and to test on."""
    data = recipe.data
    default = (data.samples, max(1, data.samples // 10), 224, 3, data.classes)
    train_images, test_images, pixels, planes, classes = _SETS.get(data.name, default)
    layers = layers_of(recipe, data.crop or data.image_size or pixels, classes, planes)
    return layers, train_images, test_images


def from_profile(recipe: Recipe, path: Path) -> Known:
    """Known by a profile of knl tune. Raises InputError where it is of another network or empty."""
    profile = load_profile(path)
    if profile.model != recipe.model.name:
        raise InputError(
            f"profile {path}: was measured on {profile.model}, the recipe's model.name is "
            f"{recipe.model.name}; tune with knl tune --recipe {recipe.name}"
        )
    speeds = [trial.images_per_s for trial in profile.trials if trial.state == "complete"]
    best = profile.gain.best_images_per_s if profile.gain else max(speeds, default=0.0)
    if not 0 < best < float("inf"):
        raise InputError(f"profile {path}: has no images/s; write it anew with knl tune --out")
    source = f"{best:.4g} images/s of profile {path}, at {profile.images} images a step"
    return from_speed(recipe, best, source)


def from_study(recipe: Recipe, folder: Path) -> tuple[Known, Study]:
    """Known by a study, whose smallest point is the baseline. Raises InputError where the study is
    of another network, or has too little in it."""
    study = read_folder(folder)
    good = usable_points(study, folder)
    layers, train_images, test_images = work_of(recipe)
    if study.parameters and study.parameters != parameters(layers):
        raise InputError(
            f"study {folder}: has {study.parameters:,} parameters, {recipe.name} has "
            f"{parameters(layers):,}; name the recipe that was measured ({study.recipe})"
        )
    first = min(point.nodes for point in good)
    baseline = [point for point in good if point.nodes == first]
    parts = {name: median(_parts(p)[name] for p in baseline) for name in _parts(baseline[0])}
    images = baseline[0].global_batch // first
    compute = parts["compute"]
    if compute <= 0:
        raise InputError(
            f"study {folder}: compute = {compute:g} s at {first} nodes; measure it anew"
        )
    buckets = buckets_of(layers, recipe.comm)
    backward = _BACKWARD
    if study.forward_s > 0 and study.backward_s > 0:
        backward = study.backward_s / (study.forward_s + study.backward_s)
        measured = [Bucket(b.bytes, min(1.0, b.ready_s / study.backward_s)) for b in study.buckets]
        buckets = measured or buckets
    known = Known(
        recipe=recipe,
        layers=layers,
        buckets=buckets,
        image_s=compute / images,
        backward=backward,
        fixed_s=parts["lars"] + parts["data"] + parts["other"],
        sample=tuple(s for p in baseline if p.step_s for s in p.step_s.all),
        sample_nodes=first,
        node_images=images,
        measured=True,
        train_images=study.samples or train_images,
        test_images=test_images,
        source=f"{images / compute:.4g} images/s a node in study {folder}, at {first} node(s)",
    )
    if study.recipe_toml and recipe.data.name != "synthetic" and "synthetic" in study.recipe_toml:
        known = replace(known, train_images=train_images)
    return known, study


def usable_points(study: Study, folder: Path) -> list[Point]:
    """Points with numbers, of two numbers of nodes at least. Raises InputError where there are
    fewer, or where a point's parts do not add up to its step."""
    good = [point for point in study.points if point.failed is None]
    counts = sorted({point.nodes for point in good})
    if len(counts) < 2:
        raise InputError(
            f"study {folder}: {len(counts)} number(s) of nodes with results; a fit needs two or "
            "more: measure more with knl scale run, or give --node-images-per-s"
        )
    for point in good:
        whole, parts = point.step_s.median if point.step_s else 0.0, sum(_parts(point).values())
        if not 0.5 * whole <= parts <= 1.5 * whole:
            raise InputError(
                f"study {folder}: the point of {point.nodes} node(s), repetition "
                f"{point.repetition}: its parts are {parts:.4g} s, its step {whole:.4g} s; measure "
                "it anew with knl scale run"
            )
    return good


def _parts(point: Point) -> dict[str, float]:
    return point.breakdown or {}
