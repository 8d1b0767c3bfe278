"""What a run writes about itself: metrics.jsonl, TensorBoard events, environment.json."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from knl.comm.collectives import Ranks
from knl.config import Recipe, to_toml
from knl.errors import InputError
from knl.packages import IPEX, version_of
from knl.train.evaluate import Evaluation

# What may be written of the environment: settings of the run, no secrets.
_VARIABLES = re.compile(
    r"(KNL|OMP|KMP|GOMP|I_MPI(?!_INFO)|CCL|FI|PSM2|MKL|DNNL|ONEDNN|MALLOC)_\w+|LD_PRELOAD"
    r"|SLURM_(JOB_ID|JOB_NUM_NODES|JOB_PARTITION|NTASKS|JOB_NODELIST|RESTART_COUNT)"
)
_PACKAGES = (
    "knl", "torch", IPEX, "oneccl-cpu", "oneccl-devel", "oneccl-bind-pt",
    "impi-rt", "mpi4py", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class StepMetrics:
    """One step. Times in seconds: `t_data` waiting for samples, `t_compute` forward and backward,
    `t_forward` of it forward alone, `t_comm_exposed` waiting for gradients after backward,
    `t_optim` the update."""

    step: int
    epoch: float
    loss: float
    lr: float
    images_per_s: float
    t_data: float
    t_compute: float
    t_forward: float
    t_comm_exposed: float
    t_optim: float
    trust_min: float
    trust_max: float


class RunDirectory:
    """A folder that one run writes into, by rank 0. Raises InputError when it holds another run or
    cannot be written."""

    def __init__(self, path: Path, recipe: Recipe, ranks: Ranks, hosts: list[str]) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            # "x": of two jobs given one folder only one gets it.
            self._metrics = (path / "metrics.jsonl").open("x", encoding="utf-8", buffering=1)
            (path / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
            environment = json.dumps(_environment(ranks, hosts), indent=2) + "\n"
            (path / "environment.json").write_text(environment, encoding="utf-8")
        except FileExistsError:
            raise InputError(
                f"run directory {path} already holds a run (metrics.jsonl): give another --run-dir"
            ) from None
        except OSError as error:
            raise InputError(f"run directory {path} cannot be written: {error.strerror}") from None
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(str(path), write_to_disk=True)

    def step(self, metrics: StepMetrics) -> None:
        self._write(asdict(metrics))
        for key in ("loss", "lr", "images_per_s", "trust_min", "trust_max"):
            self._events.add_scalar(f"train/{key}", getattr(metrics, key), metrics.step)

    def evaluation(self, step: int, epoch: float, result: Evaluation, checksum: str) -> None:
        """`checksum`: of all weights, equal on all ranks."""
        self._write({"step": step, "epoch": epoch, **asdict(result), "weights_crc32": checksum})
        for key, value in asdict(result).items():
            self._events.add_scalar(f"test/{key}", value, step)

    def close(self) -> None:
        self._metrics.close()
        self._events.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        self._metrics.write(json.dumps(row) + "\n")


def default_run_dir(recipe_name: str) -> Path:
    """runs/<recipe>-<time>, below the folder the user stands in."""
    return Path("runs") / f"{recipe_name}-{datetime.now():%Y%m%d-%H%M%S-%f}"


def _environment(ranks: Ranks, hosts: list[str]) -> dict[str, Any]:
    """What a reader needs in order to run the same again."""
    versions = {name: version for name in _PACKAGES if (version := version_of(name))}
    variables = {k: v for k, v in sorted(os.environ.items()) if _VARIABLES.fullmatch(k)}
    return {
        "python": platform.python_version(),
        "versions": versions,
        "hosts": sorted(set(hosts)),
        "ranks": ranks.world.size,
        "launcher": ranks.world.launcher,
        "provider": f"{ranks.provider} {ranks.collectives.version}".strip(),
        "providers_passed_over": list(ranks.passed_over),
        "variables": variables,
    }
