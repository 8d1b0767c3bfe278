"""What is removed from shared memory: Intel MPI's own segments of one process, and nothing else."""

from __future__ import annotations

import mmap
import os
import uuid
from pathlib import Path

import pytest

from knl.leftovers import remove_openmp_segments, remove_segments, segments_of


@pytest.fixture
def mapped():
    """Files in /dev/shm that this process maps, by their kind of name."""
    tag = uuid.uuid4().hex[:12]
    paths = {
        "Intel MPI's": Path(f"/dev/shm/Intel_MPI_{tag}"),
        "a user's": Path(f"/dev/shm/knl-test-{tag}"),
        "a user's folder": Path(f"/dev/shm/knl-test-{tag}.d/Intel_MPI_{tag}"),
    }
    maps = []
    for path in paths.values():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 192)
        with path.open("r+b") as file:
            maps.append(mmap.mmap(file.fileno(), 192))
    yield paths
    for path in paths.values():
        path.unlink(missing_ok=True)
    paths["a user's folder"].parent.rmdir()


def test_only_segments_of_intel_mpi_are_found_and_removed(mapped):
    found = segments_of("self")
    assert mapped["Intel MPI's"] in found
    assert not {mapped["a user's"], mapped["a user's folder"]} & set(found)
    remove_segments({mapped["Intel MPI's"]: found[mapped["Intel MPI's"]]})
    assert [path.exists() for path in mapped.values()] == [False, True, True]


def test_another_file_that_has_taken_the_name_stays(mapped):
    path = mapped["Intel MPI's"]
    noted = {path: segments_of("self")[path]}
    newer = path.with_name(f"{path.name}-newer")
    newer.write_bytes(b"of another job")
    newer.replace(path)
    remove_segments(noted)
    assert path.exists()


def test_libiomp5_s_segment_of_a_process_that_is_gone_is_removed():
    gone, alive = os.getpid() + 2**22, os.getpid()
    paths = [Path(f"/dev/shm/__KMP_REGISTERED_LIB_{pid}_{os.getuid()}") for pid in (gone, alive)]
    had_one = paths[1].exists()
    for path in paths:
        path.touch()
    remove_openmp_segments((gone, alive))
    assert [path.exists() for path in paths] == [False, True]
    if not had_one:
        paths[1].unlink()


def test_a_process_that_is_gone_has_none():
    assert segments_of(os.getpid() + 2**22) == {}
