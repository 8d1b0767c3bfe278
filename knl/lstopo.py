"""Reads a node from hwloc's XML, as `lstopo FILE.xml` writes it on that node."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from knl.cpulist import parse_cpumap
from knl.errors import InputError
from knl.topology import Core, NodeFacts, Topology, by_place, memory_nodes, modes, uarch_of

_CURE = "write it anew on the node with: lstopo FILE.xml"
# Linux's distances are bytes: 10 is the node itself, 20 a near one, 255 out of reach.
_NEAR, _FAR = 20, 255
_LATENCY = 4  # of hwloc_distances_kind_e: the matrix holds latencies
_FAST = {"MCDRAM": "mcdram", "HBM": "hbm"}


@dataclass(frozen=True)
class _Place:
    """An object in hwloc's tree, and what it lies in. `cpus`: its own; `near`: its own or, where
    it has none, those of the smallest object around it that has some; `core`, `tile`: CPUs of the
    core and the L2 cache around it."""

    element: Element
    type: str
    depth: int
    cpus: tuple[int, ...]
    near: tuple[int, ...]
    socket: int
    tile: tuple[int, ...]
    core: tuple[int, ...]


def read_lstopo(path: Path) -> Topology:
    """Read a node from a file that lstopo of hwloc 1 or later wrote.

    What such a file lacks is left empty: isa, huge pages, governor. hwloc does not say when it
    guessed a KNL's modes, so modes that it names never count as inferred. From version 2 on it
    does not tell a CPU that is offline from one that the caller of lstopo was not allowed: both
    count as offline here, unless the file is of `lstopo --disallowed`. Raises InputError if the
    file cannot be read, is not hwloc's XML, or has no CPU.
    """
    root = _parse(path)
    places = list(_walk(path, root))
    machine = places[0].element
    gone = _offline(path, machine)
    online = {_whole(path, p.element, "os_index") for p in places if p.type == "PU"} - gone
    if not online:
        raise InputError(f"{path}: has no object of type PU that is online; {_CURE}")
    numa = {_whole(path, p.element, "os_index"): p for p in places if p.type == "NUMANode"}
    nodes = _nodes(path, root, numa)
    if nodes and not any(node.cpus for node in nodes.values()):
        raise InputError(f"{path}: no object of type NUMANode has CPUs; {_CURE}")
    cores = _cores(path, places, online, nodes)
    allowed = online
    if "allowed_cpuset" in machine.attrib:
        allowed = online.intersection(_cpus(path, machine, "allowed_cpuset"))
    info = _infos(root.iter("info"))
    family, model = (
        _int(path, name, info.get(name, "0")) for name in ("CPUFamilyNumber", "CPUModelNumber")
    )
    name = info.get("CPUModel", "unknown")
    uarch = uarch_of(family, model, info.get("CPUVendor", "unknown"))
    sockets = len({core.socket for core in cores})
    memory = memory_nodes(nodes, uarch, name, sockets)
    named = (info.get("ClusterMode", ""), info.get("MemoryMode", ""))
    cluster_mode, memory_mode, inferred = modes(uarch, name, sockets, memory, named)
    return Topology(
        cpu_model=name,
        family=family,
        model=model,
        uarch=uarch,
        isa=(),
        cores=cores,
        offline_cpus=tuple(sorted(gone)),
        allowed_cpus=tuple(sorted(allowed)),
        cluster_mode=cluster_mode,
        memory_mode=memory_mode,
        inferred=inferred,
        memory_nodes=memory,
        fabrics=_fabrics(root),
    )


def _parse(path: Path) -> Element:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {_CURE}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 at byte {error.start}; {_CURE}") from None
    # A few entities can grow to gigabytes, and expat refuses that from 2.4.1 on only. hwloc
    # declares none.
    if "<!ENTITY" in text:
        raise InputError(f"{path}: declares an <!ENTITY, which hwloc never does; {_CURE}")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InputError(f"{path}: is no XML: {error}; {_CURE}") from None
    if root.tag != "topology" or root.find("object") is None:
        raise InputError(f"{path}: <{root.tag}> is no <topology> with objects; {_CURE}")
    return root


def _walk(path: Path, root: Element) -> Iterator[_Place]:
    """Every object in the file's order, the machine first. No recursion: a file may nest deeper
    than Python's stack."""
    todo: list[tuple[Element, _Place | None]] = [(e, None) for e in root.findall("object")[:1]]
    while todo:
        element, parent = todo.pop()
        kind = element.get("type", "")
        cpus = _cpus(path, element, "cpuset")
        is_l2 = kind == "L2Cache" or (kind == "Cache" and element.get("depth") == "2")
        socket = parent.socket if parent else 0
        if kind in ("Package", "Socket") and "os_index" in element.attrib:
            socket = _whole(path, element, "os_index")
        place = _Place(
            element,
            kind,
            depth=parent.depth + 1 if parent else 0,
            cpus=cpus,
            near=cpus or (parent.near if parent else ()),
            socket=socket,
            tile=cpus if is_l2 else parent.tile if parent else (),
            core=cpus if kind == "Core" else parent.core if parent else (),
        )
        yield place
        todo += [(child, place) for child in reversed(element.findall("object"))]


