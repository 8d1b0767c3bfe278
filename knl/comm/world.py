"""Who am I: rank, size and place on the node, from what the launcher left in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from knl.errors import InputError

# Who may do the collectives (knl.comm.collectives), in the order in which auto tries them.
Provider = Literal["auto", "oneccl", "torch_ccl", "mpi", "gloo"]

# rank, size, local rank, local size: in the order in which launchers are recognised. An mpiexec
# that runs inside a Slurm job sets its own variables beside Slurm's, so MPI's come first.
_LAUNCHERS = {
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpi": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
}


@dataclass(frozen=True)
class World:
    """One rank's place. `launcher`: openmpi, mpi (Intel MPI or MPICH, PMI2), torchrun, single."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str

    @property
    def uses_mpi(self) -> bool:
        return self.launcher in ("mpi", "openmpi")


SINGLE = World(rank=0, size=1, local_rank=0, local_size=1, launcher="single")


def world_from(environment: Mapping[str, str]) -> World:
    """The world that a launcher's variables describe; a world of one where there is none.

    Raises InputError when the variables contradict each other, or when srun started several tasks
    without telling them how to find each other (PMI).
    """
    for launcher, names in _LAUNCHERS.items():
        rank, size, local_rank, local_size = (_number(environment, name) for name in names)
        if rank is None or size is None:
            continue
        if local_rank is None:  # Slurm's PMI2 gives ranks their number, and Slurm the local one
            local_rank = _number(environment, "SLURM_LOCALID") or 0
        if local_size is None:
            local_size = _slurm_local_size(environment)
        if not 0 <= rank < size:
            raise InputError(
                f"{names[0]}={rank}: a rank is 0 to {names[1]}-1 = {size - 1}; "
                "a stale variable of an earlier launch? unset it"
            )
        if size == 1 and environment.get("SLURM_STEP_NUM_TASKS") == "1":
            return SINGLE  # one task of srun, such as an interactive shell, is not a launch
        return World(rank, size, local_rank, local_size, launcher)
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS")
    if tasks is not None and tasks > 1:
        raise InputError(
            f"srun started {tasks} tasks without PMI, so they cannot find each other: "
            "use srun --mpi=pmi2"
        )
    return SINGLE


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name}={text!r}: must be a whole number; unset it") from None


def _slurm_local_size(environment: Mapping[str, str]) -> int:
    """Tasks on this node of a Slurm step; its list reads like 2(x3),1 with node SLURM_NODEID."""
    node = _number(environment, "SLURM_NODEID") or 0
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        tasks, _, repeat = part.partition("(x")
        counts += [int(tasks)] * int(repeat.rstrip(")") or 1)
    return counts[node] if node < len(counts) else 1
