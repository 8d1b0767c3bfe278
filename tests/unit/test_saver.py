"""When checkpoints are due, which stay, and what happens where they cannot be written."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import numpy as np
import pytest

from knl.train import saver as module
from knl.train.checkpoint import Checkpoint, Mark, State, listed, name_of, step_of
from knl.train.saver import Saver


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: now.s)
    return now


def saver(folder, minutes=10.0, keep=3) -> Saver:
    run = SimpleNamespace(checkpoints=folder / "checkpoints", sync=lambda: None)
    run.checkpoints.mkdir(exist_ok=True)
    return Saver(run, minutes, keep)


def checkpoint(step, best=0, value=1.0) -> Checkpoint:
    state = State(
        step=step, epoch=0.5, recipe={}, ranks=1, samples=1, order=[], weights_crc32="",
        best=Mark(best, 0.5, 0.5, 1.0) if best else None,
    )  # fmt: skip
    return Checkpoint(state, {"w": np.full(3, value, np.float32)})


def saved(found: Saver, *wanted: Checkpoint) -> None:
    for one in wanted:
        found.save(one)
        found.wait()


def steps(folder) -> list[int]:
    return [step_of(path) for path in listed(folder / "checkpoints")]


def test_they_are_due_by_the_clock_and_at_ends_of_epochs_that_are_not_too_near(tmp_path, clock):
    found = saver(tmp_path, minutes=10.0)
    assert not found.due(epoch_ends=True)
    clock.s += 10.0
    assert found.due(epoch_ends=True) and not found.due(epoch_ends=False)
    clock.s += 590.0
    assert found.due(epoch_ends=False)
    saved(found, checkpoint(1))
    assert not found.due(epoch_ends=False)
    found.write_s = 2.0  # slow: no more than a twentieth of the time
    clock.s += 39.0
    assert not found.due(epoch_ends=True)
    clock.s += 1.0
    assert found.due(epoch_ends=True)


def test_without_minutes_only_ends_of_epochs_count(tmp_path, clock):
    found = saver(tmp_path, minutes=0.0)
    clock.s += 1e6
    assert found.due(epoch_ends=True) and not found.due(epoch_ends=False)


def test_the_last_and_the_best_stay(tmp_path):
    found = saver(tmp_path, keep=2)
    saved(found, *(checkpoint(step, best=2) for step in range(1, 7)))
    assert steps(tmp_path) == [6, 5, 2]
    saved(found, checkpoint(7, best=7), checkpoint(8, best=7), checkpoint(9, best=7))
    assert steps(tmp_path) == [9, 8, 7]


def test_the_best_is_written_before_what_names_it(tmp_path, monkeypatch):
    order = []
    real = module.write
    monkeypatch.setattr(module, "write", lambda f, c: order.append(c.state.step) or real(f, c))
    found = saver(tmp_path)
    found.hold_best(checkpoint(3, best=3))
    found.hold_best(checkpoint(5, best=5))
    saved(found, checkpoint(8, best=5))
    assert order == [5, 8] and steps(tmp_path) == [8, 5]
    found.hold_best(checkpoint(9, best=9))
    saved(found, checkpoint(10, best=10))  # better than the one that was held
    assert order == [5, 8, 10]


def test_a_failure_is_told_once_and_the_next_is_tried(tmp_path, monkeypatch, capsys):
    found = saver(tmp_path)
    saved(found, checkpoint(1))
    real = module.write

    def full(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(module, "write", full)
    found.hold_best(checkpoint(2, best=2))
    saved(found, checkpoint(3, best=2), checkpoint(4, best=2))
    assert found.problem and found.newest == 1 and steps(tmp_path) == [1]
    err = capsys.readouterr().err
    assert err.count("checkpoint of step 3 cannot be written") == 1 and "quota" in err.lower()
    assert len(err.splitlines()) == 1
    monkeypatch.setattr(module, "write", real)
    saved(found, checkpoint(5, best=2))
    assert steps(tmp_path) == [5, 2, 1] and not found.problem
    assert "checkpoint of step 5 is written: there is room again" in capsys.readouterr().err


def test_weights_that_are_no_numbers_are_never_written(tmp_path, capsys):
    found = saver(tmp_path)
    saved(found, checkpoint(1), checkpoint(2, value=float("nan")))
    assert steps(tmp_path) == [1] and "w is not finite" in found.problem


def test_it_begins_with_what_is_there(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / f".{name_of(4)}.abc.tmp").touch()
    (tmp_path / "checkpoints" / name_of(4)).touch()
    assert saver(tmp_path).newest == 4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [name_of(4)]


def test_whatever_ends_a_write_is_told_and_not_taken_for_success(tmp_path, monkeypatch, capsys):
    found = saver(tmp_path)
    real = module.write

    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(module, "write", no_memory)
    saved(found, checkpoint(1))
    assert found.problem == "MemoryError" and found.newest == 0
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setattr(module, "write", real)
    saved(found, checkpoint(2))
    assert found.problem == "" and steps(tmp_path) == [2]


def test_a_folder_that_another_job_has_taken_over_is_left_alone(tmp_path):
    found = saver(tmp_path, keep=1)
    saved(found, checkpoint(1))
    found.abandon()
    saved(found, checkpoint(2))
    assert steps(tmp_path) == [1] and found.problem
