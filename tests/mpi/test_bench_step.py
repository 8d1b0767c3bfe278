"""`knl bench step` with a small network: every rival trains, and ratios are those of the speeds."""

from __future__ import annotations

import json

import pytest

from .launch import knl, run
from .runs import SMALL_RECIPE

SMALL = ("--images", "8", "--steps", "2", "--rounds", "2")


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    place = tmp_path_factory.mktemp("bench")
    (place / "small.toml").write_text(SMALL_RECIPE)
    done = run(knl("bench", "step", "--recipe", "small.toml", *SMALL, "--json"), place, 200.0)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_rival_that_is_there_was_measured_and_others_have_a_reason(result):
    for name in ("plain", "run_cpu", "rule", "tuned"):
        speed = result[f"{name}_images_per_s"]
        assert speed > 0 if speed is not None else result["missing"][name]
    assert result["plain_images_per_s"] and result["rule_images_per_s"]
    assert "knl tune" in result["missing"]["tuned"]
    assert result["images"] == 8 and result["rounds"] == 2 and result["model"] == "resnet-small"


@pytest.mark.parametrize("ratio", ["rule_over_plain", "tuned_over_plain", "tuned_over_run_cpu"])
def test_ratios_are_quotients_of_the_speeds(result, ratio):
    a, _, b = ratio.partition("_over_")
    speeds = result[f"{a}_images_per_s"], result[f"{b}_images_per_s"]
    if None in speeds:
        assert result[ratio] is None
    else:
        assert result[ratio] == pytest.approx(speeds[0] / speeds[1])


def test_the_parts_of_a_step_are_told(result):
    assert set(result["breakdown"]) == {"forward_s", "backward_s", "sync_s", "lars_s", "data_s"}
    assert all(value >= 0 for value in result["breakdown"].values())
    assert 0 < result["conv_share"] < 1
    shares = [op["share"] for op in result["ops"]]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 1.0001


def test_a_recipe_that_is_not_there_is_refused_in_one_line(tmp_path):
    done = run(knl("bench", "step", "--recipe", "nix"), tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("knl: recipe 'nix' not found")
    assert done.stderr.count("\n") == 1
