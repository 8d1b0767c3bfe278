"""Ranks on other hosts, whose processes cannot be looked at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ..mpi.launch import mpiexec, rank_environment, run


@pytest.mark.parametrize(("absent", "teller"), [(2, 0), (1, 0), (0, 1)])
def test_one_rank_tells_who_does_not_answer(tmp_path, absent, teller):
    script = Path(__file__).parent / "ranks_roll_call.py"
    command = mpiexec(3, sys.executable, str(script), str(tmp_path), str(absent))
    run(command, timeout=60.0, **rank_environment())
    assert (tmp_path / "told").read_text() == (
        f"{teller} x: rank {absent} on host h{absent} does not answer, it hangs or is late "
        f"(pid {100 + absent})"
    )
