"""`knl run` as the task that srun made: placed by local rank, with or without PMI."""

from __future__ import annotations

import os
import re
import sys

import pytest

from ..mpi.launch import knl
from .cluster import SlurmCluster

# One write: tasks share srun's pipe.
MASK = """
import os
os.write(1, f"node {os.environ['SLURM_NODEID']} mask {os.sched_getaffinity(0)}\\n".encode())
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks apart need two CPUs")
@pytest.mark.parametrize("mpi", ["none", "pmi2"])
def test_tasks_of_a_node_are_on_cpus_of_their_own(cluster: SlurmCluster, mpi):
    command = knl("run", "--", sys.executable, "-c", MASK)
    done = cluster.run("srun", "-N2", "-n4", f"--mpi={mpi}", *command)
    assert done.returncode == 0, done.stderr
    seen = re.findall(r"node (\d) mask \{([\d, ]+)\}", done.stdout)
    assert len(seen) == 4
    for node in "01":
        first, second = ({*mask.split(", ")} for number, mask in seen if number == node)
        assert not first & second
    assert done.stderr.count("knl: plan by rule") == 1  # told by rank 0 alone


def test_a_search_is_refused_in_several_tasks(cluster: SlurmCluster, tmp_path):
    command = knl("tune", "--out", str(tmp_path / "p.json"))
    done = cluster.run("srun", "-N2", "-n2", "--mpi=none", *command)
    assert done.returncode == 2
    assert "knl: knl tune starts the ranks of the node itself: start it once" in done.stderr
    assert list(tmp_path.iterdir()) == []
