"""The environment of a plan: right for what is installed, and the user's own goes first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from knl import choices
from knl.choices import Choices, rule_choices
from knl.plan import make_plan, plan_by_rule
from knl.sysfs import read_topology

from ..topology.trees import TREES, knl

KNL = knl([(range(16), 96 << 30)], cores=16)
LIBRARIES = ("libtcmalloc_minimal.so.4", "libjemalloc.so.2", "libiomp5.so")


@pytest.fixture
def node(tmp_path):
    """A small KNL."""
    return read_topology(KNL.write(tmp_path / "root"))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes a node on which these libraries are installed, and no others; says where they lie."""
    monkeypatch.setattr(choices, "_FOLDERS", ())
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))

    def into(*names, folder="prefix/lib"):
        place = tmp_path / folder
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            (place / name).touch()
        return place

    return into


def values(plan):
    return {name: setting.value for name, setting in plan.env.items()}


def planned(node, environment=(), ranks=2, **more):
    return make_plan(node, Choices(ranks_per_node=ranks, **more), dict(environment), "rule")


def test_libiomp5_gets_its_own_variables_and_libgomp_its_own(node):
    intel = values(planned(node, openmp="libiomp5", blocktime_ms=30, threads_per_core=2))
    assert intel["KMP_AFFINITY"] == "granularity=fine,compact,1,0"
    assert (intel["KMP_BLOCKTIME"], intel["KMP_HW_SUBSET"]) == ("30", "2t")
    assert not {"OMP_PLACES", "OMP_PROC_BIND", "OMP_WAIT_POLICY"} & set(intel)
    gnu = values(planned(node, openmp="libgomp"))
    assert (gnu["OMP_PLACES"], gnu["OMP_PROC_BIND"]) == ("threads", "close")
    assert gnu["OMP_WAIT_POLICY"] == "active"
    assert values(planned(node, blocktime_ms=0))["OMP_WAIT_POLICY"] == "passive"
    assert not [name for name in gnu if name.startswith("KMP_")]


def test_a_rank_whose_cores_lack_hardware_threads_sets_the_number_for_all(node):
    half = replace(node, allowed_cpus=tuple(range(24)))  # the second threads of cores 0 to 7
    plan = planned(half, threads_per_core=2)
    assert [len(rank.compute_cpus) for rank in plan.ranks] == [16, 8]
    assert values(plan)["OMP_NUM_THREADS"] == "8"


def test_a_core_of_one_thread_needs_no_hardware_subset(tmp_path):
    vm = read_topology(TREES["vm"][0].write(tmp_path))
    assert "KMP_HW_SUBSET" not in values(planned(vm, openmp="libiomp5"))


def test_the_rule_takes_what_is_installed_here_and_says_what_it_lacks(node, install):
    bare = plan_by_rule(node, 1, {})
    assert (bare.choices.allocator, bare.choices.openmp) == ("glibc-heap", "libgomp")
    assert values(bare)["MALLOC_MMAP_MAX_"] == "0"
    assert "LD_PRELOAD" not in bare.env
    assert [w for w in bare.warnings if "neither tcmalloc nor jemalloc" in w]
    folder = install("libjemalloc.so.2")
    some = values(plan_by_rule(node, 1, {}))
    assert some["LD_PRELOAD"] == f"{folder}/libjemalloc.so.2"
    assert "dirty_decay_ms:-1" in some["MALLOC_CONF"]
    assert "MALLOC_MMAP_MAX_" not in some
    install(*LIBRARIES)
    full = plan_by_rule(node, 1, {})
    assert values(full)["LD_PRELOAD"] == f"{folder}/libiomp5.so:{folder}/libtcmalloc_minimal.so.4"
    assert "KMP_AFFINITY" in full.env and "MALLOC_CONF" not in full.env
    assert not [w for w in full.warnings if "installed" in w]


def test_libraries_are_found_where_the_dynamic_loader_looks_too(node, install):
    folder = install(*LIBRARIES, folder="module/lib64")
    environment = {"LD_LIBRARY_PATH": f":/nowhere:{folder}"}
    preload = values(plan_by_rule(node, 1, environment))["LD_PRELOAD"]
    assert preload == f"{folder}/libiomp5.so:{folder}/libtcmalloc_minimal.so.4"


def test_libiomp5_is_for_intel_s_processors(install, tmp_path):
    install(*LIBRARIES)
    other = read_topology(TREES["vm"][0].write(tmp_path / "vm"))
    assert rule_choices(other, 1, {}).openmp == "libgomp"


def test_a_variable_of_the_user_s_stays_and_is_told(node):
    mine = {"OMP_NUM_THREADS": "3", "OMP_PLACES": "threads", "FI_PROVIDER": ""}
    plan = planned(node, mine)
    kept = plan.env["OMP_NUM_THREADS"]
    assert (kept.value, kept.source) == ("3", "user")
    assert "the rule would be '8'" in kept.reason
    assert [w for w in plan.warnings if w.startswith("OMP_NUM_THREADS=3: set by you")]
    assert plan.env["OMP_PLACES"].source == "rule"  # the same value
    assert (plan.env["FI_PROVIDER"].value, plan.env["FI_PROVIDER"].source) == ("", "user")


