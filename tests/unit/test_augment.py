"""Random crops and flips: a function of (seed, epoch, sample), evenly spread."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knl.data.augment import centre_crop, crop_flip

quick = settings(deadline=None, max_examples=60)


def numbered(count, height=9, width=9, channels=2):
    """Pictures whose pixels tell picture, channel, row and column."""
    shape = (count, channels, height, width)
    return np.arange(np.prod(shape), dtype=np.int64).reshape(shape)


def found(view, picture):
    """Top, left and whether mirrored: where in `picture` a view was taken."""
    width, stored = view.shape[-1], picture.shape[-1]
    flipped = view[0, 0, 0] > view[0, 0, -1]
    corner = view[0, 0, -1 if flipped else 0] - picture[0, 0, 0]
    top, left = divmod(int(corner), stored)
    cut = picture[:, top : top + width, left : left + width]
    np.testing.assert_array_equal(view, cut[:, :, ::-1] if flipped else cut)
    return top, left, bool(flipped)


@quick
@given(
    st.integers(0, 2**63 - 1),
    st.integers(0, 1000),
    st.integers(2, 9),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=8, unique=True),
    st.randoms(use_true_random=False),
)
def test_a_view_depends_on_seed_epoch_and_sample_alone(seed, epoch, crop, samples, random):
    images, samples = numbered(len(samples)), np.array(samples)
    views = crop_flip(images, crop, seed, epoch, samples)
    assert views.shape == (len(samples), 2, crop, crop) and views.dtype == images.dtype
    order = list(range(len(samples)))
    random.shuffle(order)
    np.testing.assert_array_equal(
        crop_flip(images[order], crop, seed, epoch, samples[order]), views[order]
    )
    for i in range(len(samples)):
        alone = crop_flip(images[i : i + 1], crop, seed, epoch, samples[i : i + 1])
        np.testing.assert_array_equal(alone[0], views[i])
        found(views[i], images[i])


@pytest.mark.parametrize("what", ["seed", "epoch", "sample"])
def test_place_and_mirror_image_change_with(what):
    image, places = numbered(1, 40, 40), []
    for number in range(60):
        key = {"seed": 1, "epoch": 2, "sample": 3, what: number}
        view = crop_flip(image, 8, key["seed"], key["epoch"], np.array([key["sample"]]))
        places.append(found(view[0], image[0]))
    tops, lefts, flips = map(set, zip(*places))
    assert len(tops) > 20 and len(lefts) > 20 and len(flips) == 2


@pytest.mark.parametrize(("height", "width"), [(9, 9), (8, 11)])
def test_crops_cover_the_picture_evenly_and_half_are_mirrored(height, width):
    count, crop = 12000, 6
    images = numbered(count, height, width, channels=1)
    views = crop_flip(images, crop, 1, 2, np.arange(count))
    places = [found(view, image) for view, image in zip(views, images)]
    rows, columns = height - crop + 1, width - crop + 1
    table = np.zeros((rows, columns, 2))
    for place in places:
        table[place[0], place[1], int(place[2])] += 1
    expected = count / table.size
    # Chi-square of 31 or 35 degrees of freedom: beyond is less than one in a thousand.
    assert ((table - expected) ** 2 / expected).sum() < 1.9 * table.size
    assert abs(table[:, :, 1].sum() / count - 0.5) < 0.02


def test_a_crop_as_large_as_the_picture_is_the_picture_or_its_mirror_image():
    images = numbered(200)
    views = crop_flip(images, 9, 0, 0, np.arange(200))
    places = {found(view, image) for view, image in zip(views, images)}
    assert places == {(0, 0, False), (0, 0, True)}


@pytest.mark.parametrize(("crop", "start"), [(9, 0), (5, 2), (4, 2), (1, 4)])
def test_the_centre_crop_is_the_middle(crop, start):
    images = numbered(3)
    end = start + crop
    np.testing.assert_array_equal(centre_crop(images, crop), images[:, :, start:end, start:end])
