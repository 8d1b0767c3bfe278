"""The same source gives the same set to the byte, however many pack it and whoever is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess

import pytest

from knl.data.pack import plan as planning
from knl.data.pack import sheet
from knl.data.pack.convert import Form
from knl.data.pack.run import finish_set
from knl.data.pack.run import pack as pack_all
from knl.errors import FailedError, InputError

from ..mpi.launch import run, started
from .packers import (
    NO_ROOM_CHECK,
    command,
    one_line,
    pack,
    packing,
    times,
    whole,
    workers,
)
from .sets import AS_IS, class_folders, contents, pack_here

TWO = ("--processes", "2")


def test_two_processes_make_the_same_as_one(source, reference, tmp_path):
    assert sum(name.endswith(".arrow") for name in reference) > 8
    done = pack(source, tmp_path / "set", *TWO, "--json")
    assert contents(tmp_path / "set") == reference
    result = json.loads(done.stdout)
    assert result["packed_now"] == 237 and result["rejected_now"] == result["rejected"] == 3
    assert {name: split["images"] for name, split in result["splits"].items()} == {
        "train": 208,
        "val": 29,
    }


def test_parts_in_any_order_and_at_once_make_the_same(source, reference, tmp_path):
    folder = tmp_path / "set"
    assert "run knl data pack SRC DST" in not_finished(source, folder)
    done = pack(source, folder, "--part", "3/3", "--processes", "1")
    assert done.stdout.startswith("part 3/3: 4 shards, 77 images packed now, 1 rejected; ")
    line = not_finished(source, folder)
    assert "8 of 12 shards are not packed yet, train-00000 is the first" in line
    assert "--part i/n" in line and not (folder / "meta.json").exists()
    lines = [command(source, folder, "--part", f"{n}/3", "--processes", "1") for n in (1, 2)]
    with started(lines[0]) as one, started(lines[1]) as other:
        for job in (one, other):
            assert job.finish(60.0).returncode == 0
    done = pack(source, folder, "--finish", "--json")
    assert json.loads(done.stdout)["splits"]["train"]["images"] == 208
    assert contents(folder) == reference


def not_finished(source, folder):
    with pytest.raises(FailedError) as caught:
        finish_set(source, folder, Form(False, 96, 90), 100)
    return str(caught.value)


def goes_on(source, folder, reference):
    """The same command again makes the same set, without writing whole shards again."""
    before = whole(folder)
    assert 0 < len(before) < 12
    done = pack(source, folder, *TWO, "--json")
    assert json.loads(done.stdout)["shards_there_before"] == len(before)
    assert "of 240 images are in whole shards already" in done.stderr
    after = times(folder)
    assert {name: after[name] for name in before} == before
    assert contents(folder) == reference


def test_it_goes_on_after_the_packer_was_killed_twice(source, reference, tmp_path):
    folder = tmp_path / "set"
    for _ in range(2):
        with packing(source, folder, *TWO) as job:
            os.kill(job.process.pid, signal.SIGKILL)
            done = job.finish(20.0)  # which sees that no process of the pool is left
        assert done.returncode == -signal.SIGKILL
    goes_on(source, folder, reference)


def test_it_goes_on_after_a_process_of_it_was_killed(source, reference, tmp_path):
    with packing(source, tmp_path / "set", *TWO) as job:
        os.kill(workers(job)[0], signal.SIGKILL)
        done = job.finish(20.0)
    assert done.returncode == 1
    line = one_line(done)
    assert "a packing process was killed (out of memory?): run the same command again" in line
    goes_on(source, tmp_path / "set", reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_packer_that_is_told_to_end_takes_its_processes_along(source, tmp_path, number):
    with packing(source, tmp_path / "set", *TWO) as job:
        os.kill(job.process.pid, number)
        done = job.finish(20.0)
    assert done.returncode != 0 and "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root rights")
    disk = tmp_path / "small disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "knl-test", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_it_goes_on_after_the_disk_was_full(source, reference, small_disk):
    folder = small_disk / "set"
    done = run(command(source, folder, *TWO, patch=NO_ROOM_CHECK))
    assert done.returncode == 1
    line = one_line(done)
    assert "No space left on device" in line and "make room and run the same command" in line
    size = "remount,size=8m"
    subprocess.run(["mount", "-o", size, "knl-test", str(small_disk)], check=True)
    goes_on(source, folder, reference)


def test_too_little_room_is_told_before_a_shard_is_begun(sets, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(FailedError, match=r"0\.00 GB free, about 0\.00 GB needed for 2 shards"):
        pack_all(sets / "made", tmp_path / "set", AS_IS, (1, 1), 1, 0)
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["parts"]


def test_it_goes_on_after_a_kill_before_any_write_reached_the_disk(
    tmp_path, small_shards, monkeypatch
):
    """At each fsync of a packing in turn, in a process of its own."""
    monkeypatch.setattr(sheet, "_COLUMNS", 1)  # it and the disk take most of the time
    monkeypatch.setattr(os, "fsync", lambda file: None)
    made = tmp_path / "made"
    class_folders(made, 5, 2)
    wanted = contents_of_new(made, tmp_path / "wanted")
    for number in range(1, 200):
        folder = tmp_path / f"{number}"
        if not killed(made, folder, number):
            break
        if (folder / "meta.json").exists():
            with pytest.raises(InputError, match="is a finished set"):
                pack_here(made, folder)
        else:
            pack_here(made, folder)
        assert contents(folder) == wanted, number
    assert number > 20


def contents_of_new(source, folder):
    pack_here(source, folder)
    return contents(folder)


def killed(source, folder, number):
    """Whether a packer came so far that it was killed."""
    if (pid := os.fork()) == 0:
        left = [number]

        def count(file):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = count
        try:
            pack_here(source, folder)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_a_set_of_large_pictures_has_no_more_shards_than_pictures(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "_LEAST_SHARD", 1)
    meta = pack_here(sets / "made", tmp_path / "set")
    assert all(shard.records for split in meta.splits.values() for shard in split.shards)