def test_what_the_user_preloads_comes_after_ours_and_only_once(node, install):
    folder = install(*LIBRARIES)
    ours = [f"{folder}/libiomp5.so", f"{folder}/libtcmalloc_minimal.so.4"]
    plan = plan_by_rule(node, 1, {"LD_PRELOAD": "/my/a.so:/my/b.so:"})
    assert values(plan)["LD_PRELOAD"].split(":") == [*ours, "/my/a.so", "/my/b.so"]
    assert "before your own /my/a.so:/my/b.so" in plan.env["LD_PRELOAD"].reason
    plan = plan_by_rule(node, 1, {"LD_PRELOAD": f"/my/a.so:{ours[1]}"})
    assert values(plan)["LD_PRELOAD"].split(":") == [ours[0], "/my/a.so", ours[1]]
    assert "LD_PRELOAD" not in plan_by_rule(node, 1, {"LD_PRELOAD": ":".join(ours)}).env


def test_workers_are_pinned_to_comm_cpus_in_the_order_of_local_ranks(node):
    plan = planned(node, ranks=2, reserve_cores=4, comm_workers=2, allreduce="ring")
    found = values(plan)
    comm = [cpu for rank in plan.ranks for cpu in rank.comm_cpus]
    assert sorted(comm) == [0, 1, 2, 3]
    assert found["CCL_WORKER_AFFINITY"] == ",".join(map(str, comm))
    assert (found["CCL_WORKER_COUNT"], found["CCL_WORKER_OFFLOAD"]) == ("2", "1")
    assert found["CCL_ALLREDUCE"] == "ring"
    none = values(planned(node, comm_workers=0))
    assert (none["CCL_WORKER_COUNT"], none["CCL_WORKER_OFFLOAD"]) == ("1", "0")
    assert "CCL_ALLREDUCE" not in none


def test_free_cores_are_dealt_to_the_workers_of_all_ranks_alike(node):
    plan = planned(node, ranks=2, reserve_cores=4, comm_workers=4)
    owned = [sum(cpu < 4 for cpu in rank.comm_cpus) for rank in plan.ranks]
    assert owned == [2, 2]
    assert [len(rank.comm_cpus) for rank in plan.ranks] == [4, 4]


def test_workers_without_a_cpu_share_the_rank_s_last_and_this_is_told(tmp_path):
    vm = read_topology(TREES["vm"][0].write(tmp_path))
    plan = planned(vm, ranks=2, comm_workers=1)
    assert values(plan)["CCL_WORKER_AFFINITY"] == "0,1"
    assert [w for w in plan.warnings if "its workers share the compute CPUs" in w]
    assert [w for w in planned(vm, ranks=2).warnings if "no overlap" in w]


@pytest.mark.parametrize(
    ("fabrics", "provider"),
    [((), "tcp"), (("hfi1_0",), "psm2"), (("mlx5_0",), None), (("hfi1_1", "mlx5_0"), "psm2")],
)
def test_psm2_is_for_omni_path_and_tcp_for_nothing_better(fabrics, provider, tmp_path):
    files = {f"sys/class/infiniband/{name}/node_type": "1: CA\n" for name in fabrics}
    node = read_topology(replace(TREES["vm"][0], files=files).write(tmp_path))
    found = values(planned(node))
    assert found.get("FI_PROVIDER") == provider
    assert ("HFI_NO_CPUAFFINITY" in found) == (provider == "psm2")
    assert ("PSM2_MQ_RNDV_HFI_WINDOW" in found) == (provider == "psm2")


def test_huge_pages_are_asked_of_whoever_hands_out_memory(node):
    for allocator in ("glibc", "glibc-heap", "tcmalloc", "jemalloc"):
        found = values(planned(node, allocator=allocator, hugepages=True))
        assert found["THP_MEM_ALLOC_ENABLE"] == "1"
        assert ("thp:always" in found.get("MALLOC_CONF", "")) == (allocator == "jemalloc")
        bare = values(planned(node, allocator=allocator))
        assert not {"THP_MEM_ALLOC_ENABLE", "GLIBC_TUNABLES"} & set(bare)
        assert "thp:always" not in bare.get("MALLOC_CONF", "")


def test_layout_and_inter_op_threads_are_told_to_the_training(node):
    found = values(planned(node, layout="channels_last"))
    assert (found["KNL_LAYOUT"], found["KNL_INTEROP_THREADS"]) == ("channels_last", "1")


def test_the_command_prints_its_contract_without_torch(tmp_path):
    root = TREES["snc4-flat"][0].write(tmp_path)
    code = (
        "import sys, knl.cli\n"
        "try: knl.cli.main()\n"
        "finally: print([m for m in ('torch', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    arguments = ["plan", "--fsroot", str(root), "--ranks-per-node", "4", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "5"},
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    found = json.loads(done.stdout)
    assert {"ranks", "spare_cpus", "env", "warnings"} <= set(found)
    keys = {"local_rank", "compute_cpus", "comm_cpus", "loader_cpus", "memory"}
    assert [set(rank) for rank in found["ranks"]] == [keys] * 4
    assert [rank["memory"] for rank in found["ranks"]] == [
        {"policy": "preferred", "nodes": [number]} for number in (5, 7, 4, 6)
    ]
    assert found["env"]["OMP_NUM_THREADS"]["source"] == "user"
    assert all(set(setting) == {"value", "source", "reason"} for setting in found["env"].values())
    assert any("OMP_NUM_THREADS=5" in warning for warning in found["warnings"])


def test_the_command_for_a_reader_ends_with_warnings_apart(tmp_path):
    root = TREES["vm"][0].write(tmp_path)
    command = [sys.executable, "-m", "knl", "plan", "--fsroot", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("rank 0: compute 0-1; comm shared; loader shared\nspare: none\n")
    assert "knl: no CPU to give to the loader" in done.stderr
    done = subprocess.run(
        [*command, "--ranks-per-node", "3"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("knl: ranks per node = 3: must be 1 to 2")
    assert done.stderr.count("\n") == 1
