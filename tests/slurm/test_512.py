"""512 nodes: as many daemons of Slurm on this machine, and the script as it stands.

On one stack: what runs there imports no torch, and starting the nodes is the same on both.
"""

from __future__ import annotations

import sys

import pytest

from .cluster import slurm_cluster
from .conftest import missing_parts
from .jobs import SCRIPTS, submit

NODES = 512


@pytest.mark.skipif(sys.version_info < (3, 10), reason="on the modern stack alone")
def test_512_nodes_have_512_ranks(tmp_path_factory):
    missing = missing_parts()
    if missing:
        pytest.skip(f"no real Slurm: this machine lacks {', '.join(missing)}")
    with slurm_cluster(NODES, tmp_path_factory.mktemp("512")) as cluster:
        job = submit(
            cluster, cluster.folder, f"-N{NODES}", str(SCRIPTS / "train.sbatch"), "--check"
        )
        assert job.end(400.0) == "COMPLETED", job.text()
    assert f"{NODES} distinct ranks of {NODES} on {NODES} nodes" in job.text()
    print(job.text())
