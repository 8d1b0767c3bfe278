"""`knl scale run` with real ranks: what it measures, keeps, refuses; and its report."""

from __future__ import annotations

import json
import time

import pytest

from knl.scaling.breakdown import PARTS

from .launch import knl, run, started
from .runs import SMALL_RECIPE


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(SMALL_RECIPE.replace("lane_batch = 16", "lane_batch = 8"))
    return path


def scale(*arguments: object):
    return run(knl("scale", "run", *map(str, arguments)), timeout=180)


def measured(*arguments: object) -> dict:
    done = scale(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def study(recipe, tmp_path_factory):
    """One and two ranks, twice, though the first start measured them once only."""
    folder = tmp_path_factory.mktemp("study") / "out"
    command = (recipe, "--ranks", "1,2", "--steps", 3, "--out", folder)
    first = measured(*command, "--repetitions", 1)
    return folder, first, measured(*command, "--repetitions", 2)


def test_weak_scaling_gives_each_node_the_batch_of_a_lane(study):
    _, _, result = study
    points = {(p["nodes"], p["repetition"]): p for p in result["points"]}
    assert set(points) == {(1, 0), (1, 1), (2, 0), (2, 1)}
    for (nodes, _), p in points.items():
        assert (p["global_batch"], p["lanes"], p["ranks"]) == (8 * nodes, nodes, nodes)
        assert len(p["step_s"]["all"]) == p["steps"] == 3 and p["failed"] is None
        assert [rank["rank"] for rank in p["per_rank"]] == list(range(nodes))
        assert p["images_per_s"] == pytest.approx(p["global_batch"] / p["step_s"]["median"])
        assert set(p["breakdown"]) == set(PARTS) and p["breakdown"]["compute"] > 0


def test_what_was_measured_stays_when_a_study_goes_on(study):
    folder, first, result = study
    before = [p for p in result["points"] if p["repetition"] == 0]
    assert before == first["points"]
    assert {path.name for path in (folder / "points").iterdir()} == {"1.json", "2.json"}


def test_buckets_and_tensors_are_those_of_backward(study):
    _, _, result = study
    assert sum(t["bytes"] for t in result["tensors"]) == 4 * result["parameters"]
    assert sum(b["bytes"] for b in result["buckets"]) == 4 * result["parameters"]
    ready = [b["ready_s"] for b in result["buckets"]]
    assert ready == sorted(ready) and 0 < ready[-1] <= 1.2 * result["backward_s"]
    assert result["tensors"][-1]["name"].startswith("0.")  # the first layer's comes last
    assert result["forward_s"] > 0 and result["cores_per_rank"] >= 0


def test_the_rows_are_quotients_and_the_words_are_there(study):
    _, _, result = study
    one, two = result["rows"]
    assert two["speed_up"] == pytest.approx(two["images_per_s"] / one["images_per_s"])
    assert two["efficiency"] == pytest.approx(two["speed_up"] / 2)
    assert {"baseline", "ideal", "efficiency", "straggler"} <= set(result["words"])
    assert "stand for nodes" in result["note"]


def test_its_report_is_one_page(study):
    folder, _, _ = study
    done = run(knl("report", str(folder), "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "study" and (folder / "report.html").exists()


def test_strong_scaling_keeps_the_batch_and_shows_who_waits(recipe, tmp_path):
    lanes = ("--set", "train.lanes=3", "--set", "train.lane_batch=16")
    result = measured(recipe, "--ranks", 2, "--steps", 4, "--repetitions", 1, "--strong", *lanes,
                      "--out", tmp_path)  # fmt: skip
    (found,) = result["points"]
    assert (found["global_batch"], found["lanes"]) == (48, 3)
    busy, idle = found["per_rank"]
    assert busy["compute"] > idle["compute"]  # two lanes against one
    assert idle["straggler"] > busy["straggler"]


def test_a_point_that_fails_is_kept_with_its_reason_and_others_go_on(tmp_path):
    big = ("--set", "train.lane_batch=1000", "--steps", 1, "--repetitions", 1, "--out", tmp_path)
    done = scale("digits", "--ranks", "1,2", *big)
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "study.json").read_text())["points"]
    assert points[0]["failed"] is None
    assert "more than the 1437 samples of the set" in points[1]["failed"]
    assert "2 node(s), repetition 1: failed" in done.stdout
    other = scale("digits", "--ranks", "1", "--steps", 1, "--out", tmp_path)
    assert other.returncode == 2 and "is of another study" in other.stderr


def test_a_study_that_is_killed_keeps_its_points(recipe, tmp_path):
    command = knl("scale", "run", str(recipe), "--ranks", "1,2", "--steps", "2",
                  "--repetitions", "9", "--out", str(tmp_path))  # fmt: skip
    with started(command) as job:
        deadline = time.monotonic() + 60
        while not (tmp_path / "points" / "1.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.kill()
    assert json.loads((tmp_path / "points" / "1.json").read_text())["points"]
    done = scale(recipe, "--ranks", "1", "--steps", 2, "--repetitions", 1, "--out", tmp_path)
    if done.returncode == 0:  # a rank has as many cores as before
        assert "1 node(s), repetition 1: kept, measured before" in done.stderr
    else:
        assert "cores_per_rank" in done.stderr and "the same --ranks" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits"], "give --ranks 1,2,4"),
        (["digits", "--ranks", "0,1"], "--ranks 0,1: must be whole numbers from 1 on"),
        (["digits", "--ranks", "a"], "--ranks a: must be"),
        (["digits", "--nodes", "2"], "not in a Slurm job"),
        (["digits", "--ranks", "1", "--nodes", "1"], "give --ranks 1,2,4"),
        (["nothing", "--ranks", "1"], "recipe 'nothing' not found"),
        (["digits", "--ranks", "8", "--strong"], "train.lanes=4: fewer than the 8 ranks"),
    ],
)
def test_bad_questions_are_one_line(tmp_path, arguments, words):
    done = run(knl("scale", "run", *arguments, "--out", str(tmp_path / "out")))
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []
