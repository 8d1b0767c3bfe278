"""Sources that cannot be packed: one line each, which names the file and says what is wrong."""

from __future__ import annotations

import os
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knl.data.pack.sources import Item, Reader, list_source
from knl.data.synth import make_jpeg
from knl.errors import InputError

from .sets import class_folders, write_parquet
from .test_sources import samples, tar

ROWS = [(make_jpeg(n, n % 3, (16, 16)), n % 3) for n in range(12)]
fuzzed = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def refusal(source):
    with pytest.raises(InputError) as caught:
        list_source(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def table(path, **columns):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("folders", [[], ["apple", "pear"], ["train/apple", "val/apple"]])
def test_a_source_without_pictures(tmp_path, folders):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    line = refusal(tmp_path)
    assert "no picture found" in line or "no class folders" in line


@pytest.mark.parametrize("place", ["val", "train", "test"])
def test_pictures_beside_each_other(tmp_path, place):
    class_folders(tmp_path / "src", 6, 0)
    flat = tmp_path / "src" / place
    if place == "train":
        flat.rename(tmp_path / "gone")
    flat.mkdir()
    (flat / "1.JPEG").write_bytes(ROWS[0][0])
    assert refusal(tmp_path / "src").startswith(f"{flat}: no class folders in it: sort ")


def test_a_class_to_test_on_that_is_none_to_train_on(tmp_path):
    class_folders(tmp_path / "src")
    (tmp_path / "src/val/apple").rename(tmp_path / "src/val/aple")
    assert refusal(tmp_path / "src").startswith(f"{tmp_path}/src/val/aple: no class of ")


@pytest.mark.parametrize("name", ["train.tar.gz", "a.tgz", "train/0.tar.zst"])
def test_compressed_tars(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    assert refusal(tmp_path).startswith(f"{tmp_path}/{name}: pictures cannot be read one by one")


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    class_folders(tmp_path / "src")
    shut, scandir = tmp_path / "src/train/pear/deep", os.scandir
    shut.mkdir()

    def refuse(path):
        if os.fspath(path) == os.fspath(shut):  # root may read all
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="deep"):
        list_source(tmp_path / "src")


def test_names_that_are_not_utf_8(tmp_path):
    class_folders(tmp_path / "src")
    odd = os.fsencode(tmp_path) + b"/src/train/pear/caf\xe9.JPEG"
    with open(odd, "wb") as file:  # noqa: PTH123 - as bytes
        file.write(ROWS[0][0])
    assert "caf" in refusal(tmp_path / "src") and "not UTF-8" in refusal(tmp_path / "src")


BYTES = [data for data, _ in ROWS[:3]]
PATHS = [{"path": "x"}] * 3


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": BYTES, "class": [0, 1, 2]}, "no column 'label', only ['image', 'class']"),
        ({"img": BYTES, "label": [0, 1, 2]}, "no column 'image', only ['img', 'label']"),
        ({"image": BYTES, "label": ["cat", "dog", "cow"]}, "column 'label': not numbers"),
        ({"image": BYTES, "label": [0.5, 1, 2]}, "column 'label': not numbers"),
        ({"image": BYTES, "label": [[0], [1], [2]]}, "column 'label': not numbers"),
        ({"image": BYTES, "label": [0, 1, 1 << 40]}, "column 'label': not numbers"),
        ({"image": BYTES, "label": [0, 1, 1 << 30]}, f"label {1 << 30}: must be below"),
        ({"image": ["x.jpg"] * 3, "label": [0, 1, 2]}, "column 'image' holds string: must be"),
        ({"image": [1, 2, 3], "label": [0, 1, 2]}, "column 'image' holds int64: must be bytes"),
        ({"image": PATHS, "label": [0, 1, 2]}, "column 'image' holds struct<path: string>"),
    ],
)
def test_columns_of_parquet(tmp_path, columns, words):
    table(tmp_path / "src/train.parquet", **columns)
    assert words in refusal(tmp_path / "src")


@pytest.mark.parametrize("label", [b"cat", b"", b"99999999999999999999", b"1" * 31])
def test_labels_of_tars(tmp_path, label):
    tar(tmp_path / "0.tar", [("a.jpg", BYTES[0]), ("a.cls", label)])
    line = refusal(tmp_path)
    assert "not a WebDataset tar" in line or "must be below" in line


def damaged_or_all(source, path, damage):
    """Refused by name; or every picture is listed, and reads or not without a crash."""
    try:
        listing = list_source(source)
    except InputError as error:
        assert "\n" not in str(error)
        assert path.name in str(error) or "label" in str(error) or "no picture" in str(error)
        return
    reader = Reader(source, listing.kind)
    for row in listing.items.to_pylist():
        try:
            assert isinstance(reader.read(Item(**row)), bytes)
        except OSError:
            assert damage


@fuzzed
@given(st.data())
def test_damaged_parquet(tmp_path, data):
    path = tmp_path / "train.parquet"
    write_parquet(path, *zip(*ROWS), rows=4)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / f"train-{uuid.uuid4()}.parquet"  # readers keep what they know of a file
    for old in tmp_path.glob("*.parquet"):
        old.unlink()
    path.write_bytes(whole)
    damaged_or_all(tmp_path, path, damage=True)


@fuzzed
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_no_bit_of_a_tar_drops_pictures_silently(tmp_path, place, bit):
    path = tmp_path / "train.tar"
    tar(path, samples(ROWS))
    whole = bytearray(path.read_bytes())
    end = max(i for i, byte in enumerate(whole) if byte)
    whole[int(place * (end + 1)) // 512 * 512 + int(place * 1e9) % 160] ^= 1 << bit
    path.write_bytes(whole)
    try:
        listing = list_source(tmp_path)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert listing.items.num_rows == len(ROWS)


@pytest.mark.parametrize("name", ["train.tar", "train.parquet"])
def test_truncated_files(tmp_path, name):
    path = tmp_path / name
    if name.endswith("tar"):
        tar(path, samples(ROWS))
    else:
        write_parquet(path, *zip(*ROWS))
    path.write_bytes(path.read_bytes()[: 5 * 512 + 100])
    assert str(path) in refusal(tmp_path)
    path.write_bytes(b"")
    assert str(path) in refusal(tmp_path)
