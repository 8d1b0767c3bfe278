"""Causes in the stack: torch, oneDNN, OpenMP, MPI, oneCCL, and the variables that steer them."""

from __future__ import annotations

import re
from pathlib import Path

from knl.choices import layout_problem
from knl.doctor.facts import Facts
from knl.doctor.finding import Finding
from knl.doctor.stack import isa_level

_KNL_STACK = (
    "pip install '.[knl]' in knl's folder on Python 3.9: torch 1.11 still knows KNL's AVX-512"
)
_A_STACK = "pip install '.[modern]' in knl's folder, or '.[knl]' for a Xeon Phi"
# oneDNN's and ATen's AVX-512 kernels want these; a KNL has the first alone.
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
# Devices of a fast network, and the libfabric providers that drive them.
_NETWORKS = {"hfi1": ("psm2", "opx"), "mlx5": ("mlx", "verbs")}


def check_probe(facts: Facts) -> Finding | None:
    """The stack crashed, hung, or could not do a thing that it must."""
    stack = facts.stack
    if not stack.failure:
        failed = [p for p in ("convolution", "collectives", "libraries") if p in stack.problems]
        if not failed or "torch" in stack.problems:
            return None
        message = f"the stack fails at {failed[0]}: {stack.problems[failed[0]]}"
        return Finding("probe-failed", "broken", message, _A_STACK)
    cure = f"python -m knl.doctor.probe shows its own words; {_A_STACK}"
    if stack.killed_by == "SIGILL" and "ATEN_CPU_CAPABILITY" in facts.environment:
        cure = "unset ATEN_CPU_CAPABILITY"
    elif stack.killed_by == "SIGILL":
        cure = f"a library was built for another CPU; {_A_STACK}"
    return Finding(
        "probe-failed",
        "broken",
        f"the process that loads the stack {stack.failure}, at {stack.doing}",
        cure,
    )


def check_torch(facts: Facts) -> Finding | None:
    """There is no torch, or it does not import."""
    problem = facts.stack.problems.get("torch")
    if problem is None:
        return None
    return Finding("no-torch", "broken", f"torch does not import: {problem}", _A_STACK)


def check_knl_torch(facts: Facts) -> Finding | None:
    """From 1.12 on torch's oneDNN has lost the code for KNL; that of the blocked layout has it."""
    if not facts.node.is_knl or facts.stack.torch_release < (1, 12):
        return None
    message = (
        f"torch {facts.stack.torch} runs convolutions as AVX2 on a {facts.node.uarch}, at about "
        "half the speed"
    )
    if facts.layout == "blocked":
        message += "; knl's own are not torch's, but other programs' are"
        return Finding("knl-avx2-convolutions", "note", message, _KNL_STACK)
    return Finding("knl-avx2-convolutions", "slow", message, _KNL_STACK)


def check_layout(facts: Facts) -> Finding | None:
    """The plan's layout has no AVX-512 kernels on this node, or does not run at all."""
    if problem := layout_problem(facts.node, facts.layout):
        cure = "unset KNL_LAYOUT, and run knl tune here in place of the profile"
        return Finding("layout-avx2", "slow", f"the plan's {problem}", cure)
    why = facts.stack.problems.get("blocked")
    if why is None or "torch" in facts.stack.problems or facts.layout != "blocked":
        return None
    cure = "pip install onednn-cpu-gomp==2022.0.2, a part of both stacks"
    message = f"the plan's layout, blocked, does not run: {why}"
    return Finding("layout-broken", "broken", message, cure)


