"""Writes a node of trees.py as lstopo of hwloc 1 or 2 would, as far as these differ."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from .trees import Tree


def write_xml(tree: Tree, path: Path, version: int) -> Path:
    """The file; `version` 1 or 2 of the format."""
    root = Element("topology", {"version": "2.0"} if version == 2 else {})
    online = [c for threads in tree.cores for c in threads if c not in tree.offline]
    machine = _object(root, "Machine", online, os_index=0, allowed_cpuset=mask(online))
    machine.set("complete_cpuset", mask(c for threads in tree.cores for c in threads))
    if version == 1:
        machine.set("online_cpuset", mask(online))
    for line in tree.hwloc.splitlines():
        name, _, value = line.partition(": ")
        if name.endswith("_mode"):  # cluster_mode is ClusterMode
            SubElement(machine, "info", name=name.title().replace("_", ""), value=value)
    for socket in sorted(set(tree.sockets)):
        inside = [n for n, s in enumerate(tree.sockets) if s == socket]
        package = _object(
            machine, "Package" if version == 2 else "Socket", _cpus(tree, inside), os_index=socket
        )
        info = [("CPUVendor", "GenuineIntel"), ("CPUModel", tree.name)]
        info += [("CPUFamilyNumber", tree.family), ("CPUModelNumber", tree.model)]
        for name, value in info:
            SubElement(package, "info", name=name, value=str(value))
        for number, (cores, _) in enumerate(tree.nodes):
            if cores and tree.sockets[cores[0]] == socket:
                _node_with_cpus(tree, package, number, version)
    (_distances2 if version == 2 else _distances1)(root, tree)
    indent(root)
    path.write_bytes(tostring(root, encoding="utf-8", xml_declaration=True))
    return path


def mask(cpus: Iterable[int]) -> str:
    """As hwloc prints a bitmap: words of zeros are left out, or 0x0 at the end."""
    bits = sum(1 << cpu for cpu in cpus)
    words = []
    while bits or not words:
        words.append(bits & 0xFFFFFFFF)
        bits >>= 32
    last = f"0x{words[0]:08x}" if words[0] else "0x0"
    return ",".join([*(f"0x{w:08x}" if w else "" for w in reversed(words[1:])), last])


def _object(parent: Element, kind: str, cpus: Iterable[int], **attributes: object) -> Element:
    more = {name: str(value) for name, value in attributes.items()}
    return SubElement(parent, "object", {"type": kind, "cpuset": mask(cpus), **more})


def _cpus(tree: Tree, cores: Iterable[int]) -> list[int]:
    return [c for n in cores for c in tree.cores[n] if c not in tree.offline]


def _numa(tree: Tree, parent: Element, number: int, cpus: Iterable[int]) -> Element:
    size = tree.nodes[number][1]
    return _object(
        parent, "NUMANode", cpus, os_index=number, gp_index=1000 + number, local_memory=size
    )


def _owner(tree: Tree, fast: int) -> int:
    """The node with CPUs that a node without is nearest to."""
    owners = [n for n, (cores, _) in enumerate(tree.nodes) if cores]
    return min(owners, key=lambda n: tree.distances[n][fast]) if tree.distances else owners[0]


def _node_with_cpus(tree: Tree, package: Element, number: int, version: int) -> None:
    """hwloc 1: cores lie in their node, a node without CPUs beside it; hwloc 2: both nodes hang
    from a group that holds the cores, and have its CPUs."""
    cores = tree.nodes[number][0]
    cpus = _cpus(tree, cores)
    group = _object(package, "Group", cpus)
    numa = _numa(tree, group, number, cpus)
    for fast, (none, _) in enumerate(tree.nodes):
        if not none and _owner(tree, fast) == number:
            _numa(tree, group, fast, cpus if version == 2 else ())
    above = group if version == 2 else numa
    for tile in sorted({tree.tiles[n] for n in cores}):
        mates = [n for n in cores if tree.tiles[n] == tile and _cpus(tree, [n])]
        if not mates:
            continue
        cache = "L2Cache" if version == 2 else "Cache"
        l2 = _object(above, cache, _cpus(tree, mates), depth=2)
        for core in mates:
            l1 = _object(l2, "L1Cache" if version == 2 else "Cache", _cpus(tree, [core]), depth=1)
            inner = _object(l1, "Core", _cpus(tree, [core]), os_index=core)
            for cpu in _cpus(tree, [core]):
                _object(inner, "PU", [cpu], os_index=cpu)


def _distances2(root: Element, tree: Tree) -> None:
    """Nodes in any order, and ten values an element."""
    order = list(range(len(tree.nodes)))[::-1]
    if tree.distances:
        matrix = SubElement(root, "distances2", type="NUMANode", kind="5", indexing="os")
        SubElement(matrix, "indexes").text = " ".join(map(str, order))
        values = [str(tree.distances[a][b]) for a in order for b in order]
        for start in range(0, len(values), 10):
            SubElement(matrix, "u64values").text = " ".join(values[start : start + 10]) + " "
    for name in ("WriteBandwidth", "ReadBandwidth"):
        attribute = SubElement(root, "memattr", name=name, flags="5")
        for number in order:
            path = f"sys/devices/system/node/node{number}/access0/initiators/read_bandwidth"
            if path in tree.files:
                value = tree.files[path].strip() if name.startswith("Read") else "1"
                target = {"target_obj_type": "NUMANode", "target_obj_gp_index": str(1000 + number)}
                SubElement(attribute, "memattr_value", target, value=value)


def _distances1(root: Element, tree: Tree) -> None:
    """Nodes in the order of the tree, whose depth below the machine is 3, as parts of the least."""
    if not tree.distances:
        return
    machine = root[0]
    order = [int(e.attrib["os_index"]) for e in root.iter("object") if e.get("type") == "NUMANode"]
    size = str(len(order))
    other = SubElement(machine, "distances", nbobjs=size, relative_depth="1", latency_base="1.0")
    matrix = SubElement(machine, "distances", nbobjs=size, relative_depth="3", latency_base="10.0")
    for a in order:
        for b in order:
            SubElement(other, "latency", value="1.000000")
            SubElement(matrix, "latency", value=f"{tree.distances[a][b] / 10:.6f}")
