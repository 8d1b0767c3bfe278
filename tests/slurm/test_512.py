"""512 nodes: as many daemons of Slurm on this machine, and the script as it stands.

On one stack: what runs there imports no torch, and starting the nodes is the same on both.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .cluster import SlurmCluster, slurm_cluster
from .conftest import missing_parts
from .jobs import SCRIPTS, submit

NODES = 512


@pytest.mark.one_stack
def test_512_nodes_have_512_ranks(tmp_path_factory):
    missing = missing_parts()
    if missing:
        pytest.skip(f"no real Slurm: this machine lacks {', '.join(missing)}")
    with slurm_cluster(NODES, tmp_path_factory.mktemp("512")) as cluster:
        job = submit(
            cluster, cluster.folder, f"-N{NODES}", str(SCRIPTS / "train.sbatch"), "--check"
        )
        assert job.end(400.0) == "COMPLETED", job.text()
        _takes_every_script(cluster)
    assert f"{NODES} distinct ranks of {NODES} on {NODES} nodes" in job.text()
    print(job.text())


def _takes_every_script(cluster: SlurmCluster) -> None:
    """What `knl submit` writes for more nodes than the other tests have, unchanged."""
    paths = sorted((Path(__file__).parent / "golden").glob("*.sbatch"))
    large = [path for path in paths if int(path.stem.rpartition("-")[2]) > 8]
    assert large
    for path in large:
        done = cluster.run("sbatch", "--test-only", str(path))
        assert done.returncode == 0, f"{path}: {done.stderr}"
