"""A loss or a gradient that is no number: a diagnosis, or a step left out, on real ranks."""

from __future__ import annotations

import json
import re

import pytest

from knl.train.checkpoint import listed, read

from .launch import check_ranks, knl, run
from .runs import Run

WILD = ("--set", "schedule.lr=1e6", "--set", "schedule.warmup_epochs=0", "--set", "optim.form=sgd",
        "--set", "train.epochs=4")  # fmt: skip


def test_the_diagnosis_names_step_layer_lanes_samples_and_what_is_good(tmp_path):
    folder = tmp_path / "run"
    often = ("--set", "train.checkpoint_minutes=1e-9")
    done = run(knl("train", "digits", "-n", "2", *WILD, *often, "--run-dir", str(folder)))
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    found = re.fullmatch(
        r"knl: step (\d+): (gradient of [\w.]+|loss) is not finite, from .*; lr was .*: trust "
        r"ratios were .* to .*; lower schedule.lr, .*; more in (.*); the last good checkpoint "
        r"is of step (\d+)|.*no checkpoint yet",
        line,
    )
    assert found, line
    detail = json.loads((folder / f"nonfinite-step-{int(found[1]):08d}.json").read_text())
    assert detail["step"] == int(found[1])
    for samples in detail["samples_of_lanes"].values():
        assert len(samples) == 64 and max(samples) < 1437
    if found[4]:
        newest = read(listed(folder / "checkpoints")[0])
        assert newest.state.step == int(found[4]) < int(found[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return check_ranks("ranks_nonfinite.py", 3, tmp_path_factory.mktemp("nonfinite"))


@pytest.mark.parametrize("check", ["loss", "gradient", "cap"])
def test_a_step_is_left_out_by_all_ranks_alike(ranks, check):
    ranks.require(check)


def test_skipping_changes_nothing_where_all_is_well(tmp_path):
    for name in ("stop", "skip"):
        options = ("--set", f"train.on_nonfinite={name}", "--set", "train.epochs=2")
        done = run(knl("train", "digits", "-n", "2", *options, "--run-dir", str(tmp_path / name)))
        assert done.returncode == 0, done.stderr
    stop, skip = (Run(None, tmp_path / name) for name in ("stop", "skip"))
    assert stop.losses == skip.losses
    assert stop.rows[-1]["weights_crc32"] == skip.rows[-1]["weights_crc32"]


@pytest.mark.parametrize("check", ["drifted weights", "drifted statistics", "drifted rank 0"])
def test_the_rank_whose_memory_has_changed_is_named_with_its_host(ranks, check):
    ranks.require(check)
