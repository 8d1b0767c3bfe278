"""Where pictures come from: folders of classes, Parquet files, WebDataset tars, IDX files.

A source is listed once, for all packers, into a table of pictures; after that each packer reads
the ones it needs. Parquet is read in the order of its rows; all others are shuffled, so that
neighbours in a packed set are of different classes.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from knl.data.arrays import read_idx
from knl.data.hashing import mix
from knl.errors import InputError

Kind = Literal["folders", "parquet", "tars", "idx"]
# What the names of folders and files say; `test` is looked at where there is no other to test on.
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train|validation|valid|val|test)(?![a-z])", re.I)
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
_NO_LABEL = -1
_MOST_CLASSES = 1 << 20  # a higher label is taken for damage


class Item(NamedTuple):
    """A picture of a source. `place`: byte in a tar, row of Parquet, number in IDX; `size`: bytes
    in a tar; `label`: -1 where there is none."""

    split: str
    file: str
    place: int
    size: int
    label: int
    key: str


ITEMS = pa.schema(
    [
        ("split", pa.string()),
        ("file", pa.string()),
        ("place", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.int32()),
        ("key", pa.string()),
    ]
)


@dataclass(frozen=True)
class Listing:
    """All pictures of a source, in the order in which they are packed, as `ITEMS`."""

    kind: Kind
    classes: list[str]
    items: pa.Table


def list_source(source: Path) -> Listing:
    """What is in a folder. Raises InputError where it is nothing that can be packed."""
    kind, items, classes = _list(source)
    if not items:
        raise InputError(f"{source}: no picture found in it")
    splits = {item.split for item in items}
    unwanted = "test" if "val" in splits else None  # ImageNet's has no labels
    items = [
        item._replace(split="val" if item.split == "test" else item.split)
        for item in items
        if item.split != unwanted
    ]
    try:
        columns = [pa.array(column, field.type) for column, field in zip(zip(*items), ITEMS)]
    except UnicodeEncodeError as error:
        raise InputError(f"{source}: {error.object!r}: the name is not UTF-8: rename it") from None
    table = pa.Table.from_arrays(columns, schema=ITEMS)
    order = np.argsort(mix(np.arange(len(items))), kind="stable")
    return Listing(kind, classes, table if kind == "parquet" else table.take(pa.array(order)))


def _list(source: Path) -> tuple[Kind, list[Item], list[str]]:
    # Class folders are not looked into: there may be a million pictures in them.
    places = [source, source / "data", *(source / name for name in _SPLITS)]
    files = sorted(path for place in places if place.is_dir() for path in place.glob("*.*"))
    if found := [path for path in files if path.suffix == ".parquet"]:
        return "parquet", *_list_parquet(source, found)
    if found := [path for path in files if path.suffix == ".tar"]:
        return "tars", *_list_tars(source, found)
    if found := sorted(source.glob("*-images-idx3-ubyte*")):
        return "idx", *_list_idx(source, found)
    if found := [path for path in files if ".tar." in path.name or path.suffix == ".tgz"]:
        raise InputError(f"{found[0]}: pictures cannot be read one by one: unpack it (to .tar)")
    return "folders", *_list_folders(source)


def _list_folders(source: Path) -> tuple[list[Item], list[str]]:
    """SRC/train/CLASS/picture and SRC/val/CLASS/picture, or SRC/CLASS/picture to train on."""
    inner = _folders(source)
    places = {_SPLITS[folder.name]: folder for folder in inner if folder.name in _SPLITS}
    if "train" not in places:
        if inner and all(folder.name in _SPLITS for folder in inner):
            raise InputError(f"{source} has {inner[0].name} but no train: give the folder of both")
        places = {"train": source}
    if "val" in places:
        places.pop("test", None)
    classes = [folder.name for folder in _folders(places["train"])]
    items = []
    for split, place in places.items():
        found = [folder.name for folder in _folders(place)]
        if not found:
            raise InputError(
                f"{place}: no class folders in it: sort its pictures into one folder a class"
            )
        if odd := sorted(set(found) - set(classes)):
            raise InputError(f"{place / odd[0]}: no class of {places['train']}")
        for name in found:
            label = classes.index(name)
            for path in _files(place / name):
                relative = path.relative_to(source).as_posix()
                items.append(Item(split, relative, 0, 0, label, relative))
    return items, classes


def _list_parquet(source: Path, files: list[Path]) -> tuple[list[Item], list[str]]:
    """Files with the columns `image` (bytes, or a struct with `bytes`) and `label`."""
    items: list[Item] = []
    classes: list[str] = []
    highest = _NO_LABEL
    for path in files:
        name = path.relative_to(source).as_posix()
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                for column in ("image", "label"):
                    if column not in schema.names:
                        raise InputError(f"{path}: no column {column!r}, only {schema.names}")
                if not _holds_bytes(schema.field("image").type):
                    kind = schema.field("image").type
                    raise InputError(f"{path}: column 'image' holds {kind}: must be bytes")
                labels = file.read(columns=["label"]).column("label")
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: not Parquet that can be read: {_line(error)}") from None
        try:
            labels = labels.cast(pa.int32()).to_pylist()
        except pa.ArrowException as error:
            raise InputError(f"{path}: column 'label': not numbers: {_line(error)}") from None
        classes = classes or _hub_classes(schema.metadata)
        split = _split_of(name)
        for row, label in enumerate(labels):
            label = _NO_LABEL if label is None else label
            highest = max(highest, label)
            items.append(Item(split, name, row, 0, label, f"{name}:{row}"))
    return items, classes or _numbered(source, highest)


def _list_tars(source: Path, files: list[Path]) -> tuple[list[Item], list[str]]:
    """WebDataset: members NAME.jpg and NAME.cls, whose text is the label."""
    items, highest = [], _NO_LABEL
    for path in files:
        name = path.relative_to(source).as_posix()
        pictures: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    place, slash, base = member.name.rpartition("/")
                    stem, dot, suffix = base.partition(".")
                    stem = place + slash + stem
                    if member.isfile() and suffix == "cls":
                        labels[stem] = int(archive.extractfile(member).read(32))  # type: ignore[union-attr]
                    elif member.isfile() and (dot + suffix).lower() in _PICTURES:
                        pictures[stem] = member
                _require_end(path, archive.offset)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise InputError(f"{path}: not a WebDataset tar: {_line(error)}") from None
        highest = max([highest, *labels.values()])
        for stem, member in pictures.items():
            label = labels.get(stem, _NO_LABEL)
            key = f"{name}:{member.name}"
            items.append(Item(_split_of(name), name, member.offset_data, member.size, label, key))
    return items, _numbered(source, highest)


def _list_idx(source: Path, files: list[Path]) -> tuple[list[Item], list[str]]:
    """MNIST's files: train-images-idx3-ubyte, train-labels-idx1-ubyte, and t10k's, plain or .gz."""
    items, highest = [], _NO_LABEL
    for path in files:
        if path.suffix == ".gz" and path.with_suffix("") in files:
            continue  # the same, packed
        stem = path.name.partition("-")[0]
        images = _idx_images(source, path.name)
        labels = read_idx(source / f"{stem}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise InputError(f"{path}: {len(images)} pictures and {len(labels)} labels")
        highest = max(highest, int(labels.max(initial=0)))
        split = "train" if stem == "train" else "val"
        items += [
            Item(split, path.name, number, 0, int(label), f"{path.name}:{number}")
            for number, label in enumerate(labels)
        ]
    return items, _numbered(source, highest)


class Reader:
    """Reads the pictures of a source. OSError, where one cannot be read, is the caller's."""

    def __init__(self, source: Path, kind: Kind) -> None:
        self._source, self._kind = source, kind

    def read(self, item: Item) -> bytes | NDArray[Any]:
        """A file's bytes, or uint8 [height, width]."""
        if self._kind == "idx":
            return _idx_images(self._source, item.file)[item.place]
        path = self._source / item.file
        if self._kind == "parquet":
            try:
                return _parquet_picture(path, item.place)
            except (pa.ArrowException, IndexError) as error:  # or fewer rows than were listed
                raise OSError(_line(error)) from None
        if self._kind == "folders":
            return path.read_bytes()
        with path.open("rb") as file:
            file.seek(item.place)
            return file.read(item.size)


