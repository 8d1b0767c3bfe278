"""What the probe found: the stack's versions, and the convolutions that oneDNN ran."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PROBE = (sys.executable, "-m", "knl.doctor.probe")
# The first import of torch from a cold Lustre takes minutes on a KNL.
_LIMIT_S = 300.0
# What the probe calls them, and what they are.
_LAYOUTS = ("contiguous", "channels_last", "blocked", "ipex_optimized")
_DIRECTIONS = {
    "forward_training": "forward",
    "forward_inference": "forward",
    "backward_data": "backward_data",
    "backward_weights": "backward_weights",
}


@dataclass(frozen=True)
class Convolution:
    """A convolution that ran. `layout`: of memory, or IPEX's; `direction`: forward, backward_data,
    backward_weights; `implementation`: as oneDNN names it, such as jit:avx2; `isa`: the least that
    the name tells, such as avx2, "" where it tells none."""

    layout: str
    direction: str
    implementation: str
    isa: str


@dataclass(frozen=True)
class Stack:
    """Versions, "" where there is none. `onednn`: of each oneDNN that ran; `onednn_isa`: what the
    first of them takes the CPU for; `openmp`: paths of the runtimes in the process; `providers`:
    libfabric's, None where FI_PROVIDER_PATH is not set; `collectives`: why auto would pass each
    provider over; `problems`: of parts that could not be had; `failure`: how the probe ended too
    early, `killed_by`: the signal's name, `doing`: at what part; all "" if it was through.
    """

    torch: str = ""
    aten: str = ""
    mkl: str = ""
    onednn: tuple[str, ...] = ()
    onednn_isa: str = ""
    convolutions: tuple[Convolution, ...] = ()
    ipex: str = ""
    mpi: str = ""
    mpi4py: str = ""
    providers: tuple[str, ...] | None = None
    collectives: Mapping[str, str] = field(default_factory=dict)
    oneccl: str = ""
    libccl: str = ""
    openmp: tuple[str, ...] = ()
    allocator: str = ""
    problems: Mapping[str, str] = field(default_factory=dict)
    failure: str = ""
    doing: str = ""
    killed_by: str = ""

    @property
    def isa(self) -> str:
        """The least instruction set among the convolutions; "" if one names none, or none ran."""
        return min((c.isa for c in self.convolutions), key=isa_level, default="")

    @property
    def torch_release(self) -> tuple[int, int]:
        """Major and minor number; (0, 0) where there is no torch."""
        found = re.match(r"(\d+)\.(\d+)", self.torch)
        return (int(found[1]), int(found[2])) if found else (0, 0)


def run_probe(
    environment: Mapping[str, str], command: Sequence[str] = PROBE, limit_s: float = _LIMIT_S
) -> Stack:
    """Run the probe under `environment`, at most `limit_s` seconds. Its end is never an exception:
    a crash of the stack is what doctor is for."""
    verbose = {"ONEDNN_VERBOSE": "1", "DNNL_VERBOSE": "1"}  # its name now, and of old
    failure = killed_by = ""
    process = subprocess.Popen(
        command,
        env={**environment, **verbose},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    with process:
        try:
            output, complaints = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, complaints = process.communicate()
            failure = f"did not end in {limit_s:g} s"
    if not failure and process.returncode < 0:
        killed_by = _signal_name(-process.returncode)
        failure = f"was killed by {killed_by}"
    elif not failure and process.returncode > 0:
        last = (complaints.strip().splitlines() or ["it said nothing"])[-1]
        failure = f"ended with status {process.returncode}: {last}"
    return _stack(output.splitlines(), failure, killed_by)


def convolutions(layout: str, lines: Iterable[str]) -> list[Convolution]:
    """The convolutions among oneDNN's verbose lines, of any release: the fields after `exec` are
    engine, primitive, implementation, direction."""
    found = []
    for line in lines:
        fields = line.split(",")
        if "exec" not in fields:
            continue
        _, primitive, implementation, kind = fields[fields.index("exec") + 1 :][:4]
        if primitive == "convolution":
            direction = _DIRECTIONS.get(kind, kind)
            found.append(Convolution(layout, direction, implementation, isa_of(implementation)))
    return found


def isa_of(implementation: str) -> str:
    """The least instruction set that an implementation's name tells; "" where it tells none."""
    named = re.findall(r"sse41|avx\w*", implementation)
    return min(named, key=isa_level, default="")


def isa_level(isa: str) -> int:
    """How wide: 0 none, 1 SSE, 2 AVX, 3 AVX2, 4 AVX-512 and above."""
    for level, prefix in ((4, "avx512"), (4, "avx10"), (3, "avx2"), (2, "avx"), (1, "sse")):
        if isa.startswith(prefix):
            return level
    return 0


def _stack(lines: Iterable[str], failure: str, killed_by: str) -> Stack:
    found: dict[str, Any] = {}
    problems: dict[str, str] = {}
    doing = "its start"
    for line in lines:
        if not line.startswith("{"):
            continue  # what a library prints when the process ends
        message = json.loads(line)
        found.update(message.get("found", {}))
        problems.update(message.get("problem", {}))
        doing = message.get("doing", doing)
    verbose = {layout: found.pop(layout, []) for layout in _LAYOUTS}
    text = "\n".join(line for lines in verbose.values() for line in lines)
    isa = re.search(r"info,cpu,isa:(.+)", text)
    fields: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in found.items()
    }
    return Stack(
        **fields,
        onednn=tuple(re.findall(r"info,(?:oneDNN|DNNL) v([\d.]+)", text)),
        onednn_isa=isa[1].strip() if isa else "",
        convolutions=tuple(c for name in _LAYOUTS for c in convolutions(name, verbose[name])),
        problems=problems,
        failure=failure,
        doing=doing,
        killed_by=killed_by,
    )


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
