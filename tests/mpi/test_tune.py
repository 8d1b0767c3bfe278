"""`knl tune` with real trials of a small network, and what goes wrong in them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace

import psutil
import pytest

from knl.choices import Choices, has_ipex
from knl.config import load_recipe
from knl.profile import load_profile
from knl.sysfs import read_topology
from knl.tune.trial import Bench

from .launch import knl, own_environment, run, started
from .runs import SMALL_RECIPE

LAYOUT = "ipex" if has_ipex() else "channels_last"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL_RECIPE)
    return path


@pytest.fixture
def bench(recipe):
    return Bench(read_topology(), load_recipe(str(recipe)), 16, 2, own_environment())


def tune(recipe, *options: str) -> list[str]:
    return knl("tune", "--recipe", str(recipe), "--out", "p.json", "--json", *options)


def test_a_search_ends_in_a_profile_that_train_and_run_take(recipe, tmp_path):
    done = run(tune(recipe, "--budget", "40s"), cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    wanted = {
        "best",
        "as_is_images_per_s",
        "rule_images_per_s",
        "best_images_per_s",
        "gain",
        "trials",
    }
    assert wanted <= set(result)
    assert result["gain"] == pytest.approx(
        result["best_images_per_s"] / result["as_is_images_per_s"]
    )
    labels = [trial["label"] for trial in result["trials"]]
    assert labels[:2] == ["as-is", "rule"] and set(labels[2:]) <= {"search"}
    assert result["trials"][0]["choices"] is None
    assert not list(tmp_path.glob("*.journal"))
    profile = load_profile(tmp_path / "p.json")
    assert profile.fingerprint.cores == len(read_topology().cores)
    assert all(setting.source == "profile" for setting in profile.plan.env.values())

    train = ("train", "digits", "--set", "train.steps=2", "--json", "--profile", "p.json")
    trained = json.loads(run(knl(*train), cwd=tmp_path, timeout=120).stdout)
    assert trained["plan"].startswith("plan of profile p.json")
    assert trained["layout"] == result["best"]["layout"]
    ran = run(knl("run", "--profile", "p.json", "-n", "1", "--", "env"), cwd=tmp_path)
    assert f"KNL_LAYOUT={result['best']['layout']}" in ran.stdout.splitlines()


def test_an_interrupted_search_keeps_what_it_learned_and_goes_on(recipe, tmp_path):
    with started(tune(recipe, "--budget", "10m"), cwd=tmp_path) as job:
        deadline = time.monotonic() + 90
        while not any("rule" in path.read_text() for path in tmp_path.glob("*.journal")):
            assert time.monotonic() < deadline, "no rule was tried"
            time.sleep(0.2)
        job.process.send_signal(signal.SIGINT)
        done = job.finish(30)  # and no trial is left behind
    assert done.returncode == 75, done.stderr
    kept = json.loads(done.stdout)["trials"]
    assert [trial["label"] for trial in kept][:2] == ["as-is", "rule"]
    assert load_profile(tmp_path / "p.json").trials
    again = run(tune(recipe, "--budget", "30s"), cwd=tmp_path, timeout=120)
    assert again.returncode == 0, again.stderr
    assert f"going on from {len(kept)} trials" in again.stderr
    assert json.loads(again.stdout)["trials"][: len(kept)] == kept


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trial_measures_each_step_but_the_first(bench, ranks):
    if ranks > len(os.sched_getaffinity(0)):
        pytest.skip("two ranks apart need two CPUs")
    measured = bench.measure(Choices(ranks_per_node=ranks, layout=LAYOUT), 90)
    assert measured.state == "complete", measured.reason
    assert len(measured.step_s) == 2 and min(measured.step_s) > 0
    assert measured.peak_bytes > 50e6


def test_a_hopeless_trial_is_pruned_after_its_first_step(bench):
    measured = replace(bench, steps=500).measure(Choices(ranks_per_node=1), 90, lambda step_s: True)
    assert measured.state == "pruned"
    assert len(measured.step_s) == 1
    assert not left()


def test_a_hanging_trial_is_ended_and_leaves_nothing(bench):
    measured = replace(bench, steps=100_000).measure(Choices(ranks_per_node=2), 8)
    assert (measured.state, measured.reason) == ("failed", "no end after 8 s: ended")
    assert not left()


def test_a_trial_that_cannot_run_says_why(bench):
    measured = bench.measure(Choices(ranks_per_node=1, dtype="bf16", layout="nonsense"), 90)  # type: ignore[arg-type]
    assert measured.state == "failed"
    assert "nonsense" in measured.reason


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_trial_is_told_as_killed(bench, ranks):
    def kill() -> None:
        while not (found := left()):
            time.sleep(0.1)
        time.sleep(10)  # by then they know each other, and mpiexec ends them all
        found[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    measured = replace(bench, steps=100_000).measure(Choices(ranks_per_node=ranks), 60)
    killer.join()
    assert (measured.state, measured.reason) == ("failed", "killed (signal 9): out of memory?")
    assert not left()


def left() -> list[psutil.Process]:
    """Ranks of trials that run now."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "knl.tune.steps" in line and "run" not in line and "-hosts" not in line:
            found.append(process)
    return found
