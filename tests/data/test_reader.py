"""What training reads from a packed set: damage is an error in one line, or is replaced and noted;
the same set gives the same batches."""

from __future__ import annotations

import errno
import os

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knl.data.packed_set import META, read_meta
from knl.errors import InputError

from .damage import (
    KINDS,
    bits,
    changed,
    files_of,
    flipped,
    fuzzed,
    hit,
    places,
    records_in,
)
from .reading import Clean, batches, noted, opened, replaced, same
from .sets import records_of


@pytest.fixture(scope="module")
def clean(sets):
    """Batches of the whole sets, by kind."""
    return Clean({kind: batches(opened(sets / kind)) for kind in ("jpeg", "raw")})


@KINDS
@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_are_arrow_that_others_can_map(sets, kind, split):
    folder = sets / kind
    meta = read_meta(folder)
    rows = []
    for shard in meta.splits[split].shards:
        with pa.memory_map(str(folder / shard.file)) as file:
            rows += pa.ipc.open_file(file).read_all().to_pylist()
    found = [(row["image"], meta.classes[row["label"]]) for row in rows]
    assert found == records_of(folder, meta, split)
    assert all(row["key"].startswith(f"{split}/{name}/") for row, (_, name) in zip(rows, found))


@KINDS
@pytest.mark.parametrize("augment", ["none", "crop-flip", "random-resized-crop"])
def test_a_whole_set_gives_the_same_batches_in_any_order(sets, kind, augment):
    dataset = opened(sets / kind, augment)
    first = batches(dataset)
    assert same(first, batches(dataset, order=-1))
    assert same(first, batches(opened(sets / kind, augment)))
    assert dataset.damaged == {} and None not in first.values()


@KINDS
@fuzzed
@given(data=st.data(), count=st.integers(1, 12))
def test_damaged_records_are_replaced_by_the_next_of_their_batch(victims, clean, kind, data, count):
    folder = victims / kind
    names = [name for name in files_of(folder) if name.endswith(".arrow")]
    path = folder / data.draw(st.sampled_from(names))
    damaged = path.read_bytes()
    hits = {int(data.draw(places) * len(damaged)) for _ in range(count)}
    for place in hits:
        damaged = flipped(damaged, place, data.draw(bits))
    broken = {w.number for w in hit(folder, path.name, hits) if w.split == "train"}
    with changed(path, damaged):
        dataset = opened(folder)
        found = batches(dataset)
        again = batches(opened(folder), order=-1)
    assert set(dataset.damaged) == noted(clean[kind], broken)
    assert same(found, replaced(clean[kind], broken))
    assert same(found, again)
    for sample in dataset.damaged:
        (where,) = (w for w in records_in(folder) if (w.split, w.number) == ("train", sample))
        assert dataset.place_of(sample) == f"{folder / where.file} record {where.record}"


@KINDS
@fuzzed
@given(data=st.data(), place=places, bit=bits)
def test_a_damaged_index_or_meta_json_is_refused_or_harmless(
    victims, clean, kind, data, place, bit
):
    folder = victims / kind
    names = [name for name in files_of(folder, meta=True) if not name.endswith(".arrow")]
    path = folder / data.draw(st.sampled_from(names))
    whole = path.read_bytes()
    with changed(path, flipped(whole, int(place * len(whole)), bit)):
        try:
            dataset = opened(folder)
        except InputError as error:
            assert "\n" not in str(error)
            return
        assert path.name == META
        assert same(batches(dataset), clean[kind])


@KINDS
@fuzzed
@given(data=st.data(), share=places)
def test_a_truncated_or_missing_file_is_refused_by_name(victims, kind, data, share):
    folder = victims / kind
    path = folder / data.draw(st.sampled_from(files_of(folder, meta=True)))
    whole = path.read_bytes().rstrip()
    for part in (whole[: int(share * len(whole))], None):
        with changed(path, part), pytest.raises(InputError) as caught:
            opened(folder)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@KINDS
@fuzzed
@given(share=places)
def test_a_shard_that_shrinks_under_a_run_costs_the_records_that_are_gone(
    victims, clean, kind, share
):
    folder = victims / kind
    path = folder / "train-00000.arrow"
    whole = path.read_bytes()
    with changed(path, whole):
        dataset = opened(folder)
        dataset.train_batch(np.arange(2), epoch=1)  # the file is open
        with path.open("r+b") as file:
            file.truncate(int(share * len(whole)))
        found = batches(dataset)
    gone = {
        w.number
        for w in records_in(folder)
        if w.file == path.name and w.bytes[-1] >= int(share * len(whole))
    }
    assert set(dataset.damaged) == noted(clean[kind], gone)
    assert same(found, replaced(clean[kind], gone))


def test_a_damaged_record_to_test_on_is_left_out(victims, capsys):
    folder = victims / "jpeg"
    (where, *_) = (w for w in records_in(folder) if w.split == "val")
    path = folder / where.file
    dataset = opened(folder)
    wanted, answers = dataset.test_batch(np.arange(1, dataset.test_samples))
    with changed(path, flipped(path.read_bytes(), where.bytes[5], 3)):
        images, labels = opened(folder).test_batch(np.arange(dataset.test_samples))
    assert np.array_equal(images, wanted) and np.array_equal(labels, answers)
    assert dataset.damaged == {}
    assert (
        capsys.readouterr().err == f"knl: {path} record 0: checksum; it is left out of the test\n"
    )


def test_a_sector_that_cannot_be_read_costs_the_records_in_it_alone(victims, monkeypatch):
    dataset = opened(victims / "raw")
    bad = int(dataset.train.index["start"][3]) + 5
    real = os.pread

    def pread(file, length, start):
        if start <= bad < start + length:
            raise OSError(errno.EIO, "Input/output error")
        return real(file, length, start)

    monkeypatch.setattr(os, "pread", pread)
    read = dataset.train.read(np.arange(8))
    assert [record.fault for record in read] == [""] * 3 + ["Input/output error"] + [""] * 4
    dataset.train_batch(np.arange(8), 0)
    assert dataset.damaged == {3: "Input/output error"}
