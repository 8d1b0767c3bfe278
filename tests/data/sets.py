"""Sources and packed sets for tests, made in this process: small, so of many small shards."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from knl.data.pack import plan as planning
from knl.data.pack.convert import Form
from knl.data.pack.run import finish_set, refuse_finished
from knl.data.pack.shards import read_note, write_shard
from knl.data.pack.sources import Reader
from knl.data.packed_set import Meta, Records, read_index
from knl.data.synth import make_jpeg

AS_IS, SMALL, RAW = Form(False, 0, 90), Form(False, 48, 90), Form(True, 24, 90)
CLASSES = ("apple", "pear", "plum")


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    """A picture as a file of some kind."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def class_folders(
    root: Path, train: int = 24, val: int = 6, side: int = 64
) -> dict[str, tuple[bytes, str]]:
    """JPEGs below root/train/CLASS and root/val/CLASS: by path, each file and its class."""
    made = {}
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            label = number % len(CLASSES)
            size = (side + number % 7, side + number % 5)
            data = make_jpeg(number + (split == "val") * 1000, label, size)
            path = root / split / CLASSES[label] / f"{number:04}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            made[path.relative_to(root).as_posix()] = data, CLASSES[label]
    return made


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None],
    names: Sequence[str] | None = None,
    rows: int | None = None,
) -> None:
    """A file as on the hub: struct image {bytes, path}, label; `names` of classes in its metadata;
    so many `rows` in a group."""
    values = [{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(images)]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(values, struct), "label": pa.array(labels, pa.int64())})
    if names:
        label = {"names": list(names), "_type": "ClassLabel"}
        features = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


def pack_here(source: Path, folder: Path, form: Form = AS_IS, limit: int = 100) -> Meta:
    """What `knl data pack` does, in this process; it goes on from whole shards too."""
    refuse_finished(source, folder, form)
    plan = planning.make_plan(source, folder, form)
    reader = Reader(source, plan.kind)
    for shard in [shard for shard in plan.shards if read_note(folder, shard.name) is None]:
        items = planning.items_of(folder, shard)
        classes = len(plan.classes)
        write_shard(folder, shard.name, items, reader, form, classes, lambda taken: None)
    return finish_set(source, folder, form, limit)


def records_of(folder: Path, meta: Meta, split: str) -> list[tuple[bytes, str]]:
    """All records of a split, in order: what is stored, and the name of its class."""
    part = meta.splits[split]
    records = Records(folder, part, read_index(folder, split, part))
    try:
        return [
            (bytes(record.data), meta.classes[record.label])
            for record in records.read(np.arange(len(records)))
        ]
    finally:
        records.close()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: what the finished set is made of."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
