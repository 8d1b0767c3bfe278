"""`slurm/train.sbatch` as it stands, under a real Slurm."""

from __future__ import annotations

from .jobs import SCRIPTS, submit

SCRIPT = str(SCRIPTS / "train.sbatch")


def test_the_check_finds_every_rank_on_its_node(cluster, tmp_path):
    job = submit(cluster, tmp_path, "-N8", SCRIPT, "--check")
    assert job.end() == "COMPLETED", job.text()
    assert "8 distinct ranks of 8 on 8 nodes" in job.text()
    print(job.text())
