"""Made-up JPEG files in class folders, to try the path from files to accuracy without ImageNet."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from knl.data.hashing import mix, uniform
from knl.errors import InputError

_LEAST, _MOST = 120, 240  # pixels a side
_QUALITY = 90
_VAL_SHARE = 10  # one of so many is to test on
_NOISE, _COLOUR = 24.0, 60.0  # of 255
# Which random numbers: of a class, of a picture.
_CLASS, _PICTURE = 1, 2


def synthesise(folder: Path, images: int, classes: int) -> dict[str, Any]:
    """Write `images` JPEGs into folder/train/CLASS and folder/val/CLASS, nine to one.

    Raises InputError where the folder is not empty or cannot be written.
    """
    if images < _VAL_SHARE * classes:
        raise InputError(
            f"--images {images}: must be at least {_VAL_SHARE * classes}, for each of {classes} "
            "classes to have one to test on"
        )
    numbers = np.arange(images)
    labels = (numbers // _VAL_SHARE % classes).tolist()
    splits = ["val" if number % _VAL_SHARE == 0 else "train" for number in range(images)]
    digits = len(str(classes - 1))
    try:
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty: choose another folder, or remove it")
        for split in ("train", "val"):
            for label in range(classes):
                (folder / split / f"class-{label:0{digits}}").mkdir(parents=True, exist_ok=True)

        def write(number: int) -> int:
            place = folder / splits[number] / f"class-{labels[number]:0{digits}}"
            data = make_jpeg(number, labels[number])
            (place / f"{number:07}.jpg").write_bytes(data)
            return len(data)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            sizes = list(threads.map(write, range(images)))
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror}") from None
    return {"train": splits.count("train"), "val": splits.count("val"), "bytes": sum(sizes)}


def make_jpeg(number: int, label: int, size: tuple[int, int] | None = None) -> bytes:
    """Picture `number`, of class `label`, as a JPEG; of `size` (height, width), or of its own."""
    data = simplejpeg.encode_jpeg(
        make_picture(number, label, size), quality=_QUALITY, colorsubsampling="420"
    )
    return bytes(data)


def make_picture(number: int, label: int, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]: two colours of the class in stripes of its direction and width,
    anywhere, in any light, under noise."""
    direction, width, *colours = uniform(_CLASS, label, np.arange(8)).tolist()
    phase, light, tall, wide = uniform(_PICTURE, number, np.arange(4)).tolist()
    span = _MOST - _LEAST + 1
    height, length = size or (_LEAST + int(tall * span), _LEAST + int(wide * span))
    angle, wave = np.pi * direction, 0.2 + 0.5 * width
    down = np.arange(height, dtype=np.float32)[:, None] * np.float32(np.sin(angle) * wave)
    across = np.arange(length, dtype=np.float32) * np.float32(np.cos(angle) * wave)
    stripes = np.sin(down + across + np.float32(2 * np.pi * phase))
    one, other = (np.array(part, dtype=np.float32) for part in (colours[:3], colours[3:]))
    middle = 128 + _COLOUR * (light - 0.5) + _COLOUR * (one - other)
    noise = np.random.Generator(np.random.PCG64(int(mix(_PICTURE, number)[0])))
    grain = noise.standard_normal((height, length, 1), dtype=np.float32) * np.float32(_NOISE)
    picture = middle + stripes[:, :, None] * (_COLOUR * (one + other - 1)) + grain
    return picture.clip(0, 255).astype(np.uint8)
