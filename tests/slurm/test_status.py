"""`knl status`: from what a run has written, without a job."""

from __future__ import annotations

import json
import subprocess

import pytest

from ..mpi.launch import knl, run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("status")
    done = run(
        knl("train", "digits", "--max-steps", "6", "--run-dir", str(folder / "runs" / "a b"))
    )
    assert done.returncode == 75, done.stderr
    return folder


def status(*arguments: str, cwd) -> subprocess.CompletedProcess[str]:
    return subprocess.run(knl("status", *arguments), cwd=cwd, capture_output=True, text=True)


def test_a_run_in_one_line(stopped):
    done = status(cwd=stopped)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("runs/a b: digits, not running, step 6, epoch 1.20 of 40, loss ")
    assert done.stdout.endswith(" min left\n") and " images/s, " in done.stdout


def test_a_run_as_json(stopped):
    found = json.loads(status("runs/a b", "--json", cwd=stopped).stdout)
    assert (found["step"], found["restarts"], found["job_id"]) == (6, 0, None)
    assert found["top1"] is None  # it was stopped before an evaluation
    assert found["images_per_s"] > 0 and found["seconds_left"] > 0


def test_rows_that_are_cut_or_no_numbers_are_no_matter(stopped, tmp_path):
    source = stopped / "runs" / "a b"
    for name in ("recipe.toml", "environment.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 7, "epoch": 1.4, "loss": null, "lr": 1.0, "images_per_s": null}\n{"ste'
        )
    done = status(str(tmp_path), cwd=tmp_path)
    assert "step 7, epoch 1.40 of 40, loss not a number" in done.stdout
    (tmp_path / "metrics.jsonl").unlink()
    assert "no step yet" in status(str(tmp_path), cwd=tmp_path).stdout


@pytest.mark.parametrize("arguments", [(), ("nowhere",)])
def test_no_run_is_told(tmp_path, arguments):
    done = status(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
