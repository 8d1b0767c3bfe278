"""`knl bench data`: images/s of a core from record to batch, beside PIL and libjpeg-turbo alone."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from knl.bench.ranks import run_ranks
from knl.bench.timing import in_turn, medians
from knl.config import Data, Recipe, to_toml
from knl.data.pack.convert import Form
from knl.data.pack.run import finish_set, pack
from knl.data.packed import PackedDataset
from knl.data.picture import MEAN, SPREAD
from knl.data.synth import make_jpeg
from knl.data.views import TrainViews
from knl.plan import plan_by_rule
from knl.sysfs import read_topology
from knl.tune.trial import trial_recipe

ROUNDS, STEPS = 15, 3
# As ImageNet's pictures are on average: 500 x 375, 110 KB (the made ones come to that).
_SIZE, _IMAGES, _SOME, _BATCH = (375, 500), 128, 8, 64
_STORED, _CROP = 256, 224
_LIMIT_S = 1800.0
_RRC, _PLAIN = "random-resized-crop", "crop-flip"


@dataclass(frozen=True)
class _Kind:
    """One of the ways records can be stored and seen."""

    form: Form
    augment: str


_KINDS = {
    "jpeg_rrc": _Kind(Form(False, 0, 90), _RRC),
    "jpeg_crop": _Kind(Form(False, _STORED, 90), _PLAIN),
    "raw_crop": _Kind(Form(True, _STORED, 90), _PLAIN),
}
_RATIOS = {
    "jpeg_rrc_over_decode": ("decode", "jpeg_rrc"),
    "jpeg_crop_over_decode": ("decode_256", "jpeg_crop"),
    "jpeg_rrc_speedup_vs_pil": ("jpeg_rrc", "pil_rrc"),
    "jpeg_crop_speedup_vs_pil": ("jpeg_crop", "pil_crop"),
    "raw_crop_speedup_vs_pil": ("raw_crop", "pil_crop"),
}


def bench(
    recipe: Recipe, rounds: int, steps: int, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Measure; the object that `knl bench data --json` prints, its keys are a contract.

    `..._images_per_s`: of one core, medians over batches of 64 in turn. `jpeg_rrc`: JPEGs as
    ImageNet has them, random resized crop; `jpeg_crop`: shrunk to 256, plain crop and flip;
    `raw_crop`: raw 256, the same. `pil_...`: the same views of the same records by PIL and NumPy as
    torchvision does it. `decode...`: libjpeg-turbo alone; `memcpy`: a finished batch copied.
    `..._over_decode`: time over the decoder's. `t_data_s`, `step_s`: of a step of the recipe's
    network that reads the JPEGs. Raises FailedError where that does not train.
    """
    with tempfile.TemporaryDirectory(prefix="knl-bench-") as place:
        sets = {name: _pack(Path(place), name, kind) for name, kind in _KINDS.items()}
        with _one_cpu():
            seconds = medians(in_turn(_rivals(sets), rounds))
        stall = _stall(recipe, Path(place), steps, environment) if steps else {}
    speeds = {name: _BATCH / taken for name, taken in seconds.items()}
    return {
        "images": f"{_SIZE[1]} x {_SIZE[0]}, {sets['jpeg_rrc'].train.index['length'].mean():.0f} B",
        "rounds": rounds,
        **{f"{name}_images_per_s": speed for name, speed in speeds.items()},
        **{name: speeds[over] / speeds[under] for name, (over, under) in _RATIOS.items()},
        **stall,
    }


def describe(result: Mapping[str, Any]) -> str:
    """The result in lines for a reader."""
    words = {
        "jpeg_rrc": "JPEG, random resized crop",
        "decode": "libjpeg-turbo alone",
        "pil_rrc": "PIL, random resized crop",
        "jpeg_crop": "JPEG of short side 256, crop 224",
        "decode_256": "libjpeg-turbo alone",
        "pil_crop": "PIL, crop 224",
        "raw_crop": "raw 256, crop 224",
        "memcpy": "memcpy of a finished batch",
    }
    lines = [f"JPEGs of {result['images']}, one core, medians of {result['rounds']} rounds in turn"]
    lines += [
        f"{text:34} {result[f'{n}_images_per_s']:10,.0f} images/s" for n, text in words.items()
    ]
    lines.append(
        f"JPEG takes {result['jpeg_rrc_over_decode']:.2f} of decoding alone "
        f"({result['jpeg_crop_over_decode']:.2f} from 256); PIL takes "
        f"{result['jpeg_rrc_speedup_vs_pil']:.1f} times as long "
        f"({result['jpeg_crop_speedup_vs_pil']:.1f}; raw {result['raw_crop_speedup_vs_pil']:.1f})"
    )
    if "step_s" in result:
        lines.append(
            f"a step of {result['step_model']}: {result['step_s']:.2f} s, of which it waited for "
            f"JPEGs {1e3 * result['t_data_s']:.1f} ms ({result['t_data_share']:.2%})"
        )
    return "\n".join(lines)


