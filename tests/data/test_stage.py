"""Copies on a node: exactly the records that its lanes read, or a reason why not."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knl.config import Data
from knl.data.lanes import Lanes
from knl.data.pack.convert import Form
from knl.data.pack.run import finish_set, pack
from knl.data.packed import PackedDataset
from knl.data.stage import NotStaged, needed_records, stage
from knl.data.synth import synthesise

CROP = 16


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    place = tmp_path_factory.mktemp("set")
    synthesise(place / "tree", 400, 4)
    form = Form(True, 32, 90)
    pack(place / "tree", place / "packed", form, (1, 1), 1, 0)
    finish_set(place / "tree", place / "packed", form, 0)
    return place / "packed"


def opened(folder):
    data = Data(name="packed", path=str(folder), image_size=32, crop=CROP, augment="crop-flip")
    return PackedDataset(data, seed=0)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_needed_is_what_the_lanes_read_step_by_step(data):
    samples, chunk = data.draw(st.integers(40, 300)), data.draw(st.integers(1, 9))
    lanes = Lanes(samples, data.draw(st.integers(1, 4)), 5, 7, chunk)
    mine = data.draw(st.sets(st.integers(0, lanes.lanes - 1), min_size=1))
    end = data.draw(st.integers(1, 3 * lanes.steps_per_epoch))
    steps = range(data.draw(st.integers(0, end)), end)
    read = {
        int(sample)
        for step in steps
        for lane in mine
        for sample in lanes.batch(*divmod(step, lanes.steps_per_epoch), lane)
    }
    assert set(needed_records(lanes, mine, steps).tolist()) == read


def test_a_copy_reads_as_the_set_and_takes_no_more_room_than_it_needs(packed, tmp_path):
    here, there = opened(packed), opened(packed)
    needed = np.arange(40, 80)
    copy = stage(here.train, needed, tmp_path)
    there.train.move(copy.folder)
    for file in copy.folder.glob("*.arrow"):
        assert file.stat().st_size == (packed / file.name).stat().st_size
    assert copy.folder.stat().st_mode & 0o077 == 0
    used = sum(file.stat().st_blocks * 512 for file in copy.folder.iterdir())
    assert used < 2 * 32 * 32 * 3 * len(needed)
    copy.remove()  # open already
    assert list(tmp_path.iterdir()) == []
    for one, other in zip(here.train_batch(needed, 3), there.train_batch(needed, 3)):
        np.testing.assert_array_equal(one, other)
    assert not there.damaged


def test_what_was_not_copied_is_not_taken_for_good(packed, tmp_path):
    there = opened(packed)
    copy = stage(there.train, np.arange(10), tmp_path)
    there.train.move(copy.folder)
    copy.remove()
    images, _ = there.train_batch(np.array([5, 300]), 0)
    assert set(there.damaged) == {300} and images.shape == (2, 3, CROP, CROP)
    assert there.place_of(300).startswith(str(packed))  # where a user can look


def test_what_a_killed_job_has_left_goes_and_what_is_in_use_stays(packed, tmp_path):
    kept = stage(opened(packed).train, np.arange(10), tmp_path)
    orphan = stage(opened(packed).train, np.arange(10), tmp_path)
    orphan.lock.close()  # as the death of its process does
    stage(opened(packed).train, np.arange(10), tmp_path).remove()
    assert kept.folder.exists() and not orphan.folder.exists()
    kept.remove()


def test_a_copy_that_cannot_be_opened_leaves_the_set_where_it_was(packed, tmp_path):
    there = opened(packed)
    before, _ = there.train_batch(np.arange(4), 0)
    with pytest.raises(OSError, match="No such file"):
        there.train.move(tmp_path)
    after, _ = there.train_batch(np.arange(4), 0)
    np.testing.assert_array_equal(before, after)


def test_a_folder_that_is_not_there_is_named(packed, tmp_path):
    with pytest.raises(NotStaged, match="nowhere"):
        stage(opened(packed).train, np.arange(10), tmp_path / "nowhere")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_no_room_is_said_and_leaves_nothing(packed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(NotStaged, match=r"needed.*free"):
            stage(opened(packed).train, np.arange(360), disk)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
