"""Jobs of a real Slurm, from the scripts as they come to what they leave behind."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from .cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "slurm"
# One thread, as the ranks of all nodes share two cores, and the only network that there is.
RANK = {"OMP_NUM_THREADS": "1", "FI_PROVIDER": "tcp", "KNL_HOME": str(ROOT)}


@dataclass(frozen=True)
class SlurmJob:
    """A job that was submitted, and its log."""

    cluster: SlurmCluster
    number: str
    log: Path

    def state(self) -> str:
        shown = self.cluster.run("scontrol", "show", "job", "-o", self.number).stdout
        fields = dict(part.split("=", 1) for part in shown.split() if "=" in part)
        return fields.get("JobState", "UNKNOWN")

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until(self, true: Callable[[], object], what: str, timeout: float = 180.0) -> None:
        """Wait for something; a failed test that shows the log when it does not come."""
        deadline = time.monotonic() + timeout
        while not true():
            if time.monotonic() > deadline:
                self.cluster.run("scancel", self.number)
                pytest.fail(f"{what} does not come; {self.state()}; log:\n{self.text()[-6000:]}")
            time.sleep(0.2)

    def end(self, timeout: float = 240.0) -> str:
        """Wait for its end; its last state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.state() in over, "the job's end", timeout)
        return self.state()


def submit(
    cluster: SlurmCluster, folder: Path, *command: str, cwd: Path | None = None, **environment: str
) -> SlurmJob:
    """Hand `sbatch`'s arguments over to it, from a folder; the log is in `folder`."""
    environment = {**RANK, "KNL_ENV": sys.prefix, **environment}
    log = folder / "job.log"
    where = cwd or folder
    line = ("sbatch", "--parsable", f"--chdir={where}", f"--output={log}", *command)
    done = cluster.run(*line, **environment)
    assert done.returncode == 0, done.stderr
    return SlurmJob(cluster, done.stdout.split(";")[0].strip(), log)


def weights(run: Path) -> str:
    """The checksum of the weights at the end of a run, by its last evaluation."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "top1" in row][-1]["weights_crc32"]


def steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count('"lr"') if metrics.exists() else 0
