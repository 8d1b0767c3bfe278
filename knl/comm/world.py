"""Who am I: rank, size and place on the node, from what the launcher left in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from knl.errors import InputError

# Who may do the collectives (knl.comm.collectives), in the order that auto tries.
Provider = Literal["auto", "oneccl", "torch_ccl", "mpi", "gloo"]

# rank, size, local rank, local size: in the order in which launchers are recognised. An mpiexec in
# a Slurm job starts its helpers with srun, whose variables then describe the helpers.
_LAUNCHERS = {
    "mpi": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
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


def world_from(environment: Mapping[str, str], *, needs_pmi: bool = True) -> World:
    """The world that a launcher's variables describe; a world of one where there is none.
    `needs_pmi`: whether the ranks have to find each other.

    Raises InputError when a variable is not a number or out of range, or when srun started several
    tasks without telling them how to find each other (PMI).
    """
    for launcher, names in _LAUNCHERS.items():
        if all(name in environment for name in names):
            rank, size, local_rank, local_size = (_number(environment, name) for name in names)
            return _checked(World(rank, size, local_rank, local_size, launcher), names)
    return _slurm_step(environment, needs_pmi)


def _slurm_step(environment: Mapping[str, str], needs_pmi: bool) -> World:
    """A task of srun. A job's script, or a step of one task such as a shell, is a world of one.
    PMI's variables may be left over from an outer step, so rank and size are Slurm's own."""
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    if not all(name in environment for name in names):
        return SINGLE
    rank, size, local_rank = (_number(environment, name) for name in names)
    if size == 1:
        return SINGLE
    step = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
    has_pmi = environment.get("PMI_SIZE") == str(size) and environment.get("PMI_JOBID") == step
    if needs_pmi and not has_pmi and "PMIX_RANK" not in environment:
        raise InputError(
            f"srun started {size} tasks without PMI, so they cannot find each other: "
            "use srun --mpi=pmi2",
            shared=True,
        )
    local_size = _slurm_local_size(environment)
    return _checked(World(rank, size, local_rank, local_size, "mpi"), names)


def _checked(world: World, names: tuple[str, ...]) -> World:
    if not 0 <= world.rank < world.size:
        raise InputError(
            f"{names[0]}={world.rank}: must be 0 to {names[1]} - 1 = {world.size - 1}; "
            "left over from another launch? unset it"
        )
    return world


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise InputError(f"{name}={environment[name]!r}: must be a whole number") from None


def _slurm_local_size(environment: Mapping[str, str]) -> int:
    """Tasks on this node of a Slurm step; its list reads like 2(x3),1 with node SLURM_NODEID."""
    node = _number(environment, "SLURM_NODEID") if "SLURM_NODEID" in environment else 0
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        tasks, _, repeat = part.partition("(x")
        counts += [int(tasks)] * int(repeat.rstrip(")") or 1)
    return counts[node] if node < len(counts) else 1
