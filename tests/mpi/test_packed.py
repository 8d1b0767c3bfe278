"""From image files to accuracy, on two real ranks: JPEG and raw, staged, and with damage."""

from __future__ import annotations

import json
import shutil

import pytest

from .launch import knl, run
from .runs import finished

RECIPE = """
[model]
name = "resnet-small"
zero_init_gamma = true
[data]
name = "packed"
path = "{path}"
image_size = 48
crop = 40
augment = "{augment}"
chunk = 16
[train]
epochs = {epochs}
lanes = 4
lane_batch = 16
[optim]
eta = 0.02
[schedule]
lr = 1.0
warmup_epochs = 0.5
"""
FORMS = {"jpeg": ["--short-side", "48"], "raw": ["--raw", "48"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the sets `jpeg` and `raw`, 900 pictures to train on."""
    place = tmp_path_factory.mktemp("packed")
    made = run(knl("data", "synth", "tree", "--images", "1000", "--classes", "4"), cwd=place)
    assert made.returncode == 0, made.stderr
    for name, form in FORMS.items():
        done = run(knl("data", "pack", "tree", name, *form, "--json"), cwd=place)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["splits"]["train"]["images"] == 900
    return place


def train(place, path, *options, ranks=2, epochs=1, augment="random-resized-crop"):
    (place / "recipe.toml").write_text(RECIPE.format(path=path, augment=augment, epochs=epochs))
    command = knl("train", "recipe.toml", "-n", str(ranks), "--json", *options)
    return run(command, cwd=place, timeout=120.0, OMP_NUM_THREADS="1")


@pytest.mark.parametrize("name", FORMS)
def test_a_network_learns_from_packed_files(place, name):
    result = finished(train(place, name, epochs=3), place)
    assert result.result["top1"] > 0.6 and result.result["damaged_records"] == 0
    assert result.losses[-1] < 0.7 * result.losses[0]


def test_one_rank_and_two_see_the_same(place):
    one, two = (finished(train(place, "jpeg", ranks=ranks), place) for ranks in (1, 2))
    assert one.losses == pytest.approx(two.losses, rel=1e-3)
    assert one.losses[0] == pytest.approx(two.losses[0], rel=1e-6)


def test_a_staged_run_is_the_same_to_the_bit(place):
    (place / "local").mkdir()
    plain = finished(train(place, "raw"), place)
    staged = finished(train(place, "raw", "--stage", "local"), place)
    assert staged.losses == plain.losses
    assert staged.result["stage"]["nodes"] == 1 and staged.result["stage"]["in_place"] == {}
    assert list((place / "local").iterdir()) == []
    elsewhere = train(place, "raw", "--stage", "nowhere")
    assert finished(elsewhere, place).losses == plain.losses
    assert "read in place" in elsewhere.stderr and "nowhere" in elsewhere.stderr


def damaged(place, name, count):
    """A copy of a set with one byte flipped in each of so many records."""
    folder = place / f"{name}-{count}"
    shutil.copytree(place / name, folder)
    shard = folder / "train-00000.arrow"
    content = bytearray(shard.read_bytes())
    for number in range(count):
        content[(number + 1) * len(content) // (count + 2)] ^= 1
    shard.write_bytes(content)
    return folder


@pytest.mark.parametrize("name", FORMS)
def test_training_survives_a_flipped_byte_and_verify_names_it(place, name):
    folder = damaged(place, name, 1)
    done = train(place, folder, epochs=2)
    assert finished(done, place).result["damaged_records"] == 1
    told = [line for line in done.stderr.splitlines() if "train-00000.arrow record" in line]
    assert told and "checksum" in told[0]
    verified = run(knl("data", "verify", str(folder)))
    where = told[0].partition("train-00000.arrow record ")[2].partition(":")[0]
    assert verified.returncode == 1
    assert f"train-00000.arrow record {where}: checksum" in verified.stdout


def test_too_much_damage_stops_all_ranks_at_once_and_says_where(place):
    folder = damaged(place, "raw", 8)
    done = train(place, folder, "--set", "data.max_damaged=5")
    assert done.returncode == 1
    words = [line for line in done.stderr.splitlines() if "data.max_damaged = 5" in line]
    assert len(words) == 1 and "train-00000.arrow record" in words[0]
    enough = train(place, folder, "--set", "data.max_damaged=8")
    assert finished(enough, place).result["damaged_records"] == 8


def test_a_stage_for_another_set_is_refused(place):
    done = run(knl("train", "digits", "-n", "2", "--stage", "."), cwd=place)
    assert done.returncode == 2 and "--stage" in done.stderr and "digits" in done.stderr
    assert "Traceback" not in done.stderr
