"""What the tests of packed sets share: two sets that nobody changes."""

from __future__ import annotations

import pytest

from knl.data.pack import plan as planning

from .damage import copies
from .packers import pack
from .sets import AS_IS, RAW, class_folders, contents, pack_here


@pytest.fixture
def small_shards(monkeypatch):
    """Sets of a few pictures have several shards."""
    monkeypatch.setattr(planning, "_LEAST_SHARD", 5_000)
    monkeypatch.setattr(planning, "_SHARDS", 6)


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """A folder of class folders `made`, and what was packed from it as `jpeg` and as `raw`."""
    root = tmp_path_factory.mktemp("sets")
    class_folders(root / "made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_LEAST_SHARD", 16_000)
        patch.setattr(planning, "_SHARDS", 4)
        for name, form in (("jpeg", AS_IS), ("raw", RAW)):
            meta = pack_here(root / "made", root / name, form)
            assert len(meta.splits["train"].shards) >= 2
    return root


@pytest.fixture(scope="module")
def victims(sets, tmp_path_factory):
    """Copies of the two sets, to damage."""
    return copies(sets, tmp_path_factory.mktemp("victims"))


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Class folders in which three files are broken."""
    root = tmp_path_factory.mktemp("source") / "made"
    class_folders(root, 210, 30, side=150)
    (root / "train/pear/0001.JPEG").write_bytes(b"")
    (root / "train/plum/0005.JPEG").write_bytes(b"<html>")
    cut = root / "val/apple/0003.JPEG"
    cut.write_bytes(cut.read_bytes()[:900])
    return root


@pytest.fixture(scope="session")
def reference(source, tmp_path_factory):
    """All files of the set that one process makes of `source` without being disturbed."""
    folder = tmp_path_factory.mktemp("reference") / "set"
    pack(source, folder, "--processes", "1")
    return contents(folder)
