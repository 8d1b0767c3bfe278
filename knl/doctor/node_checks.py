"""Causes in the node and in how this process was started on it: CPUs, threads, memory, folders."""

from __future__ import annotations

from knl.bind import PLAN
from knl.doctor.facts import Facts
from knl.doctor.finding import Finding
from knl.topology import MemoryNode

_GB = 1 << 30
_MB = 1 << 20
# A stack takes 2.3 GB unpacked and its archive lies beside it: about 4 GB; as much again for data.
_TMP_BYTES = 8 * _GB
# Intel MPI and oneCCL took 0.4 MB for 2 ranks and 1.8 MB for 8: 43 MB for 68 as that goes on.
_SHM_BYTES = 48 * _MB
# Each was seen to get huge pages for tensors: torch's from 2.1 on, malloc's under any torch.
_THP_TORCH = ("THP_MEM_ALLOC_ENABLE", "1")
_THP_GLIBC = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# These drivers clock up under load whatever the governor is called.
_SELF_CLOCKING = ("intel_pstate", "amd-pstate", "amd-pstate-epp", "amd_pstate")


def check_cpuset(facts: Facts) -> Finding | None:
    """Cores that this process may not use. Ranks that share a node are bound to parts of it, and a
    plan leaves some cores free."""
    usable, cores = len(facts.node.allowed_cores), len(facts.node.cores)
    if usable == cores or facts.local_ranks > 1:
        return None
    if PLAN in facts.environment:
        return None
    return Finding(
        "cpuset-small",
        "slow",
        f"this process may use {usable} of the node's {cores} cores",
        "ask for the whole node: sbatch --exclusive, srun -c <cores>; or lift taskset's mask",
    )


def check_omp_threads(facts: Facts) -> Finding | None:
    """How many threads a rank computes with."""
    name, value = "omp-num-threads", facts.environment.get("OMP_NUM_THREADS")
    cpus, cores = len(facts.node.allowed_cpus), len(facts.node.allowed_cores)
    if value is None:
        message = f"OMP_NUM_THREADS is not set: {cpus} threads in every rank"
        cure = "none needed with knl train -n and knl run, which set it; elsewhere export it"
        return Finding(name, "note", message, cure) if cpus > 1 else None
    threads = int(value) if value.isdigit() else 0  # a list is for nested regions: the user knows
    if threads == 1 and cores > facts.local_ranks:
        message = f"OMP_NUM_THREADS=1: one of {cores} cores computes in a rank"
        return Finding(name, "slow", message, "unset OMP_NUM_THREADS: knl keeps to what you set")
    if threads > cpus:
        message = f"OMP_NUM_THREADS={threads}: more than the {cpus} CPUs this process may use"
        return Finding(name, "slow", message, f"export OMP_NUM_THREADS={cores}, or unset it")
    return None


def check_fast_memory(facts: Facts) -> Finding | None:
    """MCDRAM or HBM beside the DDR, as nodes of their own, that nothing is placed in."""
    fast = _fast_nodes(facts)
    if not fast or set(facts.policy.nodes).intersection(node.id for node in fast):
        return None
    kind, numbers = fast[0].kind, ",".join(str(node.id) for node in fast)
    size = sum(node.bytes for node in fast) / _GB
    allowed = facts.policy.allowed
    if allowed is not None and not set(allowed).intersection(node.id for node in fast):
        closed = f"the cpuset leaves out the {size:.0f} GiB of {kind} on node {numbers}"
        return Finding(f"{kind}-unused", "slow", closed, "ask your site for all memory of the node")
    return Finding(
        f"{kind}-unused",
        "slow",
        f"{size:.0f} GiB of {kind} on node {numbers} would stay empty: "
        f"memory policy is {facts.policy.mode or 'default'}",
        f"start it with knl run, or with numactl --preferred={fast[0].id}",
    )


