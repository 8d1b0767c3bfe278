"""The file of a checkpoint: read back as written, or named as damaged, whatever happens to it."""

from __future__ import annotations

import errno
import json
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from knl.errors import DamagedError, FailedError
from knl.train import checkpoint as module
from knl.train.checkpoint import Checkpoint, Mark, State, listed, name_of, read, write

RECIPE = {"name": "digits", "train": {"lanes": 4, "note": 'quotes " and \u00e9'}}


def state(step=7, **more):
    return State(
        step=step, epoch=0.5, recipe=RECIPE, ranks=2, samples=100, order=[2, 0, 1],
        weights_crc32="01234567", best=Mark(5, 0.5, 0.9, 1.25), **more,
    )  # fmt: skip


def tensors():
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "norm.num_batches_tracked": np.array(12),
        "empty": np.zeros((0, 3), np.float32),
        "momentum/conv.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
    }


@pytest.fixture
def path(tmp_path):
    return write(tmp_path, Checkpoint(state(), tensors()))


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__" and name.isprintable()),
        arrays.arrays(
            st.sampled_from([np.float32, np.float64, np.int64, np.int32, np.uint8]),
            arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
        ),
        max_size=5,
    ),
    st.integers(0, 10**9),
)
def test_what_is_written_is_read(tmp_path_factory, found, step):
    folder = tmp_path_factory.mktemp("written")
    back = read(write(folder, Checkpoint(state(step), found)))
    assert_equal(back.tensors, found)
    assert back.state == state(step)
    assert [path.name for path in folder.iterdir()] == [name_of(step)]


def test_any_order_in_memory_is_written_alike(tmp_path, path):
    turned = {name: np.array(array, order="F") for name, array in tensors().items()}
    other = write(tmp_path, Checkpoint(state(8), turned))
    assert_equal(read(other).tensors, tensors())


def test_a_flip_of_any_bit_is_seen(path):
    whole = path.read_bytes()
    places = [*range(8 * 80), *random.Random(0).sample(range(8 * len(whole)), 2000)]
    for place in places:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedError, match=f"checkpoint {path} is damaged: "):
            read(path)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_no_other_bytes_are_taken_for_one(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    whole = write(folder, Checkpoint(state(), tensors())).read_bytes()
    begin = data.draw(st.integers(0, len(whole)))
    rubbish = whole[:begin] + data.draw(st.binary(max_size=300)) + whole[begin + 20 :]
    if rubbish == whole:
        return
    path = folder / "rubbish"
    path.write_bytes(rubbish)
    with pytest.raises(DamagedError):
        read(path)


@pytest.mark.parametrize(
    ("keep", "what"),
    [(0, "it is empty"), (5, "it ends after 5 bytes"), (60, "it ends after 60 bytes"),
     (300, r"it has 300 of \d+ bytes"), (-1, r"it has \d+ of \d+ bytes")],
)  # fmt: skip
def test_a_truncated_one_is_told_with_its_sizes(path, keep, what):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedError, match=f"{what}$"):
        read(path)


def test_one_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FailedError, match="cannot be read: No such file"):
        read(tmp_path / name_of(3))
    (tmp_path / name_of(4)).mkdir()
    with pytest.raises(FailedError, match="cannot be read: Is a directory"):
        read(tmp_path / name_of(4))


def test_a_later_schema_is_refused_though_it_is_whole(tmp_path):
    found = write(tmp_path, Checkpoint(state(schema=2), tensors()))
    with pytest.raises(FailedError, match="none that this version of knl reads: its schema is 2"):
        read(found)


def test_a_whole_head_that_lies_is_refused(tmp_path, monkeypatch):
    """As somebody would write it who knows the checksum."""
    real = module._head

    def lying(state, found):
        head = real(state, found)
        return bytearray(bytes(head).replace(b'"shape": [4, 3, 3, 3]', b'"shape": [9, 3, 3, 3]'))

    monkeypatch.setattr(module, "_head", lying)
    found = write(tmp_path, Checkpoint(state(), tensors()))
    with pytest.raises(FailedError, match="is out of place"):
        read(found)


def test_plain_torch_reads_the_weights(path):
    """The snippet of the README."""
    raw = bytearray(path.read_bytes())
    size = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8 : 8 + size])
    begin = 8 + size + head["conv.weight"]["data_offsets"][0]
    shape = head["conv.weight"]["shape"]
    weight = torch.frombuffer(raw, dtype=torch.float32, count=108, offset=begin).reshape(shape)
    np.testing.assert_array_equal(weight.numpy(), tensors()["conv.weight"])


def test_the_safetensors_library_reads_it(path):
    safetensors = pytest.importorskip("safetensors.numpy")
    assert_equal(dict(sorted(safetensors.load_file(path).items())), dict(sorted(tensors().items())))


def test_the_newest_comes_first_and_other_files_do_not_count(tmp_path):
    for step in (9, 100_000_000, 20):
        write(tmp_path, Checkpoint(state(step), {}))
    (tmp_path / "step-00000021.safetensors.damaged").touch()
    (tmp_path / ".step-00000030.safetensors.x.tmp").touch()
    assert [p.name for p in listed(tmp_path)] == [name_of(n) for n in (100_000_000, 20, 9)]
    module.remove_temporaries(tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert listed(tmp_path / "none") == []


def test_a_failed_write_leaves_what_was_there(tmp_path, path, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, Checkpoint(state(), {}))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_get_the_users_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        found = write(tmp_path, Checkpoint(state(), {}))
    finally:
        os.umask(before)
    assert Path(found).stat().st_mode & 0o777 == 0o666 & ~mask