def _offline(path: Path, machine: Element) -> set[int]:
    """hwloc 1 lists the CPUs that are online; hwloc 2 takes the others out of the cpuset."""
    online = "online_cpuset" if "online_cpuset" in machine.attrib else "cpuset"
    return set(_cpus(path, machine, "complete_cpuset")) - set(_cpus(path, machine, online))


def _cores(
    path: Path, places: Sequence[_Place], online: set[int], nodes: dict[int, NodeFacts]
) -> tuple[Core, ...]:
    node_of = {cpu: number for number, node in nodes.items() for cpu in node.cpus}
    cores: dict[tuple[int, ...], Core] = {}
    for place in places:
        cpu = _whole(path, place.element, "os_index") if place.type == "PU" else -1
        if cpu in online:
            threads = tuple(sorted(online.intersection(place.core) | {cpu}))
            tile = min(online.intersection(place.tile) | set(threads))
            cores[threads] = Core(place.socket, tile, node_of.get(cpu, 0), threads)
    return by_place(list(cores.values()))


def _nodes(path: Path, root: Element, places: Mapping[int, _Place]) -> dict[int, NodeFacts]:
    kinds = {number: _kind(place.element) for number, place in places.items()}
    # From version 2 on a node without CPUs bears those that are near. A CPU belongs to the
    # smallest set; of equal sets to ordinary memory, which Linux also numbers first.
    owner: dict[int, int] = {}
    for number in sorted(places, key=lambda n: (len(places[n].cpus), kinds[n] != "", n)):
        for cpu in places[number].cpus:
            owner.setdefault(cpu, number)
    distances = _distances(path, root, places)
    bandwidths = _bandwidths(path, root)
    return {
        number: NodeFacts(
            cpus=tuple(cpu for cpu in place.cpus if owner[cpu] == number),
            bytes=_whole(path, place.element, "local_memory", "0"),
            distances=distances.get(number, {}),
            bandwidth=bandwidths.get(place.element.get("gp_index", ""), 0),
            kind=kinds[number],
        )
        for number, place in places.items()
    }


def _kind(node: Element) -> str:
    """What hwloc says that memory on the package or on a device is; "" for any other."""
    info = _infos(node.findall("info"))
    subtype = node.get("subtype") or info.get("Type", "")  # hwloc 1 has it among the infos
    if subtype.startswith("CXL"):
        return "cxl"
    return _FAST.get(subtype, "")


