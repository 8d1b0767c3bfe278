"""Sets of CPUs as the kernel and hwloc write them: lists such as 0-3,8 and hexadecimal masks."""

from __future__ import annotations

from collections.abc import Iterable


def parse_cpulist(text: str) -> tuple[int, ...]:
    """CPUs of a list such as 0-3,8,10-11, in its order. Raises ValueError."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        cpus += range(int(first), int(last if dash else first) + 1)
    return tuple(cpus)


def parse_cpumap(text: str) -> tuple[int, ...]:
    """CPUs of a mask such as 00000000,0000000f (the kernel's cpumap), in rising order. Raises
    ValueError."""
    bits = int(text.strip().replace(",", "") or "0", 16)
    return tuple(cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1)


def format_cpulist(cpus: Iterable[int]) -> str:
    """The shortest cpulist of these CPUs; "" for none."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def format_cpumask(cpus: Iterable[int]) -> str:
    """The mask of these CPUs in hexadecimal, one word without commas or 0x: f0 for 4-7."""
    return f"{sum(1 << cpu for cpu in set(cpus)):x}"
