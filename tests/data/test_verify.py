"""No damage to a packed set passes `knl data verify`, and none makes it crash."""

from __future__ import annotations

import json
import shutil
import zlib

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knl.data.pack import shards
from knl.data.pack.verify import verify
from knl.data.packed_set import META, Meta, read_meta, record_crc32
from knl.errors import InputError

from ..mpi.launch import knl, run
from .damage import KINDS, bits, changed, files_of, flipped, fuzzed, hit, places
from .sets import pack_here


def look(folder):
    """Faults, as (file, record, reason)."""
    seen = []
    try:
        faults = verify(folder, read_meta(folder), seen.append)
    except InputError as error:
        assert str(folder / META) in str(error) and "\n" not in str(error)
        return [(META, None, str(error))]
    for fault in faults:
        assert fault.reason and "\n" not in fault.reason
    return [fault[1:] for fault in faults]


@KINDS
def test_a_whole_set_has_no_fault(sets, kind):
    meta, seen = read_meta(sets / kind), []
    assert verify(sets / kind, meta, seen.append) == []
    assert sum(seen) == sum(split.records for split in meta.splits.values()) == 30


@KINDS
@fuzzed
@given(data=st.data(), place=places, bit=bits)
def test_a_flipped_bit_is_found_and_its_file_and_record_named(victims, kind, data, place, bit):
    folder = victims / kind
    path = folder / data.draw(st.sampled_from(files_of(folder)))
    whole = path.read_bytes()
    place = int(place * len(whole))
    wanted = [where.record for where in hit(folder, path.name, [place])]
    with changed(path, flipped(whole, place, bit)):
        faults = look(folder)
    assert [file for file, _, _ in faults] == [path.name]
    assert [record for _, record, _ in faults] == (wanted or [None])


@KINDS
@fuzzed
@given(place=places, bit=bits)
def test_a_flipped_bit_of_meta_json_is_found_or_changes_nothing(victims, kind, place, bit):
    folder = victims / kind
    path, before = folder / META, read_meta(folder)
    whole = path.read_bytes()
    with changed(path, flipped(whole, int(place * len(whole)), bit)):
        if look(folder):
            return
        after = read_meta(folder)
    assert after == before


@KINDS
@fuzzed
@given(data=st.data(), share=places)
def test_a_truncated_file_is_found(victims, kind, data, share):
    folder = victims / kind
    path = folder / data.draw(st.sampled_from(files_of(folder, meta=True)))
    whole = path.read_bytes().rstrip()
    with changed(path, whole[: int(share * len(whole))]):
        assert {file for file, _, _ in look(folder)} == {path.name}


@KINDS
@fuzzed
@given(data=st.data(), more=st.binary(min_size=1, max_size=999).filter(bytes.strip))
def test_what_was_added_to_a_file_is_found(victims, kind, data, more):
    folder = victims / kind
    path = folder / data.draw(st.sampled_from(files_of(folder, meta=True)))
    with changed(path, path.read_bytes() + more):
        assert {file for file, _, _ in look(folder)} == {path.name}


@KINDS
def test_a_missing_or_empty_file_is_found(victims, kind):
    folder = victims / kind
    for name in files_of(folder, meta=True):
        for data in (None, b""):
            with changed(folder / name, data):
                faults = look(folder)
            assert {file for file, _, _ in faults} == {name}
            if data is None and name != META:
                assert faults[0][2].endswith("No such file or directory")


@KINDS
def test_shards_of_another_set_and_in_each_others_place_are_found(victims, kind):
    folder = victims / kind
    other = victims / ("raw" if kind == "jpeg" else "jpeg")
    one, two = folder / "train-00000.arrow", folder / "train-00001.arrow"
    with changed(one, (other / one.name).read_bytes()):
        assert {file for file, _, _ in look(folder)} == {one.name}
    first, second = one.read_bytes(), two.read_bytes()
    with changed(one, second), changed(two, first):
        assert {file for file, _, _ in look(folder)} == {one.name, two.name}


def test_a_folder_in_a_shards_place_is_found(victims):
    path = victims / "jpeg/val-00000.arrow"
    with changed(path, None):
        path.mkdir()
        assert {file for file, _, _ in look(victims / "jpeg")} == {path.name}
        path.rmdir()


def test_a_record_that_was_packed_wrongly_is_found(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "convert", lambda source, form: source[:-30])
    pack_here(sets / "made", tmp_path / "set")
    faults = look(tmp_path / "set")
    assert len(faults) == 30 and all("does not decode" in reason for _, _, reason in faults)


def test_a_label_that_is_no_class_is_found(sets, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(sets / "raw", folder)
    meta = json.loads((folder / META).read_bytes())
    split = meta["splits"]["train"]
    index = np.load(folder / split["index"])
    _, start, length, _, _ = index[3].tolist()
    pixels = (folder / split["shards"][0]["file"]).read_bytes()[start : start + length]
    index["label"][3], index["crc32"][3] = 7, record_crc32(pixels, 7)
    np.save(folder / split["index"], index)
    split["index_crc32"] = zlib.crc32((folder / split["index"]).read_bytes())
    changed_meta = msgspec.convert(meta, Meta)
    whole = msgspec.structs.replace(changed_meta, crc32=changed_meta.checksum())
    (folder / META).write_bytes(msgspec.json.encode(whole))
    assert look(folder) == [("train-00000.arrow", 3, "label 7: must be 0 to 2")]


def test_the_command_names_shard_and_record(victims):
    folder = victims / "jpeg"
    done = run(knl("data", "verify", str(folder)))
    assert (done.returncode, done.stdout) == (0, f"{folder}: 30 records, all whole\n")
    path = folder / "train-00001.arrow"
    whole = path.read_bytes()
    (where,) = hit(folder, path.name, [len(whole) // 2])
    with changed(path, flipped(whole, len(whole) // 2, 0)):
        done = run(knl("data", "verify", str(folder)))
        as_json = run(knl("data", "verify", str(folder), "--json"))
    assert done.returncode == as_json.returncode == 1
    assert done.stdout.splitlines() == [
        f"{path} record {where.record}: checksum",
        f"{folder}: 1 faults; copy or pack these shards again",
    ]
    (fault,) = json.loads(as_json.stdout)["faults"]
    assert (fault["shard"], fault["record"]) == (path.name, where.record)


@pytest.mark.parametrize("command", ["verify", "info"])
def test_what_is_no_set_is_refused_in_one_line(tmp_path, command):
    done = run(knl("data", command, str(tmp_path)))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"knl: {tmp_path}/meta.json not found: ")
