"""`knl run` with real processes: where they run, what they return, what reaches them."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from knl.choices import Choices
from knl.plan import make_plan
from knl.profile import SCHEMA, Profile, fingerprint, save_profile
from knl.sysfs import read_topology

from .launch import knl, mpiexec, rank_environment, run, started

SHELL = ("sh", "-c")
# One write: ranks share the pipe.
MASK = """
import os
rank = os.environ.get("PMI_RANK", os.environ.get("RANK"))
os.write(1, f"{rank} {os.sched_getaffinity(0)}\\n".encode())
"""
NEEDS_TWO = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="two ranks apart need two CPUs"
)


def masks(text: str) -> dict[int, set[int]]:
    """Rank -> its CPUs, from lines that MASK printed."""
    found = re.findall(r"(\d+) \{([\d, ]+)\}", text)
    return {int(rank): {int(cpu) for cpu in cpus.split(",")} for rank, cpus in found}


@NEEDS_TWO
def test_the_worst_exit_status_is_returned_and_told():
    done = run(knl("run", "-n", "2", "--", *SHELL, "exit $((3 + 2 * RANK))"))
    assert done.returncode == 5
    assert "rank 0 ended with status 3" in done.stderr
    assert "rank 1 ended with status 5" in done.stderr


@NEEDS_TWO
def test_a_killed_rank_counts_as_its_signal():
    script = "if [ $RANK = 1 ]; then kill -9 $$; fi"
    assert run(knl("run", "-n", "2", "--", *SHELL, script)).returncode == 128 + signal.SIGKILL


@NEEDS_TWO
def test_a_signal_reaches_every_rank_and_what_it_started(tmp_path):
    script = f"trap 'echo $RANK >> {tmp_path}/got; exit 7' USR1; sleep 60 & "
    script += f"touch {tmp_path}/up$RANK; wait"
    with started(knl("run", "-n", "2", "--", *SHELL, script)) as job:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("up*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        job.process.send_signal(signal.SIGUSR1)
        done = job.finish(30)  # and no sleep is left behind
    assert done.returncode == 7
    assert sorted((tmp_path / "got").read_text().split()) == ["0", "1"]


@NEEDS_TWO
def test_output_is_prefixed_by_rank_on_request():
    done = run(knl("run", "-n", "2", "--prefix", "--", *SHELL, "echo out; echo err >&2"))
    assert sorted(done.stdout.splitlines()) == ["[0] out", "[1] out"]
    assert {"[0] err", "[1] err"} <= set(done.stderr.splitlines())


@NEEDS_TWO
def test_ranks_are_on_cpus_of_their_own():
    done = run(knl("run", "-n", "2", "--", sys.executable, "-c", MASK))
    found = masks(done.stdout)
    assert set(found) == {0, 1}, done
    assert not found[0] & found[1]


@NEEDS_TWO
def test_under_mpiexec_the_same_command_becomes_the_rank_that_it_is():
    command = mpiexec(2, *knl("run", "--", sys.executable, "-c", MASK))
    found = masks(run(command, **rank_environment()).stdout)
    assert set(found) == {0, 1}
    assert not found[0] & found[1]


def test_a_rank_that_was_pinned_by_the_user_stays_where_it_is():
    last = max(os.sched_getaffinity(0))
    environment = {**rank_environment(), "I_MPI_PIN_PROCESSOR_LIST": str(last)}
    command = mpiexec(2, *knl("run", "--", sys.executable, "-c", MASK))
    assert masks(run(command, **environment).stdout) == {0: {last}, 1: {last}}


@NEEDS_TWO
def test_torch_distributed_finds_its_ranks():
    script = (
        "import torch, torch.distributed as d; d.init_process_group('gloo'); "
        "x = torch.ones(1) * (d.get_rank() + 1); d.all_reduce(x); "
        "import os; os.write(1, b'%d\\n' % int(x))"
    )
    done = run(knl("run", "-n", "2", "--", sys.executable, "-c", script))
    assert done.stdout.split() == ["3", "3"], done.stderr


def test_a_program_that_is_not_there_is_told_in_one_line():
    done = run(knl("run", "-n", "1", "--", "no-such-program"))
    assert done.returncode == 2
    assert "knl: no-such-program: no such program on PATH" in done.stderr
    assert "Traceback" not in done.stderr


@NEEDS_TWO
def test_the_proof_shows_every_thread_in_its_place():
    script = "import torch; torch.ones(2000, 2000) @ torch.ones(2000, 2000)"
    done = run(knl("run", "-n", "2", "--verify", "--", sys.executable, "-c", script))
    assert done.returncode == 0, done.stderr
    assert "every thread of 2 rank(s) is inside its CPUs" in done.stderr
    rows = [line.split() for line in done.stderr.splitlines() if re.match(r"\d+ +python", line)]
    assert {row[0] for row in rows} == {"0", "1"}
    assert {row[4] for row in rows} == {"compute"}
    assert rows[0][5] != rows[-1][5]


WANDERER = "import os, time; os.sched_setaffinity(0, {0, 1}); time.sleep(45)"


@NEEDS_TWO
def test_a_thread_outside_its_cpus_is_named_and_its_ranks_are_ended():
    done = run(knl("run", "-n", "2", "--verify", "--", sys.executable, "-c", WANDERER), timeout=40)
    assert done.returncode != 0
    assert re.search(
        r"knl: rank 1: thread python\S* \(\d+\) of \S+ may run on CPUs 0-1, outside the rank's 1",
        done.stderr,
    ), done.stderr


@NEEDS_TWO
def test_a_rank_of_mpiexec_is_proven_and_ended_too():
    wander = mpiexec(2, *knl("run", "--verify", "--", sys.executable, "-c", WANDERER))
    done = run(wander, timeout=40, **rank_environment())
    assert done.returncode != 0
    assert "outside the rank's" in done.stderr
    stay = mpiexec(2, *knl("run", "--verify", "--", "sleep", "2"))
    done = run(stay, timeout=40, **rank_environment())
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"every thread of rank {rank} is inside its CPUs" in done.stderr


@NEEDS_TWO
def test_training_is_bound_says_so_and_keeps_every_thread_inside(tmp_path):
    train = knl("train", "digits", "--set", "train.epochs=8", "--json", "--run-dir", "run")
    command = mpiexec(2, *knl("run", "--verify", "--", *train))
    done = run(command, cwd=tmp_path, timeout=120, **rank_environment())
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is inside its CPUs") == 2
    assert json.loads(done.stdout)["plan"].startswith("plan by rule (no profile fits this node")
    kept = json.loads((tmp_path / "run" / "environment.json").read_text())["variables"]
    assert kept["KNL_LAYOUT"] == json.loads(done.stdout)["layout"]


def test_training_without_a_plan_is_left_as_it_comes(tmp_path):
    command = knl("train", "digits", "--set", "train.steps=1", "--json", "--profile", "none")
    done = run(command, cwd=tmp_path)
    assert json.loads(done.stdout)["plan"] == ""
    assert "no plan: not bound" in done.stderr


@NEEDS_TWO
def test_the_newest_profile_that_fits_is_used_and_named_with_its_ranks(tmp_path):
    node = read_topology()
    choices = Choices(ranks_per_node=2, layout="contiguous", allocator="glibc-heap")
    profile = Profile(
        schema=SCHEMA,
        created="2026-01-01T00:00:00+00:00",
        recipe="digits",
        model="resnet-small",
        pixels=0,
        images=64,
        fingerprint=fingerprint(node),
        plan=make_plan(node, choices, {}, "profile"),
    )
    save_profile(profile, tmp_path / "profiles" / "p.json")
    train = knl("train", "digits", "--set", "train.steps=2", "--json")
    done = run(train, cwd=tmp_path, timeout=120, KNL_PROFILES=str(tmp_path / "profiles"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["ranks"], result["layout"]) == (2, "contiguous")
    assert result["plan"].startswith(f"plan of profile {tmp_path}/profiles/p.json")
    alone = run([*train, "-n", "1"], cwd=tmp_path, KNL_PROFILES=str(tmp_path / "profiles"))
    assert "measured with 2 rank(s), here for 1" in json.loads(alone.stdout)["plan"]


@NEEDS_TWO
def test_nothing_starts_ranks_from_within_a_plan(tmp_path):
    train = knl("train", "digits", "-n", "2")
    for command in (train, knl("tune", "--out", "p.json")):
        done = run(knl("run", "-n", "1", "--", *command), cwd=tmp_path)
        assert done.returncode == 2
        assert "this shell is under a plan" in done.stderr


def test_more_ranks_than_cores_are_not_bound_and_say_so(tmp_path):
    ranks = len(os.sched_getaffinity(0)) + 1
    train = ("train", "digits", "-n", str(ranks), "--set", "train.steps=1", "--json")
    done = run(knl(*train, "--set", f"train.lanes={ranks}"), cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{ranks} ranks share" in json.loads(done.stdout)["plan"]


def test_a_profile_of_another_node_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "p.json").write_text('{"schema": 7}')
    for extra in ((), ("-n", "2")):
        done = run(knl("train", "digits", "--profile", "p.json", *extra), cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            "knl: profile p.json: schema = 7: must be 1; write it anew with knl tune --out"
        ]
    assert not Path(tmp_path / "runs").exists()