def check_strict_membind(facts: Facts) -> Finding | None:
    """Bound to the small fast memory alone, a process dies when that is full."""
    bound = [n for n in facts.node.memory_nodes if n.id in facts.policy.nodes]
    fast = _fast_nodes(facts)
    if facts.policy.mode != "bind" or not bound or not all(node in fast for node in bound):
        return None
    return Finding(
        "strict-membind",
        "broken",
        f"memory is bound to {sum(n.bytes for n in bound) / _GB:.0f} GiB of {bound[0].kind}: "
        "what does not fit is killed",
        f"numactl --preferred={bound[0].id} in place of --membind",
    )


def check_hugepages(facts: Facts) -> Finding | None:
    """Small pages cost address translation in every large buffer."""
    node = facts.node
    if node.hugepages not in ("never", "madvise") or any(pool.free for pool in node.hugepage_pools):
        return None
    if node.hugepages == "never":
        cure = "as root: echo always > /sys/kernel/mm/transparent_hugepage/enabled"
        return Finding("no-hugepages", "slow", "transparent huge pages are off (never)", cure)
    torch_asks = facts.stack.torch_release >= (2, 1)
    name, value = _THP_TORCH if torch_asks else _THP_GLIBC
    if value in facts.environment.get(name, ""):
        return None
    message = "transparent huge pages are given only to those who ask for them (madvise)"
    cure = f"export {name}={value}{'' if torch_asks else ' (glibc 2.35 on), or set always as root'}"
    return Finding("no-hugepages", "note", message, cure)


def check_governor(facts: Facts) -> Finding | None:
    """The CPUs are not kept at full clock."""
    governor = facts.node.governor
    if governor in ("", "performance"):
        return None
    clocks_up = facts.governor_driver in _SELF_CLOCKING
    return Finding(
        "governor",
        "note" if clocks_up else "slow",
        f"the frequency governor is {governor}",
        "as root: cpupower frequency-set -g performance; in a job: srun --cpu-freq=performance",
    )


def check_memory_limit(facts: Facts) -> Finding | None:
    """The job may use less memory than the node has."""
    total = sum(node.bytes for node in facts.node.memory_nodes)
    if not 0 < facts.memory_limit < total:
        return None
    limit = facts.memory_limit / _GB
    message = f"the control group allows {limit:.1f} of the node's {total / _GB:.1f} GiB"
    return Finding("memory-limit", "note", message, "ask for all of it: sbatch --mem=0")


def check_tmp(facts: Facts) -> Finding | None:
    """Where the Python environment is copied to, so that no node reads it from Lustre."""
    free = facts.tmp.free
    if free is None:
        message = f"{facts.tmp.path} cannot be written"
        return Finding("tmp-small", "broken", message, "set TMPDIR to a folder on a local disk")
    if free >= _TMP_BYTES:
        return None
    message = f"{facts.tmp.path} has {free / _GB:.1f} GiB free, an environment and data want 8"
    return Finding("tmp-small", "slow", message, "set TMPDIR to a larger local disk, or tidy up")


def check_shm(facts: Facts) -> Finding | None:
    """The memory that MPI and oneCCL share between ranks; they die by SIGBUS when it is full."""
    free = facts.shm.free
    if free is not None and free >= _SHM_BYTES:
        return None
    has = "cannot be written" if free is None else f"has {free / _MB:.1f} MiB free"
    message = f"{facts.shm.path} {has}, the ranks of a node want 48"
    cure = "remove what is left over in it; in a container: --shm-size=1g"
    return Finding("shm-small", "broken", message, cure)


def _fast_nodes(facts: Facts) -> list[MemoryNode]:
    """Fast memory beside DDR. Where there is no DDR nothing needs to be chosen."""
    kinds = {node.kind for node in facts.node.memory_nodes}
    fast = [node for node in facts.node.memory_nodes if node.kind in ("mcdram", "hbm")]
    return fast if "ddr" in kinds else []


CHECKS = (
    check_cpuset,
    check_omp_threads,
    check_fast_memory,
    check_strict_membind,
    check_hugepages,
    check_governor,
    check_memory_limit,
    check_tmp,
    check_shm,
)
