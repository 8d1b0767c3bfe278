"""hwloc's XML: what lstopo makes of trees.py, what xmls.py writes, and odd files."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knl.errors import InputError
from knl.lstopo import read_lstopo
from knl.sysfs import read_topology

from .trees import GB, KNL_7250, QUADRANT_FLAT, TREES, Tree, hmat, snc_flat, xeon
from .xmls import mask, write_xml

VM = TREES["vm"][0]


def lstopo(root, file, *options):
    """What lstopo makes of the tree at `root`, told that it is another machine's."""
    if shutil.which("lstopo") is None:
        pytest.skip("no lstopo; install the package hwloc")
    environment = {
        **os.environ,
        "HWLOC_FSROOT": str(root),
        "HWLOC_THISSYSTEM": "0",
        "HWLOC_COMPONENTS": "linux,stop",
        "HWLOC_DUMPED_HWDATA_DIR": "/var/run/hwloc",
    }
    command = ["lstopo", *options, "--of", "xml", "--force", str(file)]
    subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True)
    return file


def from_sysfs(root):
    """What a file of hwloc can hold of what /proc and /sys say."""
    return replace(read_topology(root), isa=())


def of_the_machine(topology):
    """Not of the process that made a tree, of which hwloc knows its cpuset alone."""
    online = sorted(cpu for core in topology.cores for cpu in core.cpus)
    return replace(topology, allowed_cpus=tuple(online))


@pytest.mark.parametrize("name", TREES)
def test_what_lstopo_writes_is_read_as_the_tree_is(name, root_of, tmp_path):
    found = read_lstopo(lstopo(root_of(name), tmp_path / "node.xml"))
    expected = of_the_machine(from_sysfs(root_of(name)))
    if expected.is_knl:  # hwloc names a KNL's modes and does not say that it guessed
        expected = replace(expected, inferred=found.inferred)
    assert found == expected


def test_lstopo_keeps_bandwidths_and_the_cpuset(tmp_path):
    """A third node that is HBM by its bandwidth, and a cpuset that allows half of the CPUs."""
    tree = xeon(
        [[i, i + 4] for i in range(4)],
        [0, 0, 1, 1],
        [(range(2), 96 * GB), (range(2, 4), 96 * GB), ((), 64 * GB)],
        distances=[[10, 21, 24], [21, 10, 14], [24, 14, 10]],
        files={
            **hmat((100_000, 100_000, 150_000), "access1"),
            "proc/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n",
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cgroup.controllers": "cpuset cpu\n",
            "sys/fs/cgroup/cpuset.cpus.effective": "0-1,4-5\n",
        },
    )
    root = tree.write(tmp_path / "root")
    found = read_lstopo(lstopo(root, tmp_path / "all.xml", "--disallowed"))
    assert found == from_sysfs(root)
    assert (found.memory_nodes[2].kind, found.memory_nodes[2].nearest_cpu_node) == ("hbm", 1)
    assert (found.allowed_cpus, len(found.cores), found.offline_cpus) == ((0, 1, 4, 5), 4, ())
    # Without the option lstopo hides CPUs, and its file does not say why.
    hidden = read_lstopo(lstopo(root, tmp_path / "allowed.xml"))
    assert (hidden.allowed_cpus, len(hidden.cores)) == ((0, 1, 4, 5), 2)
    assert hidden.offline_cpus == (2, 3, 6, 7)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", TREES)
def test_both_versions_of_the_format_say_what_sysfs_says(name, version, root_of, tmp_path):
    found = read_lstopo(write_xml(TREES[name][0], tmp_path / "node.xml", version))
    assert found == of_the_machine(from_sysfs(root_of(name)))


