"""Where a process and its threads may run, and where its memory comes from, in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from knl.bind import bind, cpus_from_launcher, rank_environment
from knl.comm.world import SINGLE, World
from knl.errors import InputError
from knl.plan import Memory, Plan, RankPlan, crowded_plan
from knl.sysfs import read_topology

MINE = sorted(os.sched_getaffinity(0))
FOUR = World(1, 4, 1, 4, "mpi")
START = """
import json, os, sys, threading
from pathlib import Path
from knl.bind import bind, bound, on_loader_cpus, set_memory_policy
from knl.plan import Memory, RankPlan

def mask():
    return sorted(os.sched_getaffinity(0))

def policy():
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    return next(line for line in lines if " heap" in line).split()[1]

def in_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]

def in_child(code="import os; print(sorted(os.sched_getaffinity(0)))"):
    import subprocess
    return json.loads(subprocess.check_output([sys.executable, "-c", code]))

def rank(cpus, policy="none", nodes=(), loader=()):
    return RankPlan(0, tuple(cpus), (), tuple(loader), Memory(policy, nodes))

mine = mask()
"""


def child(code, prefix=(), **environment):
    """The JSON that the code prints, run in a process of its own."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", START + code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rank(cpus, number=0, loader=()):
    return RankPlan(number, tuple(cpus), (), tuple(loader), Memory("none", ()))


def test_bound_is_for_what_is_started_inside_and_ends_with_it():
    code = """
with bound(rank(mine[-1:])) as refused:
    inside = [mask(), in_child(), refused]
try:
    with bound(rank(mine[:1])):
        raise OSError
except OSError:
    pass
print(json.dumps([inside, mask(), in_child()]))
"""
    inside, after, child_after = child(code)
    assert inside == [MINE[-1:], MINE[-1:], ""]
    assert after == child_after == MINE


def test_bind_stays_and_goes_to_children():
    code = "bind(rank(mine[:1])); print(json.dumps([mask(), in_child()]))"
    assert child(code) == [MINE[:1], MINE[:1]]


def test_cpus_that_are_not_here_are_refused_with_the_cure():
    with pytest.raises(InputError, match=r"CPUs 1020-1021 of rank 3: .* knl tune here") as caught:
        bind(rank((1020, 1021), number=3))
    assert "\n" not in str(caught.value)
    assert sorted(os.sched_getaffinity(0)) == MINE


@pytest.mark.parametrize(("policy", "name"), [("preferred", "prefer"), ("bind", "bind")])
def test_a_memory_policy_is_the_kernel_s_and_goes_to_children(policy, name):
    code = f"""
refused = set_memory_policy(Memory("{policy}", (0,)))
child = "import json, pathlib; print(json.dumps(pathlib.Path('/proc/self/numa_maps').read_text()))"
print(json.dumps([refused, policy(), in_child(child)]))
"""
    refused, mine, children = child(code)
    if "Operation not permitted" in refused:
        pytest.skip(refused)
    assert (refused, mine) == ("", f"{name}:0")
    assert f" {name}:0 heap" in children


def test_a_memory_policy_for_a_node_that_is_not_here_is_told_and_nothing_breaks():
    refused, policy, mask = child(
        "print(json.dumps([bind(rank(mine[:1], 'bind', (63,))), policy(), mask()]))"
    )
    assert refused.startswith("memory bind 63: the kernel refuses it (")
    assert "memory comes from the nearest node" in refused
    assert (policy, mask) == ("default", MINE[:1])


def test_bound_takes_the_memory_policy_back():
    code = """
with bound(rank(mine, "preferred", (0,))) as refused:
    inside = policy()
print(json.dumps([refused, inside, policy()]))
"""
    refused, inside, after = child(code)
    if "Operation not permitted" in refused:
        pytest.skip(refused)
    assert (refused, inside, after) == ("", "prefer:0", "default")


def test_loader_threads_get_all_cpus_though_the_main_thread_is_bound_to_one():
    code = """
os.sched_setaffinity(0, mine[:1])
with on_loader_cpus():
    inside = in_thread(mask)
print(json.dumps([inside, mask(), in_thread(mask)]))
"""
    assert child(code) == [MINE, MINE[:1], MINE[:1]]


