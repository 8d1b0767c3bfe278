"""A real MPI_Allreduce on simulated nodes (SimGrid's SMPI, simgrid.org): the model's referee.

SMPI runs the algorithm message by message; what shares a link shares its bandwidth. Its own factors
for MPI's overhead are set to none, as a site's latency and bandwidth are what MPI has measured.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
from pathlib import Path

from knl.errors import FailedError, InputError
from knl.site import Network

_SOURCE = Path(__file__).with_name("smpi_allreduce.c")
_TIMEOUT_S = 600
# Algorithms of ours by what SMPI calls them.
SELECTORS = {"ring": "lr", "halving-doubling": "rab"}
# Nothing is computed, no window of TCP in the way, no corrections for MPI's overhead.
_FLAGS = (
    "smpi/simulate-computation:no", "smpi/privatization:no",
    "smpi/shared-malloc-blocksize:134217728", "network/model:CM02", "network/TCP-gamma:0",
    "smpi/async-small-thresh:0", "smpi/send-is-detached-thresh:0",
)  # fmt: skip


def require_smpi() -> None:
    """Raise InputError where SimGrid is not installed."""
    if not (shutil.which("smpicc") and shutil.which("smpirun")):
        raise InputError("--smpi: no smpicc, smpirun on PATH: install SimGrid (libsimgrid-dev)")


def compile_allreduce(folder: Path) -> Path:
    """The program, built into `folder`. Raises FailedError with the compiler's last words."""
    program = folder / "allreduce"
    _run(["smpicc", "-O2", "-o", str(program), str(_SOURCE)])
    return program


def simulate(program: Path, algorithm: str, size: int, nodes: int, net: Network) -> float:
    """Seconds of an allreduce of `size` bytes with one rank a node, which fills its node's link.
    Raises FailedError."""
    with tempfile.TemporaryDirectory(prefix="knl-smpi-") as folder:
        platform, hosts = Path(folder, "platform.xml"), Path(folder, "hosts")
        platform.write_text(_platform(nodes, net))
        hosts.write_text("".join(f"n{number}\n" for number in range(nodes)))
        flags = [f"--cfg={flag}" for flag in (*_FLAGS, f"smpi/allreduce:{SELECTORS[algorithm]}")]
        command = ["smpirun", "-np", str(nodes), "-platform", str(platform)]
        command += ["-hostfile", str(hosts), *flags, "--log=root.thres:critical"]
        return float(_run([*command, str(program), str(size)]).split()[-1])


def _platform(nodes: int, net: Network) -> str:
    """A fat tree of two levels: leaf switches, and as many cores as a leaf has links up. The four
    links between nodes of two leaves have the site's latency together; within a leaf it is two."""
    leaves = math.ceil(nodes / net.leaf_nodes)
    tree = f"2;{net.leaf_nodes},{leaves};1,{net.leaf_uplinks};1,1"
    return f"""<?xml version='1.0'?>
<!DOCTYPE platform SYSTEM "https://simgrid.org/simgrid.dtd">
<platform version="4.1">
  <cluster id="tree" prefix="n" suffix="" radical="0-{leaves * net.leaf_nodes - 1}" speed="1Gf"
           bw="{net.node_gb_s}GBps" lat="{net.latency_us / 4}us" topology="FAT_TREE"
           topo_parameters="{tree}" loopback_bw="100GBps" loopback_lat="0.1us"/>
</platform>
"""


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise FailedError(f"{command[0]}: no end after {_TIMEOUT_S} s; try fewer nodes") from None
    if done.returncode != 0:
        words = " ".join((done.stderr or done.stdout).split())[-300:]
        raise FailedError(f"{command[0]} failed with status {done.returncode}: {words}")
    return done.stdout