@st.composite
def trees(draw):
    """One or two sockets of whole NUMA nodes, each of whole tiles, with CPUs numbered at random,
    some offline; nodes without CPUs; bandwidths of some nodes."""
    parts = draw(st.integers(1, 2))
    sockets = draw(st.integers(1, 2))
    tiles = parts * sockets * draw(st.integers(1, 2))
    mates, threads = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    count = tiles * mates
    numbers = draw(st.permutations(range(count * threads)))
    cores = [sorted(numbers[n * threads : (n + 1) * threads]) for n in range(count)]
    owners = parts * sockets
    each = count // owners
    every = owners + draw(st.integers(0, 3))
    # Not symmetric, and not even sane, so that only the right number of all will do.
    row = st.lists(st.integers(10, 50), min_size=every, max_size=every)
    rows = draw(st.lists(row, min_size=every, max_size=every))
    sizes = draw(st.lists(st.integers(1, 200), min_size=every, max_size=every))
    nodes = [
        (range(n * each, (n + 1) * each) if n < owners else (), size * GB)
        for n, size in enumerate(sizes)
    ]
    # The first core of every node stays online, so that the node has CPUs.
    spare = [c for n, cs in enumerate(cores) if n % each for c in cs]
    model, name = draw(
        st.sampled_from([(87, KNL_7250), (143, "Intel(R) Xeon(R) CPU Max 9480"), (85, "Xeon")])
    )
    return Tree(
        name,
        6,
        model,
        "avx2",
        cores=cores,
        tiles=[n // mates for n in range(count)],
        sockets=[n * sockets // count for n in range(count)],
        nodes=nodes,
        distances=rows,
        offline=draw(st.sets(st.sampled_from(spare))) if spare else [],
        files=hmat(draw(st.lists(st.integers(0, 5), max_size=every))),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tree=trees())
def test_any_node_is_the_same_by_sysfs_and_by_either_format(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("node")
    root = tree.write(folder / "root")
    assert read_lstopo(write_xml(tree, folder / "2.xml", 2)) == from_sysfs(root)
    for name in tree.files:  # version 1 has no bandwidths
        (root / name).unlink()
    assert read_lstopo(write_xml(tree, folder / "1.xml", 1)) == from_sysfs(root)
    shutil.rmtree(folder)


def edited(folder, tree, version, *replacements):
    """A file with parts of its text replaced, all of which must be there."""
    file = write_xml(tree, folder / "node.xml", version)
    text = file.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    return file


def test_modes_that_hwloc_names_count_as_read(tmp_path):
    info = '<info name="ClusterMode" value="All2All"/><info name="MemoryMode" value="Hybrid25"/>'
    file = edited(tmp_path, QUADRANT_FLAT, 2, ("<info name=", f"{info}<info name="))
    found = read_lstopo(file)
    assert (found.cluster_mode, found.memory_mode, found.inferred) == ("a2a", "hybrid", ())


@pytest.mark.parametrize("version", [1, 2])
def test_without_distances_the_nearest_node_is_the_one_beside(version, tmp_path):
    text = write_xml(snc_flat(4, (2, 0, 3, 1)), tmp_path / "node.xml", version).read_text()
    tag = "distances2" if version == 2 else "distances"
    start, end = text.index(f"<{tag}"), text.rindex(f"</{tag}>") + len(f"</{tag}>")
    (tmp_path / "node.xml").write_text(text[:start] + text[end:])
    nodes = read_lstopo(tmp_path / "node.xml").memory_nodes
    assert [n.nearest_cpu_node for n in nodes[4:]] == [2, 0, 3, 1]


@pytest.mark.parametrize(
    ("subtype", "kind"),
    [("HBM", "hbm"), ("CXL-DRAM", "cxl"), ("MCDRAM", "mcdram"), ("DRAM", "cxl"), ("GPU", "cxl")],
)
def test_hwlocs_word_for_memory_counts(subtype, kind, tmp_path):
    """Not for memory with CPUs, and MCDRAM of a KNL has been called HBM too."""
    tree = replace(QUADRANT_FLAT, model=85, name="Xeon")
    file = edited(tmp_path, tree, 2, ('"NUMANode"', f'"NUMANode" subtype="{subtype}"'))
    assert [n.kind for n in read_lstopo(file).memory_nodes] == ["ddr", kind]
    file = edited(tmp_path, QUADRANT_FLAT, 2, ('"NUMANode"', f'"NUMANode" subtype="{subtype}"'))
    assert [n.kind for n in read_lstopo(file).memory_nodes] == ["ddr", "mcdram"]


def test_memory_on_the_package_that_is_numbered_first_has_no_cpus(tmp_path):
    tree = replace(QUADRANT_FLAT, model=85, nodes=[((), 16 * GB), (range(68), 96 * GB)])
    old = 'os_index="0" gp_index="1000"'
    nodes = read_lstopo(edited(tmp_path, tree, 2, (old, f'{old} subtype="HBM"'))).memory_nodes
    assert [(n.kind, n.nearest_cpu_node) for n in nodes] == [("hbm", 1), ("ddr", 1)]


def test_a_memory_side_cache_is_no_tile_and_hides_no_node(root_of, tmp_path):
    file = edited(
        tmp_path,
        TREES["quadrant-cache"][0],
        2,
        ('<object type="NUMANode"', '<object type="MemCache" depth="2"><object type="NUMANode"'),
        ('local_memory="103079215104" />', 'local_memory="103079215104" /></object>'),
    )
    assert read_lstopo(file) == from_sysfs(root_of("quadrant-cache"))


def test_a_xeon_max_of_unknown_memory_is_not_taken_for_hbm_alone(tmp_path):
    """lstopo that may not read /sys knows the processor and not how large its memory is."""
    tree = xeon([[0]], [0], [([0], 0)], model=143, name="Intel(R) Xeon(R) CPU Max 9480")
    found = read_lstopo(write_xml(tree, tmp_path / "node.xml", 2))
    assert [node.kind for node in found.memory_nodes] == ["ddr"]
    assert found.memory_mode == "cache"


@pytest.mark.parametrize(("version", "number"), [("2.0", 3), ("3.0", 32)])
def test_fabrics_are_the_openfabrics_devices(version, number, tmp_path):
    devices = "".join(
        f'<object type="OSDev" name="{name}" osdev_type="{kind}"/>'
        for name, kind in [
            ("mlx5_0", number),
            ("hfi1_0", number),
            ("ib0", 2),
            ("mem0", 35 - number),
        ]
    )
    end = "</object>\n  <memattr"
    file = edited(tmp_path, VM, 2, ('"2.0"', f'"{version}"'), (end, devices + end))
    assert read_lstopo(file).fabrics == ("hfi1_0", "mlx5_0")


def test_a_machine_of_cpus_alone_is_read(tmp_path):
    """hwloc 1 may know neither sockets nor cores nor memory."""
    pus = "".join(f'<object type="PU" os_index="{n}"/>' for n in (2, 0))
    (tmp_path / "a.xml").write_text(f'<topology><object type="Machine">{pus}</object></topology>')
    found = read_lstopo(tmp_path / "a.xml")
    assert [(c.socket, c.tile, c.node, c.cpus) for c in found.cores] == [
        (0, 0, 0, (0,)),
        (0, 2, 0, (2,)),
    ]
    assert (found.uarch, found.family, found.cpu_model) == ("unknown", 0, "unknown")
    assert (found.memory_nodes, found.offline_cpus, found.allowed_cpus) == ((), (), (0, 2))
    assert (found.isa, found.hugepages, found.hugepage_pools, found.governor) == ((), "", (), "")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('type="PU"', 'type="Misc"', ["no object of type PU"]),
        ('type="PU" cpuset="0x00000001" os_index="0"', 'type="PU"', ["os_index=''"]),
        ('type="PU" cpuset="0x00000001" os_index="0"', 'type="PU" os_index="-1"', ["'-1'"]),
        ('type="NUMANode" cpuset="0x00000003"', 'type="NUMANode"', ["NUMANode has CPUs"]),
        ('cpuset="0x00000003"', 'cpuset="0-1"', ["cpuset='0-1'", "0x0000000f"]),
        ('local_memory="', 'local_memory="much', ["local_memory='much"]),
        ('value="25"', 'value="six"', ["CPUFamilyNumber='six'"]),
        ("<topology ", "<lstopo ", ["is no XML"]),
        ("topology", "lstopo", ["<lstopo>", "<topology>"]),
        ("object", "thing", ["<topology> is no"]),
        ("</topology>", "", ["is no XML"]),
        ("<topology ", '<!DOCTYPE t [<!ENTITY a "b">]><topology ', ["<!ENTITY"]),
        ("AMD EPYC", "&epyc;", ["is no XML"]),
    ],
)
def test_an_odd_file_is_refused_in_one_line(old, new, words, tmp_path):
    refused(edited(tmp_path, VM, 2, (old, new)), words)


@pytest.mark.parametrize(
    ("version", "old", "new", "words"),
    [
        (2, "10 31 31 10", "10 31 31", ["2 nodes are 3 numbers, not 4"]),
        (2, "10 31 31 10", "10 31 31 x", ["u64values='x'"]),
        (2, "<indexes>1 0", "<indexes>1", ["1 nodes are 4 numbers, not 1"]),
        (2, 'kind="5"', 'kind="latency"', ["kind='latency'"]),
        (1, 'value="3.100000"', 'value="far"', ["value='far'"]),
        (1, 'value="3.100000"', 'value="inf"', ["value='inf'"]),
        (1, 'latency_base="10.0"', "", ["latency_base=''"]),
    ],
)
def test_odd_distances_are_refused_in_one_line(version, old, new, words, tmp_path):
    refused(edited(tmp_path, QUADRANT_FLAT, version, (old, new)), words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is no XML"]),
        (b"\xff\xfe<\0", ["is not UTF-8 at byte 0"]),
        (b"<topology><object>" + b"<object>" * 9999 + b"</object>" * 9999 + b"</object></topology>",
         ["no object of type PU"]),
    ],
)  # fmt: skip
def test_what_is_no_such_file_is_refused_in_one_line(content, words, tmp_path):
    (tmp_path / "node.xml").write_bytes(content)
    refused(tmp_path / "node.xml", words)


def test_a_path_that_is_no_file_is_refused_in_one_line(tmp_path):
    refused(tmp_path / "none.xml", ["No such file"])
    refused(tmp_path, ["Is a directory"])


def refused(file: Path, words):
    with pytest.raises(InputError) as refusal:
        read_lstopo(file)
    said = str(refusal.value)
    assert all(word in said for word in [str(file), "lstopo FILE.xml", *words]), said
    assert "\n" not in said


@given(st.sets(st.integers(0, 200)))
def test_masks_of_these_tests_have_no_padding_but_whole_words(cpus):
    words = mask(cpus).split(",")
    padded = "".join(word[2:].rjust(8, "0") if word else "0" * 8 for word in words)
    assert int(padded, 16) == sum(1 << cpu for cpu in cpus)
