"""What a run writes about itself: rows of metrics, events for TensorBoard, its environment."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knl.comm.collectives import Ranks
from knl.errors import say
from knl.packages import IPEX, version_of

# What may be written of the environment: settings of the run, no secrets.
_VARIABLES = re.compile(
    r"(KNL|OMP|KMP|GOMP|I_MPI(?!_INFO)|CCL|FI|PSM2|MKL|DNNL|ONEDNN|MALLOC)_\w+|LD_PRELOAD"
    r"|SLURM_(JOB_ID|JOB_NUM_NODES|JOB_PARTITION|NTASKS|JOB_NODELIST|RESTART_COUNT)"
)
_SECRET = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|_KEY")
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


class Rows:
    """Lines of JSON at the end of a file. What cannot be written (disk full) is kept for the next
    time, and told once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._pending, self._told = b"", False
        self._writing = threading.Lock()  # checkpoints are written by a thread of their own

    def add(self, row: Mapping[str, Any]) -> None:
        """A number that is none is written as null, which JSON has."""
        row = {key: None if _is_no_number(value) else value for key, value in row.items()}
        try:
            with self._writing:
                self._pending += json.dumps(row).encode() + b"\n"
                self._write()
            self._told = False
        except OSError as error:
            if not self._told:
                self._told = True
                say(
                    f"{self._path} cannot be written ({error.strerror}): its rows are kept in "
                    "memory until there is room"
                )

    def sync(self) -> None:
        """To the disk. Raises OSError."""
        with self._writing:
            self._write()
        os.fsync(self._file)

    def _write(self) -> None:
        while self._pending:
            self._pending = self._pending[os.write(self._file, self._pending) :]

    def close(self) -> None:
        os.close(self._file)


class Events:
    """Curves for TensorBoard. tensorboardX's own writer has a thread that a full disk ends, after
    which training would wait for it for ever. `step`: behind which they begin."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.record_writer import RecordWriter

        name = f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{os.getpid()}"
        self._writer = RecordWriter(os.fspath(folder / name))
        self._broken = False
        self._event(file_version="brain.Event:2")
        if step:  # TensorBoard forgets what an earlier start has drawn behind it
            self._event(session_log=SessionLog(status=SessionLog.START), step=step + 1)

    def add(self, values: Mapping[str, float], step: int) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._event(summary=Summary(value=found), step=step)

    def flush(self) -> None:
        self._safely(self._writer.flush)

    def close(self) -> None:
        self._safely(self._writer.close)

    def _event(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        event = Event(wall_time=time.time(), **fields).SerializeToString()
        self._safely(lambda: self._writer.write(event))

    def _safely(self, action: Callable[[], None]) -> None:
        """Curves can be drawn anew from metrics.jsonl: they are no reason to stop."""
        if not self._broken:
            try:
                action()
            except (OSError, ValueError):
                self._broken = True


def environment_of(ranks: Ranks, hosts: list[str]) -> dict[str, Any]:
    """What a reader needs in order to run the same again."""
    versions = {name: version for name in _PACKAGES if (version := version_of(name))}
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if _VARIABLES.fullmatch(name) and not _SECRET.search(name)
    }
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


def _is_no_number(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