def test_loader_threads_get_the_plan_s_loader_cpus():
    code = """
try:
    with on_loader_cpus():
        inside = in_thread(mask)
        raise KeyError
except KeyError:
    print(json.dumps([inside, mask()]))
"""
    assert child(code, KNL_LOADER_CPUS=str(MINE[-1])) == [MINE[-1:], MINE]


def test_the_mask_is_that_of_before_torch_came():
    """Importing torch under OMP_PROC_BIND binds the main thread to one CPU."""
    code = """
import torch
torch.ones(64, 64) @ torch.ones(64, 64)
with on_loader_cpus():
    print(json.dumps(in_thread(mask)))
"""
    assert child(code, OMP_PROC_BIND="close", OMP_PLACES="threads") == MINE


def test_a_rank_is_told_its_loader_cpus_and_where_its_plan_comes_from():
    here = read_topology()
    plan: Plan = crowded_plan(here, 2, {})
    found = rank_environment(plan, rank((0, 1, 2), loader=(5, 6, 9)), "plan by rule")
    assert found["KNL_LOADER_CPUS"] == "5-6,9"
    assert found["KNL_PLAN"] == "; ".join(["plan by rule", *plan.warnings])
    assert {name: found[name] for name in plan.env} == {n: s.value for n, s in plan.env.items()}
    assert rank_environment(plan, rank((0, 1, 2)), "x")["KNL_LOADER_CPUS"] == "0-2"


def slurm(kind, masks):
    return {"SLURM_STEP_ID": "0", "SLURM_CPU_BIND_TYPE": kind, "SLURM_CPU_BIND_LIST": masks}


@pytest.mark.parametrize(
    ("environment", "apart"),
    [
        (slurm("mask_cpu:", "0x3,0xC,0x30,0xC0"), True),
        (slurm("map_cpu:", "0,1,2,3"), True),
        (slurm("mask_cpu:", "0xFF,0xFF,0xFF,0xFF"), False),  # all may use all of the job's
        (slurm("mask_cpu:", "0xFF"), False),
        (slurm("none", ""), False),
        (slurm("quiet,rank", ""), False),
        ({"SLURM_STEP_ID": "0"}, False),
    ],
)
def test_slurm_s_binding_counts_where_its_masks_differ(environment, apart):
    assert cpus_from_launcher(FOUR, environment) == (frozenset(MINE), apart)


def test_a_world_of_one_has_what_it_has():
    environment = slurm("mask_cpu:", "0x1,0x2")
    assert cpus_from_launcher(SINGLE, environment) == (frozenset(MINE), False)


LAUNCHED = """
import subprocess
code = '''
import json, os
from knl.bind import cpus_from_launcher
from knl.comm.world import World
found, apart = cpus_from_launcher(World(1, 2, 1, 2, "mpi"), os.environ)
print(json.dumps([sorted(found), apart]))
'''
pin = (lambda: os.sched_setaffinity(0, mine[:1])) if "PINNED" in os.environ else None
print(subprocess.check_output([sys.executable, "-c", code], preexec_fn=pin).decode())
"""


@pytest.mark.skipif(len(MINE) < 2, reason="one CPU cannot be divided")
def test_a_rank_with_less_than_its_launcher_has_been_given_that():
    assert child(LAUNCHED, PINNED="1") == [MINE[:1], True]
    assert child(LAUNCHED) == [MINE, False]


@pytest.mark.skipif(len(MINE) < 2, reason="one CPU cannot be divided")
def test_intel_s_own_pinning_is_replaced_but_not_where_the_user_asked_for_it():
    info = {"PINNED": "1", "I_MPI_PIN_INFO": "x"}
    assert child(LAUNCHED, **info) == [MINE, False]
    assert child(LAUNCHED, **info, I_MPI_PIN_DOMAIN="core") == [MINE[:1], True]


@pytest.mark.skipif(not Path("/usr/bin/taskset").exists(), reason="no taskset")
def test_the_command_plans_within_the_mask_that_it_was_started_with():
    command = [sys.executable, "-m", "knl", "plan", "--json"]
    done = subprocess.run(
        ["taskset", "-c", str(MINE[-1]), *command], capture_output=True, text=True, timeout=60
    )
    found = json.loads(done.stdout)
    assert [rank["compute_cpus"] for rank in found["ranks"]] == [MINE[-1:]]
    assert found["spare_cpus"] == []