def check_isa(facts: Facts) -> Finding | None:
    """The plan's convolutions used less than this CPU has."""
    own = {"ipex": "ipex_optimized"}.get(facts.layout, facts.layout)
    every = facts.stack.convolutions
    ran = [c for c in every if c.layout == own] or every  # where the plan's does not run, the rest
    lost = facts.node.is_knl and facts.stack.torch_release >= (1, 12) and own != "blocked"
    lost = lost or bool(layout_problem(facts.node, facts.layout))
    if not facts.is_here or lost or not facts.stack.torch:
        return None
    if not ran:
        if facts.stack.failure or facts.stack.problems.get("convolution"):
            return None
        return Finding("no-onednn", "slow", "torch ran a convolution without oneDNN", _A_STACK)
    here = _level_of(facts)
    below = [c for c in ran if isa_level(c.isa) < here]
    if not below:
        return None
    limits = [n for n in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if n in facts.environment]
    where = ", ".join(f"{c.layout} {c.direction} {c.implementation}" for c in below)
    return Finding(
        "isa-below-cpu",
        "slow",
        f"convolutions ran below this CPU's {('SSE', 'AVX', 'AVX2', 'AVX-512')[here - 1]}: {where}",
        f"unset {' and '.join(limits)}" if limits else f"ONEDNN_VERBOSE=all says why; {_A_STACK}",
    )


def check_aten(facts: Facts) -> Finding | None:
    """ATEN_CPU_CAPABILITY is obeyed without a look at the CPU."""
    value = facts.environment.get("ATEN_CPU_CAPABILITY", "")
    cure = "unset ATEN_CPU_CAPABILITY: torch finds out by itself"
    missing = [flag for flag in _AVX512 if flag not in facts.node.isa]
    if value.startswith("avx512") and missing:
        message = f"crashes (SIGILL) on this CPU, which has no {', '.join(missing)}"
        return Finding("aten-capability", "broken", f"ATEN_CPU_CAPABILITY={value} {message}", cure)
    if value == "default" and "avx2" in facts.node.isa:
        message = "ATEN_CPU_CAPABILITY=default turns AVX2 off in torch's own kernels"
        return Finding("aten-capability", "slow", message, cure)
    return None


def check_openmp(facts: Facts) -> Finding | None:
    """Two runtimes are two pools of threads on the same cores."""
    runtimes = facts.stack.openmp
    if len(runtimes) < 2:
        return None
    preloaded = re.split("[ :]", facts.environment.get("LD_PRELOAD", ""))
    names = [Path(path).name for path in preloaded]
    first = next((name for name in names if re.match(r"lib(gomp|iomp5|omp)\b", name)), "libgomp")
    if not first.startswith("libgomp"):
        # It answers to the names of libgomp too, and being first it gets every call.
        return Finding(
            "two-openmp-runtimes",
            "note",
            f"{first} is preloaded and does all the work of: {', '.join(runtimes)}",
            "none needed",
        )
    return Finding(
        "two-openmp-runtimes",
        "slow",
        f"{len(runtimes)} OpenMP runtimes in one process: {', '.join(runtimes)}",
        "leave one: take the other out of LD_PRELOAD, or preload libiomp5.so to stand in for all",
    )


def check_ipex(facts: Facts) -> Finding | None:
    """IPEX is installed but does not work with this torch."""
    problem = facts.stack.problems.get("ipex", "")
    absent = not problem or "No module named 'intel_extension_for_pytorch'" in problem
    if absent or "torch" in facts.stack.problems:
        return None
    return Finding(
        "ipex-broken",
        "slow",
        f"intel-extension-for-pytorch does not work: {problem}",
        "its version must be torch's: pip install '.[knl]', or pip uninstall it",
    )


def check_mpi(facts: Facts) -> Finding | None:
    """Ranks cannot find each other."""
    problem = facts.stack.problems.get("mpi")
    if problem is None:
        return None
    cure = f"{_A_STACK}; or load your site's MPI module"
    return Finding("no-mpi", "broken", f"MPI does not load: {problem}", cure)


