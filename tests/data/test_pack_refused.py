"""What cannot be taken is listed; what cannot be packed is refused in one line; odd names work."""

from __future__ import annotations

import fcntl
import json
import shutil

import pytest
from PIL import Image

from knl import cli_data
from knl.data.pack import plan as planning
from knl.data.pack.shards import PARTS, read_note, write_shard
from knl.data.pack.sources import Reader
from knl.data.synth import make_jpeg, synthesise
from knl.errors import FailedError, InputError

from ..mpi.launch import knl, run
from .packers import command, one_line, pack, refused
from .sets import AS_IS, SMALL, class_folders, contents, pack_here

BROKEN = {
    "train/pear/0001.JPEG": "empty file",
    "train/plum/0005.JPEG": "not a picture that Pillow knows",
    "val/apple/0003.JPEG": "does not decode: ",
}
ODD = ("tea cup", 'a"b', "it's", "line\nbreak", "naïve 猫", "$(touch x)", "-rf")


def test_what_is_rejected_is_listed_with_the_reason(reference):
    listed = [json.loads(line) for line in reference["rejected.jsonl"].decode().splitlines()]
    assert {entry["key"] for entry in listed} == set(BROKEN)
    for entry in listed:
        assert entry["reason"].startswith(BROKEN[entry["key"]])
    assert json.loads(reference["meta.json"])["rejected"] == 3


def test_more_rejected_than_wanted_end_it_and_a_higher_limit_goes_on(source, reference, tmp_path):
    folder = tmp_path / "set"
    line = refused(command(source, folder, "--max-rejected", "2", "--processes", "1"), 1)
    assert "3 pictures cannot be taken, more than --max-rejected 2; the first: " in line
    assert not (folder / "meta.json").exists()
    pack(source, folder, "--max-rejected", "3", "--processes", "1")
    assert contents(folder) == reference


def test_the_finish_counts_those_of_all_parts(tmp_path):
    class_folders(tmp_path / "src")
    for number in range(2):
        (tmp_path / f"src/train/plum/x{number}.JPEG").write_bytes(b"")
    with pytest.raises(FailedError, match="2 pictures cannot be taken, more than --max-rej") as why:
        pack_here(tmp_path / "src", tmp_path / "set", limit=1)
    assert "train/plum/x" in str(why.value) and "rejected.jsonl" in str(why.value)
    assert (tmp_path / "set/rejected.jsonl").read_text().count("empty file") == 2
    assert pack_here(tmp_path / "src", tmp_path / "set", limit=2).rejected == 2


def test_pictures_that_went_or_cannot_be_read_since_they_were_listed(tmp_path):
    class_folders(tmp_path / "src")
    planning.make_plan(tmp_path / "src", tmp_path / "set", AS_IS)
    (tmp_path / "src/train/plum/0005.JPEG").unlink()
    (tmp_path / "src/train/pear/0001.JPEG").unlink()
    (tmp_path / "src/train/pear/0001.JPEG").mkdir()
    assert pack_here(tmp_path / "src", tmp_path / "set").rejected == 2
    text = (tmp_path / "set/rejected.jsonl").read_text()
    assert "No such file" in text and "Is a directory" in text


def test_nothing_but_broken_pictures(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"src/{split}/a").mkdir(parents=True)
        (tmp_path / f"src/{split}/a/1.jpg").write_bytes(b"x")
    line = refused(command(tmp_path / "src", tmp_path / "set"), 2)
    assert "train" in line and "empty" in line


def begun(source, folder, form):
    """A folder in which a packer stopped after its first shard."""
    plan = planning.make_plan(source, folder, form)
    shard = plan.shards[0]
    items = planning.items_of(folder, shard)
    reader = Reader(source, plan.kind)
    write_shard(folder, shard.name, items, reader, form, len(plan.classes), lambda taken: None)
    return shard


def test_a_begun_folder_takes_no_other_form_or_source(sets, tmp_path):
    source, folder = sets / "made", tmp_path / "set"
    shutil.copytree(source, tmp_path / "other")
    begun(source, folder, SMALL)
    before = contents(folder)
    words = f"was begun from {source} as --short-side 48 --quality 90: go on with the same"
    small = ["--short-side", "48"]
    assert words in refused(knl("data", "pack", str(source), str(folder), "--raw", "24"), 2)
    assert words in refusal("pack", source, folder, *small, "--quality", "80")
    assert words in refusal("pack", tmp_path / "other", folder, *small)
    assert words in refusal("pack", source, folder, "--finish")
    assert contents(folder) == before


def test_a_finished_set_is_refused_and_stays(sets, tmp_path):
    source, folder = sets / "made", tmp_path / "set"
    shutil.copytree(sets / "jpeg", folder)
    words = f"{folder} is a finished set of {source} already: knl data info shows it"
    assert words in refused(knl("data", "pack", str(source), str(folder)), 2)
    for more in (["--finish"], ["--part", "1/2"], ["--raw", "16"]):
        assert words in refusal("pack", source, folder, *more)
    assert contents(folder) == contents(sets / "jpeg")


