"""Who a rank is, from the variables that real launchers left (measured on Slurm 22.05, Intel MPI
2021.16, Open MPI 4.1, MPICH 4.0, torchrun), stale ones too."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knl.comm.world import SINGLE, World, world_from
from knl.errors import InputError

ALLOCATION = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NODELIST": "c[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
BATCH = {**ALLOCATION, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


def step(rank: int, **others: str) -> dict[str, str]:
    """Task `rank` of srun -N2 -n4, two a node."""
    return {
        **ALLOCATION,
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % 2),
        "SLURM_NODEID": str(rank // 2),
        **others,
    }


def pmi2(rank: int, size: int = 4, job: str = "1.0") -> dict[str, str]:
    """What --mpi=pmi2 adds."""
    return {"PMI_FD": "11", "PMI_JOBID": job, "PMI_RANK": str(rank), "PMI_SIZE": str(size)}


def hydra(rank: int, local_rank: int, local_size: int) -> dict[str, str]:
    """What the mpiexec of Intel MPI or MPICH sets for four ranks."""
    place = {"MPI_LOCALRANKID": str(local_rank), "MPI_LOCALNRANKS": str(local_size)}
    return {"PMI_FD": "9", "PMI_RANK": str(rank), "PMI_SIZE": "4", **place}


def openmpi(rank: int, local_rank: int, local_size: int) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local_rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size),
        "OMPI_COMM_WORLD_NODE_RANK": str(local_rank),
        "OMPI_UNIVERSE_SIZE": "4",
        "PMIX_RANK": str(rank),
    }


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
# One helper a node, started by srun, under which an mpiexec in an allocation starts its ranks.
HELPER_2 = step(
    1,
    SLURM_STEP_NUM_TASKS="2",
    SLURM_STEP_TASKS_PER_NODE="1(x2)",
    SLURM_NTASKS="2",
    SLURM_LOCALID="0",
    SLURM_NODEID="1",
)
ONE_TASK = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NTASKS": "1"}

MEASURED = {
    "nothing": ({}, SINGLE),
    "salloc's shell": (ALLOCATION, SINGLE),
    "a batch script": (BATCH, SINGLE),
    "a batch script submitted in a step, whose variables came along": (
        step(0, **ONE_TASK, **pmi2(0, size=1, job="3.0")),
        SINGLE,
    ),
    "srun -n1": (step(0, **ONE_TASK, **pmi2(0, size=1)), SINGLE),
    "srun -n1 --mpi=none": (step(0, **ONE_TASK), SINGLE),
    "srun, first": (step(0, **pmi2(0)), World(0, 4, 0, 2, "mpi")),
    "srun, last": (step(3, **pmi2(3)), World(3, 4, 1, 2, "mpi")),
    "mpiexec": (hydra(3, 3, 4), World(3, 4, 3, 4, "mpi")),
    "mpiexec in an allocation": ({**HELPER_2, **hydra(2, 0, 2)}, World(2, 4, 0, 2, "mpi")),
    "Open MPI": (openmpi(1, 1, 4), World(1, 4, 1, 4, "openmpi")),
    "Open MPI in an allocation": ({**HELPER_2, **openmpi(3, 1, 2)}, World(3, 4, 1, 2, "openmpi")),
    "torchrun": (TORCHRUN, World(3, 4, 1, 2, "torchrun")),
    "torchrun in each of two tasks": ({**HELPER_2, **TORCHRUN}, World(3, 4, 1, 2, "torchrun")),
    "a rank and size that somebody exported": ({"RANK": "1", "WORLD_SIZE": "2"}, SINGLE),
}


@pytest.mark.parametrize(("environment", "world"), MEASURED.values(), ids=MEASURED)
def test_the_world_is_the_launcher_s(environment, world):
    assert world_from(environment) == world


WITHOUT_PMI = {
    "srun --mpi=none": step(2),
    "a step without PMI below one of another size": step(2, **pmi2(0, size=1, job="5.0")),
    "a step without PMI below one of the same size": step(
        2, **pmi2(0, job="1.0"), SLURM_STEP_ID="1"
    ),
}


@pytest.mark.parametrize("environment", WITHOUT_PMI.values(), ids=WITHOUT_PMI)
def test_tasks_that_cannot_find_each_other_are_refused(environment):
    with pytest.raises(InputError, match=r"srun started 4 tasks without PMI.*--mpi=pmi2") as told:
        world_from(environment)
    assert told.value.shared


@given(
    tasks=st.lists(st.integers(1, 4), min_size=1, max_size=12).filter(lambda t: sum(t) > 1),
    data=st.data(),
)
def test_tasks_on_a_node_are_read_from_slurm_s_short_form(tasks, data):
    runs = [(count, len(list(same))) for count, same in groupby(tasks)]
    short = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)
    node = data.draw(st.integers(0, len(tasks) - 1))
    rank, size = sum(tasks[:node]), sum(tasks)
    environment = step(
        rank,
        SLURM_STEP_NUM_TASKS=str(size),
        SLURM_STEP_TASKS_PER_NODE=short,
        SLURM_LOCALID="0",
        SLURM_NODEID=str(node),
        **pmi2(rank, size),
    )
    assert world_from(environment) == World(rank, size, 0, tasks[node], "mpi")


@pytest.mark.parametrize("rank", ["-1", "4", "5"])
def test_a_rank_outside_its_world_is_refused(rank):
    with pytest.raises(InputError, match=f"PMI_RANK={rank}: must be 0 to PMI_SIZE - 1 = 3"):
        world_from({**hydra(0, 0, 4), "PMI_RANK": rank})


@pytest.mark.parametrize("text", ["", "two", "1.5"])
def test_a_rank_that_is_no_number_is_refused(text):
    with pytest.raises(InputError, match=r"RANK='.*': must be a whole number"):
        world_from({**TORCHRUN, "RANK": text})
