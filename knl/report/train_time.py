"""From the speed of steps to hours of a whole training."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from knl.errors import KnlError
from knl.scaling.study import Row, Study
from knl.site import load_site

# ILSVRC 2012's training set, and the epochs of ResNet-50 in the literature.
_IMAGENET, _EPOCHS = 1_281_167, 90


@dataclass(frozen=True)
class Training:
    """So many images in all. `what`: in words."""

    images: float
    what: str


def training_of(study: Study, recipe: dict[str, Any]) -> Training:
    """The recipe's epochs over its set; ImageNet's where its pictures are made up. `recipe`: its
    TOML."""
    if study.samples == 0 or recipe.get("data", {}).get("name") == "synthetic":
        what = f"{_EPOCHS} epochs of ImageNet ({_IMAGENET:,} images)"
        return Training(_IMAGENET * _EPOCHS, what)
    epochs = recipe.get("train", {}).get("epochs", 1)
    what = f"{epochs:g} epochs of {study.samples:,} images"
    return Training(study.samples * epochs, what)


def hours_of(row: Row, training: Training) -> float:
    """Of steps alone, without evaluations, checkpoints and start."""
    return training.images / row.images_per_s / 3600.0


def charge(study: Study, row: Row, training: Training) -> tuple[float | None, float | None]:
    """SUs of the whole training, and the price of its nodes in USD; None where the site is not
    known, or says nothing of it."""
    if study.site is None or study.cores_per_rank is not None:
        return None, None
    with contextlib.suppress(KnlError):  # a site of somebody else's
        for queue in load_site(study.site).queues:
            if row.nodes <= queue.nodes:
                su = queue.su * row.nodes * hours_of(row, training)
                return su, queue.usd * row.nodes or None
    return None, None
