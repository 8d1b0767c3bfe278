"""The same pictures from class folders, tars, Parquet and IDX files; which splits are found."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from knl.data.packed_set import read_meta

from .sets import CLASSES, RAW, class_folders, pack_here, records_of, write_parquet

WITH_NAMES = pytest.mark.parametrize("names", [CLASSES, None], ids=["names", "numbers"])


def tree(root, train=12, val=6):
    """Class folders, and what they hold: by split, (file, number of its class)."""
    made = class_folders(root, train, val)
    return {
        split: [(d, CLASSES.index(c)) for path, (d, c) in made.items() if path.startswith(split)]
        for split in ("train", "val")
    }


def packed(source, folder):
    meta = pack_here(source, folder)
    assert read_meta(folder) == meta
    return meta, {split: records_of(folder, meta, split) for split in meta.splits}


def named(rows, names):
    return sorted((data, names[label]) for data, label in rows)


def same(source, folder, made, names):
    meta, found = packed(source, folder)
    assert meta.classes == list(names) and meta.rejected == 0
    assert {split: sorted(rows) for split, rows in found.items()} == {
        split: named(rows, names) for split, rows in made.items()
    }
    return found


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def samples(rows, place="", suffix="jpg"):
    for number, (data, label) in enumerate(rows):
        yield f"{place}{number:04}.{suffix}", data
        yield f"{place}{number:04}.cls", f"{label}".encode()


def test_class_folders(tmp_path):
    made = tree(tmp_path / "src")
    found = same(tmp_path / "src", tmp_path / "set", made, CLASSES)
    classes = [name for _, name in found["train"]]
    assert classes != sorted(classes)  # neighbours are of different classes


def test_class_folders_alone_are_to_train_on(tmp_path):
    made = tree(tmp_path / "src")
    same(tmp_path / "src/train", tmp_path / "set", {"train": made["train"]}, CLASSES)


def test_folders_below_classes_are_looked_into_and_hidden_files_are_not(tmp_path):
    made = tree(tmp_path / "src")
    apple = tmp_path / "src/train/apple"
    (apple / "more").mkdir()
    (apple / "0000.JPEG").rename(apple / "more/1.JPEG")
    (apple / ".DS_Store").write_bytes(b"x")
    (tmp_path / "src/.git").mkdir()
    same(tmp_path / "src", tmp_path / "set", made, CLASSES)


@pytest.mark.parametrize("place", ["", "./", "a.b/", "n01.x/deep/"])
def test_tars(tmp_path, place):
    made = tree(tmp_path / "tree")
    for split, rows in made.items():
        for part in range(2):
            path = tmp_path / f"src/{split}-{part:04}.tar"
            tar(path, [*samples(rows[part::2], place), (f"{place}x.json", b"{}")])
    same(tmp_path / "src", tmp_path / "set", made, "012")


def test_splits_of_tars_are_also_the_names_of_folders(tmp_path):
    made = tree(tmp_path / "tree")
    tar(tmp_path / "src/train/0.tar", samples(made["train"], suffix="JPG"))
    tar(tmp_path / "src/validation/0.tar", samples(made["val"], suffix="jpeg"))
    same(tmp_path / "src", tmp_path / "set", made, "012")


@WITH_NAMES
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_parquet_of_the_hub(tmp_path, rows, names):
    made = tree(tmp_path / "tree")
    halves = made["train"][:7], made["train"][7:]
    for number, half in enumerate(halves):
        path = tmp_path / f"src/data/train-{number:05}-of-00002.parquet"
        write_parquet(path, *zip(*half), names=names, rows=rows)
    path = tmp_path / "src/data/validation-00000-of-00001.parquet"
    write_parquet(path, *zip(*made["val"]), names=names, rows=rows)
    found = same(tmp_path / "src", tmp_path / "set", made, names or "012")
    wanted = [(data, (names or "012")[label]) for data, label in made["train"]]
    assert found["train"] == wanted  # in the order of the rows


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_parquet_of_plain_bytes(tmp_path, kind):
    images, labels = zip(*tree(tmp_path / "tree")["train"])
    table = pa.table({"label": pa.array(labels, pa.uint8()), "image": pa.array(images, kind)})
    (tmp_path / "src").mkdir()
    pq.write_table(table, tmp_path / "src/all.parquet")
    made = {"train": list(zip(images, labels))}
    same(tmp_path / "src", tmp_path / "set", made, "012")


def test_pictures_of_parquet_without_a_label_or_bytes_are_listed(tmp_path):
    images, labels = map(list, zip(*tree(tmp_path / "tree")["train"]))
    labels[1], labels[2], images[3] = None, -1, None
    write_parquet(tmp_path / "src/train.parquet", images, labels)
    meta, found = packed(tmp_path / "src", tmp_path / "set")
    assert meta.rejected == 3 and len(found["train"]) == 9
    lines = (tmp_path / "set/rejected.jsonl").read_text().splitlines()
    assert [line.count("no label") for line in lines] == [1, 1, 0]
    assert '"train.parquet:3"' in lines[2] and "empty file" in lines[2]


@pytest.mark.parametrize("packed_as", ["", ".gz", "both"])
def test_idx_files(tmp_path, packed_as):
    (tmp_path / "src").mkdir()
    random = np.random.default_rng(0)
    wanted = {}
    for stem, split, count in (("train", "train", 20), ("t10k", "val", 10)):
        images = random.integers(0, 256, (count, 28, 20), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            shape = struct.pack(f">{values.ndim}I", *values.shape)
            data = bytes([0, 0, 8, values.ndim]) + shape + values.tobytes()
            path = tmp_path / f"src/{stem}-{name}-ubyte"
            if packed_as != ".gz":
                path.write_bytes(data)
            if packed_as:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
        wanted[split] = sorted(labels.tolist())
    meta = pack_here(tmp_path / "src", tmp_path / "set", RAW)
    assert meta.classes == [str(n) for n in range(10)]
    for split, labels in wanted.items():
        rows = records_of(tmp_path / "set", meta, split)
        assert sorted(int(name) for _, name in rows) == labels
        assert len({data for data, _ in rows}) == len(rows)


def test_the_test_split_is_taken_where_there_is_no_val(tmp_path):
    made = tree(tmp_path / "src")
    (tmp_path / "src/val").rename(tmp_path / "src/test")
    same(tmp_path / "src", tmp_path / "set", made, CLASSES)


def test_a_test_split_without_labels_beside_val_is_left_alone(tmp_path):
    made = tree(tmp_path / "tree")
    for split in ("train", "validation", "test"):
        images, labels = zip(*made["train" if split == "train" else "val"])
        labels = [-1] * len(images) if split == "test" else labels
        write_parquet(tmp_path / f"src/data/{split}-0.parquet", images, labels, names=CLASSES)
    same(tmp_path / "src", tmp_path / "set", made, CLASSES)


def test_a_flat_test_folder_beside_val_is_left_alone(tmp_path):
    made = tree(tmp_path / "src")
    (tmp_path / "src/test").mkdir()
    (tmp_path / "src/test/1.JPEG").write_bytes(made["val"][0][0])
    same(tmp_path / "src", tmp_path / "set", made, CLASSES)