def _pack(place: Path, name: str, kind: _Kind) -> PackedDataset:
    """A packed set of made pictures."""
    source, folder = place / "source", place / name
    for split in ("train", "val"):
        if not (source / split).exists():
            (source / split / "all").mkdir(parents=True)
            for number in range(_IMAGES if split == "train" else _SOME):
                data = make_jpeg(number, number, _SIZE)
                (source / split / "all" / f"{number:04}.jpg").write_bytes(data)
    pack(source, folder, kind.form, (1, 1), 1, 0)
    finish_set(source, folder, kind.form, 0)
    return PackedDataset(_data(folder, kind), 0)


def _data(folder: Path, kind: _Kind) -> Data:
    return Data(
        name="packed",
        path=os.fspath(folder),
        image_size=_STORED,
        crop=_CROP,
        augment=kind.augment,  # type: ignore[arg-type]
        chunk=_BATCH,
    )


def _rivals(sets: Mapping[str, PackedDataset]) -> dict[str, Callable[[], object]]:
    numbers = np.arange(_BATCH)
    files = {
        name: [bytes(record.data) for record in sets[name].train.read(numbers)]
        for name in ("jpeg_rrc", "jpeg_crop")
    }
    batch, _ = sets["raw_crop"].train_batch(numbers, 0)
    target = np.empty_like(batch)
    return {
        **{name: lambda s=s: s.train_batch(numbers, 0) for name, s in sets.items()},  # type: ignore[misc]
        "decode": lambda: [simplejpeg.decode_jpeg(data) for data in files["jpeg_rrc"]],
        "decode_256": lambda: [simplejpeg.decode_jpeg(data) for data in files["jpeg_crop"]],
        "pil_rrc": lambda: _by_pil(files["jpeg_rrc"], _data(Path(), _KINDS["jpeg_rrc"])),
        "pil_crop": lambda: _by_pil(files["jpeg_crop"], _data(Path(), _KINDS["jpeg_crop"])),
        "memcpy": lambda: np.copyto(target, batch),
    }


def _by_pil(files: list[bytes], data: Data) -> NDArray[Any]:
    """A batch as torchvision's transforms make it of PIL's pictures: crop, resize, flip, to
    float32 of 0 to 1 with the colours first, normalise, stack."""
    views = TrainViews(data, 0, 0, np.arange(len(files)))
    mean, spread = (MEAN / 255)[:, None, None], (SPREAD / 255)[:, None, None]
    images = []
    for number, file in enumerate(files):
        picture: Image.Image = Image.open(io.BytesIO(file)).convert("RGB")
        view = views.at(number, picture.height, picture.width)
        left, top, width, height = (round(value) for value in view.box)
        picture = picture.crop((left, top, left + width, top + height))
        if picture.size != (_CROP, _CROP):
            picture = picture.resize((_CROP, _CROP), Image.Resampling.BILINEAR)
        if view.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1)).astype(np.float32)
        pixels /= 255
        pixels -= mean
        pixels /= spread
        images.append(pixels)
    return np.stack(images)


def _stall(
    recipe: Recipe, place: Path, steps: int, environment: Mapping[str, str]
) -> dict[str, Any]:
    """How long steps of the recipe's network wait for JPEGs, on this node under its plan by rule:
    64 images, shared by its ranks."""
    choices = plan_by_rule(read_topology(), None, environment).choices
    found = trial_recipe(recipe, _BATCH, choices.ranks_per_node, choices)
    train = msgspec.structs.replace(found.train, epochs=1000.0, steps=0)
    data = _data(place / "jpeg_rrc", _KINDS["jpeg_rrc"])
    path = place / "recipe.toml"
    path.write_text(to_toml(msgspec.structs.replace(found, train=train, data=data)))
    wanted = {"recipe": os.fspath(path), "steps": steps}
    ranks, module = choices.ranks_per_node, "knl.bench.step_parts"
    parts = run_ranks(module, ranks, wanted, environment, _LIMIT_S)["breakdown"]
    whole = sum(parts.values())
    return {
        "step_model": recipe.model.name,
        "steps": steps,
        "step_s": whole,
        "t_data_s": parts["data_s"],
        "t_data_share": parts["data_s"] / whole,
    }


@contextmanager
def _one_cpu() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