def refusal(*arguments):
    """The one line with which `knl data` refuses, in this process."""
    with pytest.raises(InputError) as caught:
        cli_data.app([str(word) for word in arguments], standalone_mode=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{made}", "{made}/train/pear/0001.JPEG"], "a file, must be a folder to pack into"),
        (["{made}", "{made}/../jpeg/meta.json/x"], "Not a directory"),
        (["{made}/none", "{tmp}/set"], "/none: not a folder"),
        (["{made}", "{tmp}/set", "--part", "4/3"], "--part 4/3: must be I/N"),
        (["{made}", "{tmp}/set", "--part", "x"], "--part x: must be I/N"),
        (["{made}", "{tmp}/set", "--raw", "9", "--short-side", "16"], "give one of the two"),
        (["{made}", "/proc/set"], "/proc/set"),
    ],
)
def test_wrong_use_is_one_line(sets, tmp_path, arguments, words):
    given = [word.format(made=sets / "made", tmp=tmp_path) for word in arguments]
    assert words in refusal("pack", *given)


def test_a_shard_that_another_packer_writes_is_left_to_it(sets, tmp_path):
    folder = tmp_path / "set"
    plan = planning.make_plan(sets / "made", folder, AS_IS)
    theirs = folder / f".{plan.shards[0].name}.arrow.tmp"
    with theirs.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"half")
        file.flush()
        with pytest.raises(FailedError, match="another packer is writing it: let it end"):
            begun(sets / "made", folder, AS_IS)
        assert theirs.read_bytes() == b"half"
    shard = begun(sets / "made", folder, AS_IS)
    assert read_note(folder, shard.name) and not theirs.exists()


def test_a_damaged_note_costs_its_shard_and_a_damaged_plan_is_told(sets, tmp_path):
    folder = tmp_path / "set"
    shard = begun(sets / "made", folder, AS_IS)
    (folder / PARTS / f"{shard.name}.json").write_bytes(b"\xff{")
    assert read_note(folder, shard.name) is None
    (folder / PARTS / "plan.arrow").write_bytes(b"ARROW1\0\0")
    with pytest.raises(FailedError, match="if the file is damaged, remove the folder first"):
        pack_here(sets / "made", folder)


def test_odd_names_of_folders_classes_and_files(tmp_path):
    source = tmp_path / "my 'pictures\" \n of é"
    for label, name in enumerate(ODD):
        for split in ("train", "val"):
            place = source / split / name
            place.mkdir(parents=True)
            for number in range(2):
                jpeg = make_jpeg(number, label, (40, 40))
                (place / f"{number} of {name}.JPEG").write_bytes(jpeg)
    (source / "train/it's/bad \n ü.png").write_bytes(b"")
    folder = tmp_path / "the $(set) \n ü"
    done = run(knl("data", "pack", str(source), str(folder), "--json", "--processes", "1"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["classes"] == sorted(ODD) and result["source"] == str(source)
    assert result["splits"]["train"]["images"] == 2 * len(ODD)
    (line,) = (folder / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "train/it's/bad \n ü.png"
    done = run(knl("data", "verify", str(folder), "--json"))
    assert json.loads(done.stdout)["faults"] == []
    sheet = tmp_path / "a sheet.png"
    done = run(knl("data", "info", str(folder), "--json", "--png", str(sheet)))
    assert json.loads(done.stdout)["contact_sheet"] == str(sheet)
    with Image.open(sheet) as drawn:
        assert drawn.width == 1120
    assert not (tmp_path / "x").exists()


def test_info_says_what_a_set_holds(sets, tmp_path):
    done = run(knl("data", "info", str(sets / "raw")))
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == f"{sets}/raw: uint8 24 x 24 x 3, from {sets}/made"
    assert lines[1].split()[:3] == ["train", "24", "images"] and "8 to 8 of each class" in lines[1]
    assert lines[3] == "3 classes: apple, pear, plum"
    done = run(knl("data", "info", str(sets / "raw"), "--png", str(tmp_path / "no/x.png")))
    assert done.returncode == 2
    assert one_line(done) == f"knl: --png {tmp_path}/no/x.png: No such file or directory"


def test_a_folder_inside_what_is_packed_is_refused_and_not_made(tmp_path):
    synthesise(tmp_path / "tree", 40, 4)
    for folder in (tmp_path / "tree" / "packed", tmp_path / "tree"):
        done = run(knl("data", "pack", str(tmp_path / "tree"), str(folder)))
        assert done.returncode == 2 and "choose a folder outside" in done.stderr
    assert not (tmp_path / "tree" / "packed").exists()
    missing = run(knl("data", "pack", str(tmp_path / "no"), str(tmp_path / "out")))
    assert missing.returncode == 2 and "not a folder" in missing.stderr
    assert not (tmp_path / "out").exists()


def test_a_tree_without_its_training_half_is_refused(tmp_path):
    synthesise(tmp_path / "tree", 40, 4)
    shutil.rmtree(tmp_path / "tree" / "train")
    done = run(knl("data", "pack", str(tmp_path / "tree"), str(tmp_path / "out")))
    assert done.returncode == 2 and "val but no train" in done.stderr
