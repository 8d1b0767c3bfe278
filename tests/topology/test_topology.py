"""Topologies of nodes that are not here, made by trees.py; and the node that is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knl.cpulist import format_cpulist, parse_cpulist, parse_cpumap
from knl.errors import InputError
from knl.sysfs import read_topology

from .trees import GB, QUADRANT_FLAT, TREES, knl, snc_flat


@pytest.mark.parametrize("name", TREES)
def test_a_node_is_read_as_it_is(name, tmp_path):
    tree, expected = TREES[name]
    found = read_topology(tree.write(tmp_path)).to_json()
    assert {key: found[key] for key in expected} == expected
    assert found["cpu_model"] == tree.name


@pytest.mark.parametrize("name", TREES)
def test_cores_partition_the_cpus_and_tiles_the_cores(name, tmp_path):
    tree, _ = TREES[name]
    topology = read_topology(tree.write(tmp_path))
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


def test_hbm_of_a_xeon_max_belongs_to_its_own_quarter(tmp_path):
    nodes = read_topology(TREES["max-snc4-flat"][0].write(tmp_path)).memory_nodes
    assert [(n.kind, n.nearest_cpu_node) for n in nodes[8:]] == [("hbm", p) for p in range(8)]


def test_a_cpuless_node_of_another_machine_is_cxl(tmp_path):
    tree, _ = TREES["skx-alternating"]
    tree.nodes = [*tree.nodes, ((), 256 * GB)]
    tree.distances = [[10, 21, 14], [21, 10, 24], [14, 24, 10]]
    last = read_topology(tree.write(tmp_path)).memory_nodes[-1]
    assert (last.kind, last.nearest_cpu_node) == ("cxl", 0)


def test_modes_without_hwloc_are_said_to_be_inferred(tmp_path):
    assert read_topology(QUADRANT_FLAT.write(tmp_path)).inferred == ("cluster_mode", "memory_mode")


def test_a_core_of_knl_is_cpu_i_and_its_three_higher_threads(tmp_path):
    topology = read_topology(TREES["quadrant-cache"][0].write(tmp_path))
    assert topology.cores[5].cpus == (5, 73, 141, 209)
    assert topology.cores[5].tile == topology.cores[4].tile != topology.cores[6].tile


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
    ],
)
def test_a_malformed_tree_is_told_by_file_and_value(name, content, words, tmp_path):
    TREES["quadrant-cache"][0].write(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as refusal:
        read_topology(tmp_path)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("part", ["proc", "sys/devices/system/cpu"])
def test_a_tree_that_lacks_a_part_says_which(part, tmp_path):
    shutil.rmtree(TREES["vm"][0].write(tmp_path) / part)
    with pytest.raises(InputError, match=part.split("/")[-1]):
        read_topology(tmp_path)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_lists_and_masks_of_cpus_read_back(cpus):
    ordered = tuple(sorted(cpus))
    assert parse_cpulist(format_cpulist(ordered)) == ordered
    mask = f"{sum(1 << cpu for cpu in cpus):076x}"
    words = ",".join(mask[i : i + 8] for i in range(0, len(mask), 8))
    assert parse_cpumap(words) == ordered


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
    lists = knl([(range(68), 96 * GB)]).write(tmp_path / "lists")
    masks = knl([(range(68), 96 * GB)], masks_only=True).write(tmp_path / "masks")
    assert not list(Path(masks).rglob("*list"))
    assert read_topology(lists) == read_topology(masks)
