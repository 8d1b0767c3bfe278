"""What the compiled part makes of a picture, beside PIL's antialiased resize."""

from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from knl.data.picture import MEAN, SPREAD, decode, show, size_of
from knl.data.synth import make_picture
from knl.data.views import View

quick = settings(deadline=None, max_examples=60)


def shown(picture, box, size, flip=False, full=None):
    """The view in levels of 0 to 255."""
    height, width = full or picture.shape[:2]
    out = np.empty((size, size, 3), dtype=np.float32)
    show(picture, View(height, width, box, flip), out)
    return out * SPREAD + MEAN


def by_pil(picture, box, size):
    left, top, width, height = box
    part = Image.fromarray(picture).crop((left, top, left + width, top + height))
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR)).astype(np.float64)


def natural(height, width, seed=0):
    """Smooth structure, edges and some grain: as photographs, neither noise nor flat."""
    generator = np.random.default_rng(seed)
    cell = max(16, min(height, width) // 16)  # larger pictures show the same things larger
    coarse = generator.integers(0, 256, (height // cell + 2, width // cell + 2, 3)).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = generator.normal(0, 6, (height, width, 1))
    picture = np.asarray(smooth).astype(np.float64) + grain
    picture[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 60)
    return picture.clip(0, 255).astype(np.uint8)


@quick
@given(st.integers(5, 300), st.integers(5, 300), st.integers(4, 120), st.randoms(), st.booleans())
def test_any_box_is_within_a_level_of_pils_antialiased_resize(height, width, size, random, flip):
    picture = natural(height, width)
    wide, tall = random.randint(1, width), random.randint(1, height)
    box = (random.randint(0, width - wide), random.randint(0, height - tall), wide, tall)
    ours, theirs = shown(picture, box, size, flip), by_pil(picture, box, size)
    difference = np.abs(ours[:, ::-1] if flip else ours) - theirs
    assert np.abs(difference).mean() <= 0.5 and np.abs(difference).max() <= 1.5


def test_a_crop_of_the_size_wanted_is_the_picture_itself():
    picture = natural(256, 256)
    np.testing.assert_allclose(
        shown(picture, (10, 20, 224, 224), 224), picture[20:244, 10:234], atol=1e-3
    )


def test_fractions_of_pixels_count():
    """A ramp: moving the box by half a pixel moves every level by half a step."""
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 100, axis=0)
    picture = np.repeat(ramp, 3, axis=2)
    one, other = (shown(np.ascontiguousarray(picture), (x, 20, 40, 40), 40) for x in (30, 30.5))
    np.testing.assert_allclose((other - one)[:, 2:-2], 1.0, atol=1e-3)


@pytest.mark.parametrize("box", [(0, 0, 2000, 1500), (300, 200, 1400, 1000), (0, 0, 500, 1500)])
def test_a_large_picture_decoded_smaller_is_within_a_level_of_all_of_it(box):
    picture = natural(1500, 2000)
    data = simplejpeg.encode_jpeg(picture, quality=90, colorsubsampling="420")
    view = View(1500, 2000, box)
    assert size_of(data) == (1500, 2000)
    for size in (64, 112, 224):
        decoded = decode(data, view, size)
        ours = shown(decoded, box, size, full=(1500, 2000))
        theirs = by_pil(np.asarray(Image.open(io.BytesIO(data))), box, size)
        assert np.abs(ours - theirs).mean() <= 1.0
    assert decode(data, view, 64).shape[0] < 1500


def test_a_picture_is_not_decoded_smaller_than_twice_what_is_wanted():
    data = simplejpeg.encode_jpeg(natural(600, 600), quality=90)
    for size, side in ((300, 600), (150, 300), (151, 600), (75, 150), (37, 75)):
        assert decode(data, View(600, 600, (0, 0, 600, 600)), size).shape == (side, side, 3)


def test_normalised_pictures_have_imagenets_mean_and_spread():
    grey = np.broadcast_to(MEAN.round().astype(np.uint8), (8, 8, 3)).copy()
    out = np.empty((8, 8, 3), dtype=np.float32)
    show(grey, View(8, 8, (0, 0, 8, 8)), out)
    assert np.abs(out).max() <= 0.5 / SPREAD.min()


def test_made_pictures_are_of_their_class_at_any_size():
    one, other = make_picture(3, 5, (40, 60)), make_picture(3, 5, (40, 60))
    assert one.shape == (40, 60, 3)
    np.testing.assert_array_equal(one, other)
    assert (make_picture(4, 5, (40, 60)) != one).any()
