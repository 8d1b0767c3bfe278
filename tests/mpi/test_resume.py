"""A run that is stopped and goes on, beside one that is not: real ranks, the same bits."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from knl.train.checkpoint import listed, read, step_of

from .launch import knl, run
from .runs import Run

EVALUATED = ("--set", "train.eval_every=1", "--set", "train.epochs=4")
STEPS = 20


def train(folder: Path, ranks: int, *options: str, status: int = 0) -> str:
    """`knl train digits` in a run directory; its stderr."""
    command = knl("train", "digits", "-n", str(ranks), "--run-dir", str(folder), *EVALUATED)
    done = run([*command, *options], cwd=folder.parent, timeout=120.0, OMP_NUM_THREADS="1")
    assert done.returncode == status, done.stderr
    return done.stderr


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[dict]:
    return Run(None, folder).steps


def trajectory(folder: Path) -> list[tuple]:
    """All that does not depend on time, of each row."""
    keys = ("step", "epoch", "loss", "lr", "trust_min", "trust_max", "top1", "weights_crc32")
    return [tuple(row.get(key) for key in keys) for row in rows(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that were never stopped, by their number of ranks."""
    done: dict[int, Path] = {}

    def of(ranks: int) -> Path:
        if ranks not in done:
            done[ranks] = tmp_path_factory.mktemp("whole") / "run"
            train(done[ranks], ranks)
        return done[ranks]

    return of


@pytest.mark.parametrize(("ranks", "parts"), [(2, (7, 1, 6)), (3, (1, 12)), (1, (9,))])
def test_a_run_in_parts_is_the_same_to_the_bit(tmp_path, whole, ranks, parts):
    folder = tmp_path / "run"
    for part in parts:
        train(folder, ranks, "--max-steps", str(part), status=75)
    err = train(folder, ranks)
    assert f"goes on after step {sum(parts)} " in err
    assert trajectory(folder) == trajectory(whole(ranks))
    newest, old = (read(listed(f / "checkpoints")[0]) for f in (folder, whole(ranks)))
    assert newest.state.step == STEPS
    assert newest.state.best == old.state.best and newest.state.evaluation == old.state.evaluation
    assert list(newest.tensors) == list(old.tensors)
    for name, array in old.tensors.items():
        assert newest.tensors[name].tobytes() == array.tobytes(), name
    assert (folder / "trust.jsonl").read_text() == (whole(ranks) / "trust.jsonl").read_text()


def test_another_number_of_ranks_goes_on_with_the_same_losses(tmp_path, whole):
    folder = tmp_path / "run"
    train(folder, 2, "--max-steps", "8", status=75)
    train(folder, 3, "--max-steps", "5", status=75)
    train(folder, 1)
    assert [row["step"] for row in steps(folder)] == list(range(1, STEPS + 1))
    wanted = [row["loss"] for row in steps(whole(2))]
    assert [row["loss"] for row in steps(folder)] == pytest.approx(wanted, abs=1e-4)


def test_another_layout_goes_on_with_the_same_losses(tmp_path, whole):
    folder = tmp_path / "run"
    layouts = [*(["ipex"] if importlib.util.find_spec("intel_extension_for_pytorch") else []),
               "contiguous", "channels_last"]  # fmt: skip
    for layout in layouts:
        train(folder, 2, "--set", f"train.layout={layout}", "--max-steps", "5", status=75)
    train(folder, 2)
    wanted = [row["loss"] for row in steps(whole(2))]
    found = [row["loss"] for row in steps(folder)]
    # Layouts round differently, which this recipe's first steps magnify: two whole runs that differ
    # in the layout alone are 2e-7 apart after 8 steps, 3e-5 after 16 and 2e-4 after 20.
    assert found[:16] == pytest.approx(wanted[:16], abs=1e-4)
    assert found == pytest.approx(wanted, abs=1e-3)


def test_a_run_that_is_done_says_its_result_again(tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole(2), folder)
    before = trajectory(folder)
    err = train(folder, 2, "--json")
    assert f"goes on after step {STEPS} " in err
    assert trajectory(folder) == before


def test_the_last_and_the_best_are_kept(tmp_path):
    folder = tmp_path / "run"
    options = ("--set", "train.keep_checkpoints=1", "--set", "schedule.lr=30")
    for _ in range(3):
        train(folder, 1, *options, "--max-steps", "6", status=75)
    train(folder, 1, *options)
    newest, *others = listed(folder / "checkpoints")
    best = read(newest).state.best
    assert step_of(newest) == STEPS and best is not None
    scores = {row["step"]: row["top1"] for row in rows(folder) if "top1" in row}
    assert best.top1 == max(scores.values()) == scores[best.step]
    assert [step_of(other) for other in others] == [best.step] * (best.step != STEPS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "run"
    train(folder, 1, "--max-steps", "6", status=75)
    train(folder, 1, "--max-steps", "3", status=75)
    assert [step_of(path) for path in listed(folder / "checkpoints")] == [9, 6, 5]
    return folder


@pytest.fixture
def stopped(prepared, tmp_path) -> Path:
    """A run with checkpoints of step 9, 6, and of 5, which was the best."""
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 8
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (flip, "its content does not fit its checksum"),
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "it has 5000 of "),
    ],
    ids=["flip", "empty", "short"],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(stopped, whole, damage, what):
    folder = stopped
    newest, older, _ = listed(folder / "checkpoints")
    damage(newest)
    err = train(folder, 1)
    assert f"knl: checkpoint {newest} is damaged: {what}" in err and ": passed over\n" in err
    assert f"goes on after step {step_of(older)} " in err
    assert trajectory(folder) == trajectory(whole(1))


def test_where_none_is_whole_nothing_is_begun_unasked(stopped):
    folder = stopped
    for path in listed(folder / "checkpoints"):
        flip(path)
    before = trajectory(folder)
    err = train(folder, 1, status=2)
    assert "none of the 3 checkpoint(s) in " in err and "--fresh starts anew" in err
    assert trajectory(folder) == before
    train(folder, 1, "--fresh")
    old = folder / "old-001"
    assert trajectory(old) == before and len(listed(old / "checkpoints")) == 3
    assert [row["step"] for row in steps(folder)] == list(range(1, STEPS + 1))


def test_another_recipe_is_refused_with_what_differs(stopped):
    folder = stopped
    changed = ("--set", "schedule.lr=0.5", "--set", "train.seed=3")
    line = train(folder, 2, *changed, status=2).splitlines()[-1]
    assert "schedule.lr was 1.0, is 0.5; train.seed was 0, is 3: give the old values" in line
    free = ("--set", "comm.bucket_mb=1", "--set", "train.checkpoint_minutes=1")
    train(folder, 2, *free)


def test_a_run_without_a_checkpoint_begins_anew_and_keeps_its_rows(stopped):
    folder = stopped
    shutil.rmtree(folder / "checkpoints")
    before = trajectory(folder)
    line = train(folder, 1, "--set", "schedule.lr=0.5", status=2).splitlines()[-1]
    assert "schedule.lr was 1.0, is 0.5" in line
    err = train(folder, 1)
    assert "has no checkpoint: training begins anew" in err
    assert trajectory(folder / "old-001") == before
    assert [row["step"] for row in steps(folder)] == list(range(1, STEPS + 1))


def test_rows_behind_the_checkpoint_are_cut_and_half_a_row_too(stopped, whole):
    folder = stopped
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "loss": 1.0, "lr": 0.1}\n{"step": 11, "lo')
    train(folder, 1)
    assert trajectory(folder) == trajectory(whole(1))
