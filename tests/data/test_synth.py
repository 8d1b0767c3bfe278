"""`knl data synth`: real JPEGs of several sizes, in class folders, always the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from knl.data.synth import synthesise
from knl.errors import InputError

from ..mpi.launch import knl, run
from .sets import contents, pack_here


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth") / "made"
    return folder, synthesise(folder, 120, 12)


def test_it_says_what_it_made(made):
    folder, result = made
    files = contents(folder)
    assert (result["train"], result["val"]) == (108, 12)
    assert sum(name.startswith("train/") for name in files) == 108
    assert result["bytes"] == sum(map(len, files.values()))


def test_each_class_has_pictures_in_both_splits(made):
    for split, count in (("train", 9), ("val", 1)):
        folders = sorted((made[0] / split).iterdir())
        assert [f.name for f in folders] == [f"class-{n:02}" for n in range(12)]
        assert {len(list(f.iterdir())) for f in folders} == {count}


def test_they_are_jpegs_of_several_sizes(made):
    sizes = set()
    for data in contents(made[0]).values():
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        assert simplejpeg.decode_jpeg(data).std() > 10
        sizes.add((width, height))
    assert len(sizes) > 60
    assert min(map(min, sizes)) >= 120 and max(map(max, sizes)) <= 240


def test_no_two_are_the_same_and_all_are_again(made, tmp_path):
    files = contents(made[0])
    assert len(set(files.values())) == len(files)
    synthesise(tmp_path / "again", 120, 12)
    assert contents(tmp_path / "again") == files


def test_pictures_of_a_class_have_more_in_common(made):
    """By their mean colour, which light alone changes within a class."""
    means = {}
    for folder in (made[0] / "train").iterdir():
        colours = [np.asarray(Image.open(path)).mean(axis=(0, 1)) for path in folder.iterdir()]
        means[folder.name] = np.array([colour - colour.mean() for colour in colours])
    within = np.mean([m.std(axis=0).mean() for m in means.values()])
    between = np.std([m.mean(axis=0) for m in means.values()], axis=0).mean()
    assert between > 5 * within


def test_it_can_be_packed(made, tmp_path):
    meta = pack_here(made[0], tmp_path / "set")
    assert meta.rejected == 0 and meta.splits["train"].per_class == [9] * 12


def test_an_empty_folder_is_filled(tmp_path):
    assert synthesise(tmp_path, 20, 2)["val"] == 2


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="is not empty: choose another folder"):
        synthesise(tmp_path, 20, 2)
    assert contents(tmp_path) == {"mine": b"x"}


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(InputError, match="Not a directory"):
            synthesise(folder, 20, 2)


@pytest.mark.parametrize(("images", "classes"), [(19, 2), (99, 10), (5, 5)])
def test_too_few_for_each_class_to_have_one_to_test_on_are_refused(tmp_path, images, classes):
    with pytest.raises(InputError, match=f"--images {images}: must be at least {10 * classes}"):
        synthesise(tmp_path / "made", images, classes)
    assert not (tmp_path / "made").exists()


def test_the_command_prints_one_object(tmp_path):
    line = knl("data", "synth", str(tmp_path / "made"), "--images", "20", "--classes", "2")
    done = run([*line, "--json"])
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["train"] == 18
    done = run(line)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == f"knl: {tmp_path}/made is not empty: choose another folder, or remove it\n"
    )
