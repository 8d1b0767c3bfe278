"""The command as a user types it: what it prints, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from knl import __version__
from knl.config import load_recipe, recipe_names

QUICK = ["--set", "train.epochs=1", "--set", "train.eval_every=0"]


def knl(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "knl", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def assert_refused(done, code, *words):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("knl: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert done.stdout == ""


def test_help_has_an_example_and_costs_no_torch():
    assert "Example: knl train digits" in knl("train", "--help").stdout
    code = (
        "import sys; from knl.cli import app; "
        "print([m for m in ('torch', 'numpy', 'msgspec') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_version_and_list_and_print():
    assert knl("--version").stdout.strip() == f"knl {__version__}"
    assert knl("train", "--list").stdout.split() == recipe_names()
    printed = knl("train", "digits", "--print", "--set", "train.epochs=7").stdout
    assert "epochs = 7" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], ["which recipe?"]),
        (["train", "digitz"], ["'digitz' not found, did you mean digits?"]),
        (["train", "digits", "--set", "train.lans=1"], ["train.lans: unknown key"]),
        (["train", "digits", "-n", "5"], ["train.lanes=4: fewer than the 5 ranks"]),
        (["train", "digits", "--set", "train.lanes=1000"], ["global batch", "more than the 1437"]),
        (["train", "resnet50-32k"], ["data.name = 'packed'", "data.name=synthetic"]),
        (["train", "fashion-mnist", "--set", "data.path=/no/where"], ["/no/where", "data.path"]),
        (["train", "digits", "--set", "data.crop=9"], ["data.crop = 9", "0 to 8"]),
        (["train", "digits", "--set", "model.name=alexnet"], ["alexnet", "227", "data has 8"]),
        (["train", "digits", "--run-dir", "/proc/x"], ["/proc/x", "cannot be written"]),
    ],
)
def test_wrong_input_ends_in_one_line_and_status_2(arguments, words):
    assert_refused(knl(*arguments), 2, *words)


@pytest.mark.parametrize("arguments", [["trane"], ["train", "digits", "--provider", "nccl"]])
def test_wrong_usage_ends_with_status_2_and_no_traceback(arguments):
    done = knl(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_run_leaves_its_recipe_environment_and_metrics_and_says_its_result_again(tmp_path):
    folder = tmp_path / "a run"
    arguments = ["train", "digits", *QUICK, "--run-dir", str(folder), "--json"]
    done = knl(*arguments, KNL_PASSWORD_LIKE="x", MY_SECRET="y")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["run_dir"] == str(folder)
    assert load_recipe(str(folder / "recipe.toml")) == load_recipe(
        "digits", [*QUICK[1::2], f"train.layout={result['layout']}", "comm.bucket_mb=16.0"]
    )
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert "MY_SECRET" not in environment["variables"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 5]
    again = json.loads(knl(*arguments).stdout)
    times = {"wall_s": 0, "images_per_s": 0, "start_s": 0}
    assert {**again, **times} == {**result, **times}
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    other = knl(*arguments, "--set", "train.seed=2")
    assert_refused(other, 2, str(folder), "holds a run of another recipe: train.seed was 0, is 2")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_run_directories_get_the_umask_and_no_more(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "knl", "train", "digits", *QUICK, "--run-dir", "run"],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        umask=0o077,
    )
    assert done.returncode == 0
    for path in [tmp_path / "run", *(tmp_path / "run").iterdir()]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_an_internal_error_is_one_line_too():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import knl.config, knl.cli\n"
            "def broken(*_): raise ValueError('two\\nlines')\n"
            "knl.config.recipe_names = broken\n"
            "knl.cli.main()",
            "train",
            "--list",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path("/"),
    )
    assert_refused(done, 1, "internal error, please report it: ValueError: two lines")
