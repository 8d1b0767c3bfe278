"""`knl status`: what it makes of a run directory, and of what squeue says."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knl.config import load_recipe, to_toml
from knl.errors import InputError
from knl.slurm.status import line, newest_run, status_of
from knl.train.lock import Lock

from ..mpi.launch import knl


def made_run(folder, rows=(), overrides=("train.epochs=4",), **variables):
    """A run of digits, of 10 steps an epoch and 8 x 36 images a step."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe("digits", ["train.lanes=8", "train.lane_batch=36", *overrides])
    (folder / "recipe.toml").write_text(to_toml(recipe))
    (folder / "environment.json").write_text(json.dumps({"variables": variables}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def step(number, loss=1.0, speed=100.0):
    return {
        "step": number, "epoch": number / 10, "loss": loss, "lr": 0.1, "images_per_s": speed,
    }  # fmt: skip


@pytest.fixture
def no_slurm(monkeypatch):
    monkeypatch.setenv("PATH", "")


def test_one_line_says_it_all(tmp_path, no_slurm):
    rows = [step(19), step(20), {"step": 20, "epoch": 2.0, "top1": 0.5, "loss": 1.2}]
    run = made_run(tmp_path / "run", rows, SLURM_RESTART_COUNT="1", KNL_CONTINUED="2")
    left = 20 * 8 * 36 / 100 / 60
    assert line(status_of(run)) == (
        f"{run}: digits, not running, step 20 of 40, epoch 2.00, loss 1.0000, top-1 50.00%, "
        f"100.0 images/s, {left:.0f} min left, 3 restart(s)"
    )


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(1, 1e6), st.integers(0, 40))
def test_time_left_is_images_left_at_this_speed(tmp_path_factory, number, speed, at_most):
    folder = tmp_path_factory.mktemp("runs") / "run"
    overrides = ("train.epochs=4", f"train.steps={at_most}")
    found = status_of(made_run(folder, [step(number, speed=speed)], overrides))
    steps = at_most or 40
    assert found["steps"] == steps
    assert found["seconds_left"] == pytest.approx(max(0, steps - number) * 8 * 36 / speed)
    assert (", done, " in line(found)) == (number >= steps)


def test_what_is_half_written_is_passed_over(tmp_path, no_slurm):
    run = made_run(tmp_path / "run", [step(1), step(2, loss=None)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epo')
    (run / "environment.json").write_text("{")
    found = status_of(run)
    assert (found["step"], found["loss"], found["job_id"]) == (2, None, None)
    assert "loss not a number" in line(found)
    (run / "metrics.jsonl").unlink()
    assert line(status_of(run)) == f"{run}: digits, not running, no step yet"


def test_a_run_is_running_while_its_process_lives(tmp_path, no_slurm):
    run = made_run(tmp_path / "run")
    lock = Lock(run, {})
    try:
        assert status_of(run)["running"] is True
        owner = json.loads(lock.path.read_text())
        lock.path.write_text(json.dumps({**owner, "started": "1"}))
        assert status_of(run)["running"] is False, "another process has its number"
        lock.path.write_text(json.dumps({**owner, "host": "elsewhere"}))
        assert "perhaps running, on another host" in line(status_of(run))
    finally:
        lock.release()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo PENDING", "job 7 pending"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "job 7 over"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "job 7 not running"),
    ],
)
def test_what_squeue_says_of_the_job(tmp_path, monkeypatch, script, said):
    """A squeue of our own, for answers that a healthy Slurm gives rarely."""
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f"#!/bin/sh\n{script}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    run = made_run(tmp_path / "run", SLURM_JOB_ID="7")
    assert f"digits, {said}, no step yet" in line(status_of(run))


def test_the_run_written_last_is_meant(tmp_path):
    first, second = made_run(tmp_path / "a", [step(1)]), made_run(tmp_path / "b", [step(1)])
    os.utime(second / "metrics.jsonl", (1, 1))
    assert newest_run(tmp_path) == first
    with pytest.raises(InputError, match="no runs there"):
        newest_run(tmp_path / "none")


def test_json_is_one_object_and_a_folder_without_a_run_is_refused(tmp_path):
    run = made_run(tmp_path / "a run", [step(1)])
    done = subprocess.run(knl("status", str(run), "--json"), capture_output=True, text=True)
    assert json.loads(done.stdout)["step"] == 1
    done = subprocess.run(knl("status", str(tmp_path)), capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr == f"knl: {tmp_path}: no run directory of knl train (it has no recipe.toml)\n"
    )


def test_neither_submit_nor_status_pays_for_torch():
    code = "import sys, knl.slurm.submit, knl.slurm.status, knl.cli_slurm as _; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert not {"torch", "numpy", "matplotlib"} & set(loaded.split())
