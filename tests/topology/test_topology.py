"""Topologies of nodes that are not here, made by trees.py; and the node that is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from knl.errors import InputError
from knl.sysfs import read_topology
from knl.topology import describe

from .trees import GB, TREES, Tree, hmat, knl, snc_flat, xeon

# Small, for what does not depend on the number of cores.
XEON = xeon([[0], [1]], [0, 1], [([0], 96 * GB), ([1], 96 * GB)])
KNL = knl([(range(4), 96 * GB)], cores=4)


def with_third_node(tree, bandwidths, access="access0"):
    return replace(
        tree,
        nodes=[*tree.nodes, ((), 256 * GB)],
        distances=[[10, 21, 14], [21, 10, 24], [14, 24, 10]],
        files=hmat(bandwidths, access),
    )


@pytest.mark.parametrize("name", TREES)
def test_a_node_is_read_as_it_is(name, root_of):
    tree, expected = TREES[name]
    found = read_topology(root_of(name)).to_json()
    assert {key: found[key] for key in expected} == expected
    assert found["cpu_model"] == tree.name


@pytest.mark.parametrize("name", TREES)
def test_cores_partition_the_cpus_and_tiles_the_cores(name, root_of):
    topology = read_topology(root_of(name))
    cpus = [cpu for core in topology.cores for cpu in core.cpus]
    assert len(cpus) == len(set(cpus))
    assert set(topology.allowed_cpus) <= set(cpus)
    assert not set(cpus) & set(topology.offline_cpus)
    for core in topology.cores:
        (node,) = [n for n in topology.memory_nodes if n.id == core.node]
        assert set(core.cpus) <= set(node.cpus)


def test_the_owner_of_mcdram_is_the_nearest_by_distance_not_by_number(tmp_path):
    nodes = read_topology(snc_flat(4, (2, 0, 3, 1)).write(tmp_path)).memory_nodes
    assert [(n.kind, n.nearest_cpu_node) for n in nodes[4:]] == [
        ("mcdram", 2), ("mcdram", 0), ("mcdram", 3), ("mcdram", 1)
    ]  # fmt: skip
    assert [n.kind for n in nodes[:4]] == ["ddr"] * 4
    assert {n.bytes for n in nodes[4:]} == {4 * GB}


def test_hbm_of_a_xeon_max_belongs_to_its_own_quarter(root_of):
    nodes = read_topology(root_of("max-snc4-flat")).memory_nodes
    assert [(n.kind, n.nearest_cpu_node) for n in nodes[8:]] == [("hbm", p) for p in range(8)]


def test_a_cpuless_node_of_another_machine_is_cxl(tmp_path):
    last = read_topology(with_third_node(XEON, ()).write(tmp_path)).memory_nodes[-1]
    assert (last.kind, last.nearest_cpu_node) == ("cxl", 0)


@pytest.mark.parametrize(
    ("bandwidths", "kind"),
    [
        ((100, 900, 150), "hbm"),  # 1.5 times that of node 0, which is the nearest
        ((100, 10, 149), "cxl"),
        ((0, 100, 900), "cxl"),  # nothing to compare with
        ((100, 100, 0), "cxl"),
    ],
)
@pytest.mark.parametrize("access", ["access0", "access1"])
def test_hmat_tells_hbm_from_cxl(bandwidths, kind, access, tmp_path):
    tree = with_third_node(XEON, bandwidths, access)
    assert read_topology(tree.write(tmp_path)).memory_nodes[-1].kind == kind


def test_bandwidth_for_cpus_goes_before_bandwidth_for_any_device(tmp_path):
    tree = with_third_node(XEON, (100, 100, 400), "access1")
    tree.files.update(hmat((400, 400, 400), "access0"))
    assert read_topology(tree.write(tmp_path)).memory_nodes[-1].kind == "hbm"


def test_hmat_agrees_on_a_xeon_max_and_says_more_than_size(tmp_path):
    flat = xeon(
        [[0], [1]],
        [0, 0],
        [([0], 64 * GB), ([1], 64 * GB), ((), 16 * GB), ((), 16 * GB)],
        model=143,
        name="Intel(R) Xeon(R) CPU Max 9480",
    )
    said = replace(flat, files=hmat([61_000] * 2 + [200_000] * 2))
    assert read_topology(said.write(tmp_path / "a")) == read_topology(flat.write(tmp_path / "b"))
    slow = replace(flat, files=hmat([61_000] * 2 + [30_000] * 2))
    assert {n.kind for n in read_topology(slow.write(tmp_path / "c")).memory_nodes[2:]} == {"cxl"}


def test_hmat_does_not_make_mcdram_anything_else(tmp_path):
    tree = knl([(range(4), 96 * GB), ((), 16 * GB)], cores=4, files=hmat([80_000, 80_000]))
    assert read_topology(tree.write(tmp_path)).memory_nodes[1].kind == "mcdram"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("proc/cpuinfo", "", ["proc/cpuinfo", "names no processor"]),
        ("proc/cpuinfo", "processor: 0\nmodel: 87\n", ["cpu family = None"]),
        ("proc/cpuinfo", "processor: 0\ncpu family: six\nmodel: 87\n", ["cpu family = 'six'"]),
        ("sys/devices/system/cpu/cpu3/topology/thread_siblings_list", "3-x", ["cpu3", "'3-x'"]),
        ("sys/devices/system/node/node0/meminfo", "nothing", ["node0/meminfo", "MemTotal"]),
        ("sys/devices/system/node/node0/distance", "10 31", ["node0/distance", "1 numbers"]),
        ("proc/self/status", "Cpus_allowed_list:\t0-a\n", ["proc/self/status", "0-a"]),
        ("sys/devices/system/cpu/cpu0/topology/physical_package_id", "?", ["physical_package_id"]),
        (
            "sys/devices/system/node/node0/cpulist",
            "\n",
            ["devices/system/node", "no node has CPUs"],
        ),
        ("sys/devices/system/node/node0/access0/initiators/read_bandwidth", "1 GB/s", ["'1 GB/s'"]),
        (
            "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
            "1",
            ["free_hugepages", "No such"],
        ),
    ],
)
def test_a_malformed_tree_is_told_by_file_and_value(name, content, words, tmp_path):
    replace(KNL, distances=[[10]]).write(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as refusal:
        read_topology(tmp_path)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "\n" not in str(refusal.value)


def test_a_tree_whose_cpus_have_no_topology_is_refused(tmp_path):
    (TREES["vm"][0].write(tmp_path) / "sys/devices/system/cpu/cpu0/online").write_text("0\n")
    shutil.rmtree(tmp_path / "sys/devices/system/cpu/cpu1/topology")
    with pytest.raises(InputError, match="cpu0/topology"):
        read_topology(tmp_path)


@pytest.mark.parametrize("part", ["proc", "sys/devices/system/cpu"])
def test_a_tree_that_lacks_a_part_says_which(part, tmp_path):
    shutil.rmtree(TREES["vm"][0].write(tmp_path) / part)
    with pytest.raises(InputError, match=part.split("/")[-1]):
        read_topology(tmp_path)


def pools(sizes):
    base = "sys/kernel/mm/hugepages/hugepages-{}kB/{}_hugepages"
    return {
        base.format(kb, name): f"{count}\n"
        for kb, total, free in sizes
        for name, count in (("nr", total), ("free", free))
    }


def test_huge_pages_are_told_by_size(tmp_path):
    files = pools([(1048576, 4, 0), (2048, 512, 100)])
    files["sys/kernel/mm/transparent_hugepage/enabled"] = "always [madvise] never\n"
    topology = read_topology(replace(TREES["vm"][0], files=files).write(tmp_path))
    assert topology.to_json()["hugepage_pools"] == [
        {"page_bytes": 2 << 20, "total": 512, "free": 100},
        {"page_bytes": 1 << 30, "total": 4, "free": 0},
    ]
    line = (
        "huge pages: transparent madvise, 100 of 512 free at 2048 KiB, 0 of 4 free at 1048576 KiB"
    )
    assert line in describe(topology).splitlines()


@pytest.mark.parametrize(
    ("governors", "said"),
    [
        ({0: "performance", 1: "performance"}, "performance"),
        ({0: "performance", 1: "powersave"}, "mixed"),
        ({1: "powersave"}, "powersave"),
        ({}, ""),
        ({0: "performance", 1: "performance", 2: "powersave"}, "performance"),  # 2 is offline
    ],
)
def test_the_governor_is_that_of_the_online_cpus(governors, said, tmp_path):
    tree = Tree("x", 6, 85, "", [[0], [1], [2]], [0, 1, 2], [0] * 3, [(range(3), GB)], offline=[2])
    base = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
    files = {base.format(cpu): f"{name}\n" for cpu, name in governors.items()}
    topology = read_topology(replace(tree, files=files).write(tmp_path))
    assert topology.to_json()["governor"] == said
    assert (f"governor: {said}" in describe(topology)) == bool(said)


def test_fabrics_are_named_in_order(tmp_path):
    names = ["mlx5_0", "hfi1_1", "hfi1_0"]
    files = {f"sys/class/infiniband/{name}/node_type": "1: CA\n" for name in names}
    topology = read_topology(replace(TREES["vm"][0], files=files).write(tmp_path))
    assert topology.to_json()["fabrics"] == sorted(names)
    assert "fabrics: hfi1_0, hfi1_1, mlx5_0" in describe(topology)


def test_what_the_kernel_does_not_say_is_empty(tmp_path):
    found = read_topology(TREES["vm"][0].write(tmp_path)).to_json()
    empty = {"hugepages": "", "hugepage_pools": [], "governor": "", "fabrics": []}
    assert {key: found[key] for key in empty} == empty


def test_this_machine_agrees_with_psutil_and_the_affinity_mask():
    topology = read_topology()
    assert len(topology.cores) == psutil.cpu_count(logical=False)
    assert set(topology.allowed_cpus) == os.sched_getaffinity(0)
    command = [sys.executable, "-m", "knl", "topology", "--json"]
    done = subprocess.run(
        ["taskset", "-c", "0", *command], capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout)["allowed_cpus"] == [0]


def test_the_command_refuses_a_root_that_is_no_node(tmp_path):
    command = [sys.executable, "-m", "knl", "topology", "--fsroot", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No such file" in done.stderr


def test_masks_alone_say_the_same_as_lists(tmp_path):
    tree = knl([(range(20), 96 * GB)], cores=20)  # 80 CPUs are three words
    lists = tree.write(tmp_path / "lists")
    masks = replace(tree, masks_only=True).write(tmp_path / "masks")
    assert not list(Path(masks).rglob("*list"))
    assert read_topology(lists) == read_topology(masks)
