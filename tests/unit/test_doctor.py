"""Each warning of doctor by a node, a stack or an environment that deserves it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from knl.doctor import judge, node_checks, stack_checks
from knl.doctor.facts import Facts, MemoryPolicy, Room
from knl.doctor.stack import Convolution, Stack, convolutions
from knl.sysfs import read_topology

from ..topology.trees import GB, TREES

PROVIDERS = ("libpsmx2-fi.so", "librxm-fi.so", "libtcp-fi.so", "libverbs-1.12-fi.so")
KNL_STACK = Stack(
    torch="1.11.0+cu102",
    mpi="Intel(R) MPI Library 2021.8 for Linux* OS",
    providers=PROVIDERS,
    collectives={"oneccl": "", "mpi": "", "gloo": ""},
    convolutions=(
        Convolution("blocked", "forward", "jit:avx512_common", "avx512_common"),
        Convolution("channels_last", "forward", "jit:avx2", "avx2"),
    ),
    openmp=("/torch/lib/libgomp-a34b3233.so.1",),
)
MODERN = replace(KNL_STACK, torch="2.13.0+cpu")
FLAT_POLICY = MemoryPolicy("default", (), (0, 1))
NO_IPEX = "ModuleNotFoundError: No module named 'intel_extension_for_pytorch'"
GOMPS = (*KNL_STACK.openmp, "/usr/lib/libgomp.so.1.0.0")
SSE = (Convolution("blocked", "backward_data", "x64:gemm:jit", ""),)


@cache
def read(name: str):
    """The topology of a tree; writing its thousands of files takes a while."""
    with TemporaryDirectory() as root:
        return read_topology(TREES[name][0].write(Path(root)))


def facts(tree="quadrant-cache", stack=KNL_STACK, node=(), **changes) -> Facts:
    """A healthy KNL with its stack, but for the changes."""
    healthy = Facts(
        fsroot="/",
        node=replace(read(tree), **dict(node)),
        environment={"OMP_NUM_THREADS": "68"},
        stack=stack,
        policy=MemoryPolicy("default", (), None),
        memory_limit=0,
        governor_driver="",
        tmp=Room("/tmp", 100 * GB),
        shm=Room("/dev/shm", 40 * GB),
        layout="blocked",
    )
    return replace(healthy, **changes)


def env(**variables):
    return {"environment": {"OMP_NUM_THREADS": "68", **variables}}


def node(**changes):
    return {"node": changes}


def stack(**changes):
    return {"stack": replace(KNL_STACK, **changes)}


# check, changes to a healthy KNL, severity ("" for no warning), words of the message or cure
SITUATIONS = [
    ("probe", stack(failure="was killed by SIGILL", killed_by="SIGILL", doing="ipex"), "broken",
     "killed by SIGILL, at ipex"),
    ("probe", stack(problems={"convolution": "RuntimeError: could not create a primitive"}),
     "broken", "fails at convolution: RuntimeError"),
    ("torch", stack(problems={"torch": "No module named 'torch'"}), "broken", "pip install"),
    ("knl_torch", {"stack": MODERN, "layout": "contiguous"}, "slow",
     "torch 2.13.0+cpu runs convolutions as AVX2 on a knl"),
    ("knl_torch", {"stack": replace(MODERN, torch="1.12.0"), "layout": "contiguous"}, "slow",
     ".[knl]"),
    ("knl_torch", {"stack": MODERN, "tree": "knm", "layout": "contiguous"}, "slow", "on a knm"),
    ("knl_torch", {"stack": MODERN}, "note", "knl's own are not torch's"),
    ("knl_torch", {"stack": MODERN, "tree": "skx-alternating"}, "", ""),
    ("knl_torch", {}, "", ""),
    ("layout", {}, "", ""),
    ("layout", {"layout": "channels_last"}, "slow", "'channels_last' runs convolutions as AVX2"),
    ("layout", {"layout": "ipex"}, "slow", "unset KNL_LAYOUT"),
    ("layout", {"layout": "channels_last", "tree": "skx-alternating"}, "", ""),
    ("layout", {"layout": "channels_last", "fsroot": "/elsewhere"}, "slow", "as AVX2"),
    ("layout", stack(problems={"blocked": "InputError: no oneDNN"}), "broken", "onednn-cpu-gomp"),
    ("isa", {}, "", ""),
    ("isa", stack(convolutions=convolutions("blocked", ["x,exec,cpu,convolution,jit:avx2,y"])),
     "slow", "below this CPU's AVX-512: blocked y jit:avx2"),
    ("isa", {"layout": "contiguous", **stack(convolutions=convolutions(
        "contiguous", ["x,exec,cpu,convolution,jit:avx2,y"]))}, "slow", "contiguous y jit:avx2"),
    ("isa", {**stack(convolutions=SSE), **env(ONEDNN_MAX_CPU_ISA="SSE41")}, "slow",
     "unset ONEDNN_MAX_CPU_ISA"),
    ("isa", stack(convolutions=()), "slow", "without oneDNN"),
    ("isa", {**stack(convolutions=SSE), "fsroot": "/elsewhere"}, "", ""),
    ("aten", env(ATEN_CPU_CAPABILITY="avx512"), "broken", "no avx512bw, avx512dq, avx512vl"),
    ("aten", {**env(ATEN_CPU_CAPABILITY="avx512"), "tree": "skx-alternating"}, "", ""),
    ("aten", env(ATEN_CPU_CAPABILITY="default"), "slow", "turns AVX2 off"),
    ("openmp", stack(openmp=GOMPS), "slow", "2 OpenMP runtimes in one process"),
    ("openmp", {**stack(openmp=(*GOMPS, "/x/libiomp5.so")), **env(LD_PRELOAD="/x/libiomp5.so")},
     "note", "libiomp5.so is preloaded and does all the work"),
    ("openmp", {**stack(openmp=GOMPS), **env(LD_PRELOAD="/usr/lib/libgomp.so.1")}, "slow", "out"),
    ("ipex", stack(problems={"ipex": "ImportError: undefined symbol"}), "slow", "undefined symbol"),
    ("ipex", stack(problems={"ipex": NO_IPEX}), "", ""),
    ("mpi", stack(problems={"mpi": "RuntimeError: cannot load MPI library"}), "broken", "module"),
    ("provider", stack(providers=()), "broken", "no libfabric provider"),
    ("provider", env(FI_PROVIDER="psm2,nonesuch"), "broken", "no nonesuch"),
    ("provider", {**stack(providers=()), **env(I_MPI_FABRICS="shm")}, "", ""),
    ("provider", {**stack(providers=(), mpi="Open MPI v4.1.4")}, "", ""),
    ("provider", env(FI_PROVIDER="^psm3"), "", ""),
    ("network", {**node(fabrics=("hfi1_0",)), **stack(providers=PROVIDERS[1:])}, "slow",
     "hfi1_0 is there"),
    ("network", {**node(fabrics=("hfi1_0",)), **env(FI_PROVIDER="tcp")}, "slow", "psm2 or opx"),
    ("network", node(fabrics=("hfi1_0",)), "", ""),
    ("network", env(FI_PROVIDER="psm2"), "broken", "no Omni-Path device"),
    ("collectives", stack(collectives={"oneccl": "no libccl.so.1 in /x", "mpi": ""}), "slow",
     "over mpi, not oneCCL: no libccl.so.1 in /x"),
    ("launch", {"launch_problem": "srun started 4 tasks without PMI"}, "broken", "without PMI"),
    ("cpuset", {"tree": "half-cpuset"}, "slow", "34 of the node's 68 cores"),
    ("cpuset", node(allowed_cpus=tuple(range(68))), "", ""),
    ("cpuset", {"tree": "half-cpuset", "local_ranks": 2}, "", ""),
    ("omp_threads", {"environment": {}}, "note", "272 threads in every rank"),
    ("omp_threads", env(OMP_NUM_THREADS="1"), "slow", "one of 68 cores"),
    ("omp_threads", env(OMP_NUM_THREADS="300"), "slow", "more than the 272 CPUs"),
    ("omp_threads", env(OMP_NUM_THREADS="64,2"), "", ""),
    ("fast_memory", {"tree": "quadrant-flat"}, "slow", "numactl --preferred=1"),
    ("fast_memory", {"tree": "quadrant-flat", "policy": FLAT_POLICY}, "slow", "16 GiB of mcdram"),
    ("fast_memory", {"tree": "quadrant-flat", "policy": MemoryPolicy("default", (), (0,))}, "slow",
     "the cpuset leaves out"),
    ("fast_memory", {"tree": "quadrant-flat", "policy": MemoryPolicy("prefer", (1,), None)}, "",
     ""),
    ("fast_memory", {"tree": "snc4-flat"}, "slow", "node 4,5,6,7"),
    ("fast_memory", {"tree": "max-hbm-only"}, "", ""),
    ("fast_memory", {"tree": "max-snc4-flat"}, "slow", "of hbm"),
    ("strict_membind", {"tree": "quadrant-flat", "policy": MemoryPolicy("bind", (1,), None)},
     "broken", "numactl --preferred=1"),
    ("strict_membind", {"tree": "quadrant-flat", "policy": MemoryPolicy("bind", (0, 1), None)}, "",
     ""),
    ("strict_membind", {"tree": "quadrant-flat", "policy": MemoryPolicy("prefer", (1,), None)}, "",
     ""),
    ("hugepages", node(hugepages="never"), "slow", "as root"),
    ("hugepages", node(hugepages="madvise"), "note", "glibc.malloc.hugetlb=1"),
    ("hugepages", {**node(hugepages="madvise"), "stack": MODERN}, "note", "THP_MEM_ALLOC"),
    ("hugepages", {**node(hugepages="madvise"),
                   **env(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")}, "", ""),
    ("hugepages", node(hugepages="always"), "", ""),
    ("governor", node(governor="ondemand"), "slow", "ondemand"),
    ("governor", {**node(governor="powersave"), "governor_driver": "intel_pstate"}, "note", ""),
    ("governor", node(governor="performance"), "", ""),
    ("memory_limit", {"memory_limit": 32 * GB}, "note", "32.0 of the node's 96.0 GiB"),
    ("memory_limit", {"memory_limit": 97 * GB}, "", ""),
    ("tmp", {"tmp": Room("/tmp", 5 * GB)}, "slow", "/tmp has 5.0 GiB free"),
    ("tmp", {"tmp": Room("/nowhere", None)}, "broken", "/nowhere cannot be written"),
    ("shm", {"shm": Room("/dev/shm", 1 << 20)}, "broken", "1.0 MiB free"),
    ("shm", {"shm": Room("/dev/shm", 64 << 20)}, "", ""),
]  # fmt: skip
CHECKS = {c.__name__[6:]: c for c in (*stack_checks.CHECKS, *node_checks.CHECKS)}


@pytest.mark.parametrize(("check", "changes", "severity", "words"), SITUATIONS)
def test_a_situation_is_warned_of_with_its_cure_or_let_pass(check, changes, severity, words):
    found = CHECKS[check](facts(**changes))
    assert (found.severity if found else "") == severity
    if found:
        assert words in found.message or words in found.cure
        assert found.cure and "\n" not in found.message + found.cure
        report = judge(facts(**changes))
        assert found in report.warnings
        assert report.ok == all(w.severity == "note" for w in report.warnings)


def test_every_check_is_met_with_a_situation_and_a_healthy_knl_with_no_warning():
    assert {check for check, _, severity, _ in SITUATIONS if severity} == set(CHECKS)
    assert judge(facts()).warnings == ()