@lru_cache(maxsize=2)
def _idx_images(source: Path, file: str) -> NDArray[Any]:
    return read_idx(source / file.replace(".gz", ""), 3)


def _parquet_picture(path: Path, row: int) -> bytes:
    """Empty where there is none."""
    firsts = _first_rows(path)
    group = int(np.searchsorted(firsts, row, side="right")) - 1
    value = _row_group(path, group)[row - int(firsts[group])].as_py()
    return (value.get("bytes") if isinstance(value, dict) else value) or b""


@lru_cache(maxsize=2)
def _first_rows(path: Path) -> NDArray[Any]:
    metadata = pq.read_metadata(path)
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return np.cumsum([0, *counts[:-1]])


@lru_cache(maxsize=1)
def _row_group(path: Path, group: int) -> Any:
    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=["image"], use_threads=False).column(0)


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold pictures: bytes, or a struct with `bytes`."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _require_end(path: Path, offset: int) -> None:
    """Raise TarError where a tar goes on behind its last good member: tarfile stops at a damaged
    header as if it were the end."""
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.TarError(f"damaged at byte {offset}")


def _numbered(source: Path, highest: int) -> list[str]:
    """Names of classes that have none."""
    if highest >= _MOST_CLASSES:
        raise InputError(f"{source}: label {highest}: must be below {_MOST_CLASSES}")
    return [str(label) for label in range(highest + 1)]


def _hub_classes(metadata: dict[bytes, bytes] | None) -> list[str]:
    """Names of the classes, as Hugging Face's hub writes them into a schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features["label"]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _split_of(name: str) -> str:
    found = _SPLIT_IN_NAME.search(name)
    return _SPLITS[found.group(1).lower()] if found else "train"


def _folders(place: Path) -> list[Path]:
    with os.scandir(place) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    return [place / name for name in sorted(names)]


def _files(place: Path) -> Iterator[Path]:
    """All files below, without asking the file system about each."""
    for folder, inner, names in os.walk(place, onerror=_refuse):
        inner.sort()
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _refuse(error: OSError) -> None:
    """os.walk would leave out a folder that cannot be read."""
    raise error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