def check_provider(facts: Facts) -> Finding | None:
    """Intel MPI without a libfabric provider dies in MPI_Init."""
    found, environment = facts.stack.providers, facts.environment
    one_host = environment.get("I_MPI_FABRICS") == "shm"
    if "Intel" not in facts.stack.mpi or found is None or one_host:
        return None
    folder = environment.get("FI_PROVIDER_PATH", "the stack")
    if not found:
        message = f"Intel MPI finds no libfabric provider (lib*-fi.so) in {folder}"
        return Finding("mpi-no-provider", "broken", message, "unset FI_PROVIDER_PATH: knl sets it")
    have = sorted(provider_names(found))
    missing = [name for name in _asked_for(facts) if name not in have]
    if missing:
        message = f"FI_PROVIDER={environment['FI_PROVIDER']}: there is no {', '.join(missing)}"
        cure = f"unset FI_PROVIDER, or take one of: {', '.join(have)}"
        return Finding("mpi-no-provider", "broken", message, cure)
    return None


def check_network(facts: Facts) -> Finding | None:
    """A fast network that no provider drives, or a provider whose network is not there."""
    if "Intel" not in facts.stack.mpi or facts.stack.providers is None:
        return None
    asked = _asked_for(facts)
    usable = set(asked) or provider_names(facts.stack.providers)
    for prefix, drivers in _NETWORKS.items():
        devices = [name for name in facts.node.fabrics if name.startswith(prefix)]
        if devices and not usable.intersection(drivers):
            message = (
                f"{devices[0]} is there, but MPI has no provider {' or '.join(drivers)} for it"
            )
            cure = f"FI_PROVIDER={drivers[0]}, and an MPI that has it: impi-rt up to 2021.18"
            return Finding("slow-network", "slow", message, cure)
    if "psm2" in asked and not any(name.startswith("hfi1") for name in facts.node.fabrics):
        message = "FI_PROVIDER=psm2, but there is no Omni-Path device (hfi1_*)"
        return Finding("mpi-no-provider", "broken", message, "unset FI_PROVIDER")
    return None


def check_collectives(facts: Facts) -> Finding | None:
    """auto would not take oneCCL."""
    reasons = facts.stack.collectives
    if not reasons.get("oneccl"):
        return None
    taken = collective_provider(facts)
    is_intel = "Intel" in facts.stack.mpi
    return Finding(
        "no-oneccl",
        "slow" if is_intel else "note",
        f"collectives would go over {taken or 'nothing'}, not oneCCL: {reasons['oneccl']}",
        _A_STACK if is_intel else "oneCCL needs Intel MPI or MPICH; mpi and gloo do without",
    )


def check_launch(facts: Facts) -> Finding | None:
    """The launch that this process is part of."""
    if not facts.launch_problem:
        return None
    cure = "start the ranks again as it says"
    return Finding("launch", "broken", facts.launch_problem, cure)


def collective_provider(facts: Facts) -> str:
    """What `--provider auto` takes between ranks; "" if none works."""
    reasons = facts.stack.collectives
    return next((name for name, reason in reasons.items() if not reason), "")


def provider_names(files: tuple[str, ...]) -> set[str]:
    """The names that FI_PROVIDER knows, of files such as libpsmx2-fi.so, libverbs-1.12-fi.so."""
    stems = (re.sub(r"^lib|(-[\d.]+)?-fi\.so$", "", name) for name in files)
    return {{"psmx2": "psm2", "rxm": "ofi_rxm"}.get(stem, stem) for stem in stems}


def _asked_for(facts: Facts) -> list[str]:
    """Names in FI_PROVIDER, but for a list of those not to take (^a,b)."""
    value = facts.environment.get("FI_PROVIDER", "")
    return [] if value.startswith("^") else [name for name in re.split("[,;]", value) if name]


def _level_of(facts: Facts) -> int:
    """What this CPU has for oneDNN (isa_level): AVX-512 is all of it, or a KNL's."""
    isa = facts.node.isa
    if all(flag in isa for flag in _AVX512) or (facts.node.is_knl and "avx512f" in isa):
        return 4
    return 3 if "avx2" in isa else 2 if "avx" in isa else 1


CHECKS = (
    check_probe,
    check_torch,
    check_knl_torch,
    check_layout,
    check_isa,
    check_aten,
    check_openmp,
    check_ipex,
    check_mpi,
    check_provider,
    check_network,
    check_collectives,
    check_launch,
)
