"""The cluster that the other Slurm tests stand on really runs jobs."""

from __future__ import annotations

from pathlib import Path

from .cluster import SlurmCluster


def test_srun_starts_one_task_on_each_node(cluster: SlurmCluster) -> None:
    line = 'echo "$SLURM_PROCID $SLURMD_NODENAME"'
    done = cluster.run("srun", "-N4", "-n4", "sh", "-c", line)
    assert done.returncode == 0, done.stderr
    ranks, nodes = zip(*(line.split() for line in done.stdout.splitlines()))
    assert sorted(ranks) == ["0", "1", "2", "3"]
    assert sorted(nodes) == ["c1", "c2", "c3", "c4"]


def test_sbatch_writes_the_output_of_its_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/sh\n#SBATCH -N 2 -n 2\nsrun hostname\necho nodes $SLURM_NNODES\n")
    output = tmp_path / "job.out"
    assert cluster.batch(f"--output={output}", str(script)) == 0
    lines = output.read_text().splitlines()
    assert len(lines) == 3
    assert lines[-1] == "nodes 2"


def test_scontrol_expands_a_host_list(cluster: SlurmCluster) -> None:
    done = cluster.run("scontrol", "show", "hostnames", "c[1-2,4]")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["c1", "c2", "c4"]