def _distances(
    path: Path, root: Element, places: Mapping[int, _Place]
) -> dict[int, dict[int, int]]:
    """By numbers of nodes: from the first to the second. Where the file has none, nodes whose
    CPUs are near each other are near."""
    for matrix in root.findall("distances2"):
        if matrix.get("type") == "NUMANode" and _whole(path, matrix, "kind") & _LATENCY:
            numbers, values = (
                [_int(path, name, word) for e in matrix.findall(name) for word in _words(e)]
                for name in ("indexes", "u64values")
            )
            return _table(path, numbers, values)
    # hwloc 1 has one of each level below the machine, relative to the distance of neighbours.
    depths = {str(place.depth) for place in places.values()}
    for matrix in root.findall("object/distances"):
        size = _whole(path, matrix, "nbobjs")
        if matrix.get("relative_depth") in depths and size == len(places):
            base = _float(path, matrix, "latency_base")
            latencies = [_float(path, e, "value") for e in matrix.findall("latency")]
            return _table(path, list(places), [round(base * latency) for latency in latencies])
    return {
        a: {b: _NEAR if set(here.near) & set(there.near) else _FAR for b, there in places.items()}
        for a, here in places.items()
    }


def _table(path: Path, numbers: Sequence[int], values: Sequence[int]) -> dict[int, dict[int, int]]:
    size = len(numbers)
    if len(values) != size * size:
        raise InputError(
            f"{path}: distances of {size} nodes are {len(values)} numbers, not {size * size}; "
            f"{_CURE}"
        )
    return {
        number: dict(zip(numbers, values[row * size : (row + 1) * size]))
        for row, number in enumerate(numbers)
    }


def _bandwidths(path: Path, root: Element) -> dict[str, int]:
    """MB/s from the nearest CPUs, by hwloc's gp_index of the node: of reads, where it is known."""
    best: dict[str, int] = {}
    for name in ("Bandwidth", "ReadBandwidth"):
        found: dict[str, int] = {}
        for value in root.findall(f"memattr[@name='{name}']/memattr_value"):
            if value.get("target_obj_type") == "NUMANode":
                target = value.get("target_obj_gp_index", "")
                found[target] = max(found.get(target, 0), _whole(path, value, "value"))
        best.update(found)
    return best


def _fabrics(root: Element) -> tuple[str, ...]:
    """OpenFabrics devices; hwloc 3 made the numbers of types into bits."""
    number = "32" if root.get("version", "").startswith("3") else "3"
    devices = (e for e in root.iter("object") if e.get("osdev_type") == number)
    return tuple(sorted(device.get("name", "") for device in devices))


def _infos(elements: Iterable[Element]) -> dict[str, str]:
    """Names and values; of several with one name, the first."""
    found: dict[str, str] = {}
    for element in elements:
        found.setdefault(element.get("name", ""), element.get("value", ""))
    return found


def _words(element: Element) -> list[str]:
    return (element.text or "").split()


def _cpus(path: Path, element: Element, attribute: str) -> tuple[int, ...]:
    """CPUs of an attribute; none where it is missing."""
    text = element.get(attribute, "0x0")
    # A word of zeros is written as nothing or 0x0, where the kernel writes all eight digits.
    words = [word.strip().replace("0x", "", 1).rjust(8, "0") for word in text.split(",")]
    try:
        return parse_cpumap(",".join(words))
    except ValueError:
        raise InputError(
            f"{path}: {attribute}={text!r} is no mask of CPUs such as 0x0000000f; {_CURE}"
        ) from None


def _whole(path: Path, element: Element, attribute: str, default: str = "") -> int:
    return _int(path, attribute, element.get(attribute, default))


def _int(path: Path, name: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 20:  # hwloc's numbers have 64 bits
        raise InputError(f"{path}: {name}={text!r} is no whole number; {_CURE}")
    return int(text)


def _float(path: Path, element: Element, attribute: str) -> float:
    text = element.get(attribute, "")
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        raise InputError(f"{path}: {attribute}={text!r} is no number; {_CURE}")
    return value
