"""Which part of a picture is seen: the definitions, their distribution, and what it depends on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knl.config import Data
from knl.data.views import AREA, ASPECT, TrainViews, centre_crop

quick = settings(deadline=None, max_examples=100)
sides = st.integers(4, 3000)


def data(augment, **keys):
    return Data(**{"name": "packed", "image_size": 256, "crop": 224, "augment": augment, **keys})


def views(augment, count, height, width, seed=0, epoch=0, **keys):
    chosen = TrainViews(data(augment, **keys), seed, epoch, np.arange(count))
    return [chosen.at(i, height, width) for i in range(count)]


@quick
@given(
    st.sampled_from(["none", "crop-flip", "random-resized-crop"]),
    sides,
    sides,
    st.integers(0, 2**63 - 1),
)
def test_a_box_lies_within_its_picture(augment, height, width, seed):
    for view in views(augment, 8, height, width, seed):
        left, top, wide, tall = view.box
        assert left >= 0 and top >= 0 and wide > 0 and tall > 0
        assert left + wide <= width + 1e-9 and top + tall <= height + 1e-9


@quick
@given(
    st.integers(0, 2**63 - 1),
    st.integers(0, 1000),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=8, unique=True),
    st.randoms(use_true_random=False),
)
def test_a_view_depends_on_seed_epoch_and_sample_alone(seed, epoch, samples, random):
    together = TrainViews(data("random-resized-crop"), seed, epoch, np.array(samples))
    shuffled = random.sample(samples, len(samples))
    others = TrainViews(data("random-resized-crop"), seed, epoch, np.array(shuffled))
    for i, sample in enumerate(samples):
        view = together.at(i, 300, 400)
        assert view == others.at(shuffled.index(sample), 300, 400)
    later = TrainViews(data("random-resized-crop"), seed, epoch + 1, np.array(samples))
    assert [later.at(i, 300, 400) for i in range(len(samples))] != [
        together.at(i, 300, 400) for i in range(len(samples))
    ]


def uniform_enough(values):
    """Kolmogorov-Smirnov's distance of values in 0 to 1 from the uniform, at one in 10,000."""
    ordered = np.sort(values)
    grid = np.arange(1, len(ordered) + 1) / len(ordered)
    distance = np.max(np.abs(ordered - grid))
    return distance < 2.23 / math.sqrt(len(ordered)) + 1 / len(ordered)


def test_resized_crops_have_the_areas_aspects_and_places_of_the_definition():
    """In a picture so large that whole pixels do not matter, and with no try refused: areas small
    enough that all aspects fit; so area, log aspect and place must be uniform."""
    size = 100_000
    area, aspect, across, down, flips = [], [], [], [], []
    for view in views("random-resized-crop", 20_000, size, size):
        left, top, width, height = view.box
        area.append(width * height / size**2)
        aspect.append(width / height)
        across.append(left / (size - width + 1))
        down.append(top / (size - height + 1))
        flips.append(view.flip)
    area, aspect = np.array(area), np.array(aspect)
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    fits = area < 3 / 4  # every aspect from 3:4 to 4:3 fits below this
    assert area.min() >= AREA[0] - 1e-3 and area.max() <= AREA[1]
    assert uniform_enough((area[fits] - AREA[0]) / (3 / 4 - AREA[0]))
    assert uniform_enough((np.log(aspect[fits]) - low) / (high - low))
    assert uniform_enough(np.array(across)) and uniform_enough(np.array(down))
    assert abs(np.mean(flips) - 0.5) < 4 * 0.5 / math.sqrt(len(flips))


def reference_box(height, width, generator):
    """torchvision's get_params, written out anew with another source of random numbers."""
    for _ in range(10):
        target = height * width * generator.uniform(0.08, 1.0)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return generator.integers(0, width - w + 1), generator.integers(0, height - h + 1), w, h
    ratio = width / height
    w, h = width, height
    if ratio < 3 / 4:
        h = round(w / (3 / 4))
    elif ratio > 4 / 3:
        w = round(h * (4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (100, 1000)])
def test_resized_crops_are_distributed_as_torchvisions(height, width):
    """Also where tries are refused, and the middle is taken in the end: equal quantiles."""
    generator = np.random.default_rng(0)
    ours = np.array([v.box for v in views("random-resized-crop", 20_000, height, width)])
    theirs = np.array([reference_box(height, width, generator) for _ in range(20_000)])
    for column, extent in enumerate((width, height, width, height)):
        for share in (0.05, 0.25, 0.5, 0.75, 0.95):
            one, other = (np.quantile(boxes[:, column], share) for boxes in (ours, theirs))
            assert abs(one - other) <= 0.02 * extent + 1


def test_plain_crops_are_everywhere_alike_and_keep_their_size():
    boxes = np.array([view.box for view in views("crop-flip", 20_000, 256, 300)])
    assert set(boxes[:, 2]) == set(boxes[:, 3]) == {224.0}
    for column, places in ((0, 300 - 224 + 1), (1, 256 - 224 + 1)):
        values, counts = np.unique(boxes[:, column], return_counts=True)
        assert values.tolist() == list(range(places))
        expected = len(boxes) / places
        chi_squared = np.sum((counts - expected) ** 2 / expected)
        assert chi_squared < places - 1 + 4 * math.sqrt(2 * (places - 1))


def test_a_plain_crop_of_a_larger_picture_is_that_of_the_shrunk_one():
    small = views("crop-flip", 200, 256, 384)
    large = views("crop-flip", 200, 512, 768)
    for one, other in zip(small, large):
        assert other.box == tuple(2 * value for value in one.box) and one.flip == other.flip


def test_the_centre_is_the_middle_of_the_picture_at_its_stored_size():
    assert centre_crop(256, 256, data("none")) == (16, 16, 224, 224)
    assert centre_crop(512, 768, data("none")) == (160, 32, 448, 448)
    assert centre_crop(300, 300, data("none", image_size=300, crop=300)) == (0, 0, 300, 300)
