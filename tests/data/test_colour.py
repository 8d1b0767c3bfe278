"""Random colours beside torchvision's and AlexNet's definitions, written out in steps."""

from __future__ import annotations

import numpy as np
import pytest

from knl.config import Data
from knl.data.colour import Colours, draw_colours
from knl.data.picture import MEAN, SPREAD, show
from knl.data.views import View

GREY = (0.299, 0.587, 0.114)


def in_steps(picture, colours):
    """Each change on all pixels in turn, as torchvision does but without clamping."""
    x = picture.astype(np.float64)
    for kind in colours.order:
        factor = colours.factors[kind]
        if kind == 0:
            x = x * factor
        elif kind == 1:
            x = factor * x + (1 - factor) * (x @ GREY).mean()
        else:
            x = factor * x + (1 - factor) * (x @ GREY)[..., None]
    return x + 255 * colours.light


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
@pytest.mark.parametrize("factors", [(1.3, 0.7, 1.2), (0.6, 0.0, 0.0), (1.0, 1.0, 1.0)])
def test_one_matrix_does_what_the_steps_do(order, factors):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    colours = Colours(factors, order, np.array([0.02, -0.01, 0.03]))
    out = np.empty((32, 32, 3), dtype=np.float32)
    show(picture, View(32, 32, (0, 0, 32, 32), False, colours), out)
    np.testing.assert_allclose(out * SPREAD + MEAN, in_steps(picture, colours), atol=0.01)


def drawn(count=20_000, seed=0, epoch=0, **keys):
    data = Data(name="packed", image_size=256, crop=224, **keys)
    return draw_colours(data, seed, epoch, np.arange(count))


def test_factors_are_uniform_and_orders_are_all_equally_likely():
    colours = drawn(colour_jitter=0.4)
    factors = np.array([c.factors for c in colours])
    assert factors.min() >= 0.6 and factors.max() <= 1.4
    assert np.abs(np.quantile(factors, (0.25, 0.5, 0.75), axis=0).T - (0.8, 1.0, 1.2)).max() < 0.02
    orders, counts = np.unique([c.order for c in colours], axis=0, return_counts=True)
    assert len(orders) == 6 and np.abs(counts / len(colours) - 1 / 6).max() < 0.02
    assert all(not c.light.any() for c in colours)


def test_lighting_has_the_covariance_of_alexnets_components():
    light = np.array([c.light for c in drawn(lighting=0.1)])
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    expected = vectors @ np.diag((0.1 * values) ** 2) @ vectors.T
    assert np.abs(np.cov(light.T) - expected).max() < 0.03 * expected.max()
    assert np.abs(light.mean(axis=0)).max() < 4 * np.sqrt(expected.max() / len(light))


def test_colours_are_a_function_of_seed_epoch_and_sample():
    first, again = drawn(50, colour_jitter=0.4), drawn(50, colour_jitter=0.4)
    assert [c.factors for c in first] == [c.factors for c in again]
    assert [c.factors for c in drawn(50, epoch=1, colour_jitter=0.4)] != [c.factors for c in first]
    assert drawn(3) == [None] * 3
