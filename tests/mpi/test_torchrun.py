"""Under torchrun, and under a launcher that only sets its variables: gloo."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import pytest

from .launch import HERE, Outcomes, knl, run, started
from .runs import ARGUMENTS, STEPS, finished


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(ranks: int, *command: str) -> list[str]:
    here = ("--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    place = ("--nproc_per_node", str(ranks), *here)
    return [sys.executable, "-m", "torch.distributed.run", *place, *command]


def test_training_under_torchrun_is_that_of_one_rank(tmp_path, single):
    command = torchrun(3, "-m", *knl(*ARGUMENTS)[2:])
    trained = finished(run(command, cwd=tmp_path, timeout=120.0), tmp_path)
    assert trained.losses == pytest.approx(single.losses, abs=1e-4)
    assert (trained.result["ranks"], trained.result["provider"]) == (3, "gloo")
    (said,) = [line for line in trained.done.stderr.splitlines() if f"{STEPS} steps" in line]
    for reason in (
        "not oneccl: needs an Intel MPI or MPICH launch, this is torchrun",
        "not torch_ccl: ",
        "not mpi: needs an MPI launch, this is torchrun",
    ):
        assert reason in said


def test_starting_ranks_from_a_rank_is_refused_once(tmp_path):
    command = torchrun(2, "-m", *knl("train", "digits", "-n", "2")[2:])
    done = run(command, cwd=tmp_path)
    assert done.returncode != 0
    assert re.search(r"exitcode *: 2\b", done.stderr)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("knl: ")]
    assert "this is already rank 0 of 2 of a launch by torchrun" in line


def require_met(folder: Path) -> None:
    met = Outcomes(folder, 2, "exit status 0")
    met.require("bootstrap")
    met.require("oneccl is refused")
    met.require("gloo")


def test_ranks_meet_at_a_store_that_torchrun_keeps_to_itself(tmp_path):
    """--standalone: each rank finds MASTER_PORT open for rank 0 to serve."""
    ranks = ("--standalone", "--nproc_per_node", "2")
    script = (str(HERE / "ranks_store.py"), str(tmp_path))
    done = run([sys.executable, "-m", "torch.distributed.run", *ranks, *script])
    assert done.returncode == 0, done.stderr
    require_met(tmp_path)


def test_ranks_meet_where_a_launcher_only_sets_the_variables(tmp_path):
    command = [sys.executable, str(HERE / "ranks_store.py"), str(tmp_path)]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    with started(command, **shared, RANK="1", LOCAL_RANK="1") as other:
        done = run(command, **shared, RANK="0", LOCAL_RANK="0")
        assert done.returncode == 0, done.stderr
        assert other.finish(30.0).returncode == 0
    require_met(tmp_path)


def test_a_rank_without_the_address_of_the_others_is_refused(tmp_path):
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    done = run(knl("train", "digits"), cwd=tmp_path, **alone)
    assert done.returncode == 2
    assert "MASTER_ADDR or MASTER_PORT is not" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
