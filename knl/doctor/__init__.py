"""`knl doctor`: what this node and this stack really do, and what will be slow or broken."""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knl import topology
from knl.doctor import node_checks, stack_checks
from knl.doctor.facts import Facts, Room, gather
from knl.doctor.finding import Finding

_COLUMNS = 96


@dataclass(frozen=True)
class Report:
    """What was found, and the warnings it gives rise to."""

    facts: Facts
    warnings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is broken or slow; notes do not count."""
        return all(warning.severity == "note" for warning in self.warnings)

    def to_json(self) -> dict[str, Any]:
        """The object that `knl doctor --json` prints; its keys are a contract."""
        facts, stack = self.facts, self.facts.stack
        return {
            "ok": self.ok,
            "fsroot": facts.fsroot,
            "hardware": facts.node.to_json(),
            "memory_policy": asdict(facts.policy),
            "memory_limit": facts.memory_limit,
            "stack": {
                "python": platform.python_version(),
                "torch": stack.torch,
                "aten": stack.aten,
                "onednn": list(stack.onednn),
                "mkl": stack.mkl,
                "ipex": stack.ipex,
                "openmp": list(stack.openmp),
                "allocator": stack.allocator,
                "mpi": stack.mpi,
                "mpi4py": stack.mpi4py,
                "fabric_providers": list(stack.providers or ()),
                "oneccl": stack.oneccl,
                "libccl": stack.libccl,
                "problems": stack.problems,
                "failure": stack.failure,
            },
            "onednn_isa": stack.onednn_isa,
            "isa": stack.isa,
            "convolutions": [asdict(convolution) for convolution in stack.convolutions],
            "collectives": {
                "provider": stack_checks.collective_provider(facts),
                "passed_over": {k: v for k, v in stack.collectives.items() if v},
            },
            "tmp": asdict(facts.tmp),
            "shm": asdict(facts.shm),
            "warnings": [asdict(warning) for warning in self.warnings],
        }


def examine(fsroot: Path, environment: Mapping[str, str]) -> Report:
    """Examine the node below `fsroot`, and this machine's stack under `environment`; this runs a
    convolution in a process of its own, for a few seconds.

    Raises InputError when there is no node below `fsroot`.
    """
    return judge(gather(fsroot, environment))


def judge(facts: Facts) -> Report:
    """The report on facts that are known."""
    checks = (*stack_checks.CHECKS, *node_checks.CHECKS)
    found = [finding for check in checks if (finding := check(facts)) is not None]
    found.sort(key=lambda finding: ("broken", "slow", "note").index(finding.severity))
    return Report(facts, tuple(found))


def describe(report: Report) -> str:
    """The report for a reader, in lines of at most 96 columns where no path is longer."""
    facts, stack = report.facts, report.facts.stack
    lines = [topology.describe(facts.node)]
    if not facts.is_here:
        lines.append(f"(read below {facts.fsroot}; all that follows is this machine's)")
    lines += ["", *_stack_lines(facts)]
    if stack.convolutions:
        lines += [
            "",
            *_wrap(f"oneDNN sees {stack.onednn_isa or 'no ISA'}; convolutions that ran:", 2),
        ]
    for convolution in stack.convolutions:
        lines.append(
            f"  {convolution.layout:14} {convolution.direction:16} {convolution.implementation}"
        )
    lines.append("")
    for warning in report.warnings:
        lines += _wrap(f"{warning.severity}: {warning.message} [{warning.name}]", 2)
        lines += _wrap(f"  cure: {warning.cure}", 4)
    if report.ok:
        lines.append("nothing slow or broken was found")
    return "\n".join(lines)


def _stack_lines(facts: Facts) -> list[str]:
    stack = facts.stack
    provider = stack_checks.collective_provider(facts)
    reasons = [f"{name}: {why}" for name, why in stack.collectives.items() if why]
    rows = {
        "Python": platform.python_version(),
        "torch": f"{stack.torch} (ATen {stack.aten})" if stack.torch else "",
        "oneDNN": ", ".join(stack.onednn),
        "MKL": stack.mkl,
        "IPEX": stack.ipex,
        "OpenMP": ", ".join(stack.openmp),
        "allocator": stack.allocator,
        "MPI": stack.mpi,
        "libfabric": ", ".join(sorted(stack_checks.provider_names(stack.providers or ()))),
        "oneCCL": f"{stack.oneccl} {stack.libccl}".strip(),
        "collectives": "; ".join([f"auto takes {provider or 'none'}", *reasons]),
        "memory": f"policy {facts.policy.mode or 'unknown'}",
        "tmp": _room(facts.tmp),
        "shm": _room(facts.shm),
    }
    problems = {"IPEX": "ipex", "torch": "torch", "MPI": "mpi"}
    lines = []
    for name, value in rows.items():
        absent = "unknown" if stack.failure else "none"
        said = value or f"{absent} {stack.problems.get(problems.get(name, ''), '')}"
        lines += _wrap(f"{name:12} {said}", 13)
    return lines


def _room(room: Room) -> str:
    free = "cannot be written" if room.free is None else f"{room.free / (1 << 30):.1f} GiB free"
    return f"{room.path} {free}"


def _wrap(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text,
        _COLUMNS,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
