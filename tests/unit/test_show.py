"""The drawing of a plan, recounted; and `knl env` read back by a shell."""

from __future__ import annotations

import json
import os
import re
import shlex
import struct
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knl.choices import Choices
from knl.errors import InputError
from knl.plan import make_plan, plan_by_rule
from knl.profile import SCHEMA, Profile, fingerprint, save_profile
from knl.show import cells, picture, text
from knl.sysfs import read_topology

from ..topology.trees import TREES
from .nodes import nodes, read

ROW = re.compile(r"rank (\d+) +([CWLSx.]+)$")
LEGEND = {"C": "C compute", "W": "W comm worker", "L": "L loader", "S": "S spare",
          "x": "x not allowed", ".": ". another rank"}  # fmt: skip


def knl(*arguments, **environment):
    command = [sys.executable, "-m", "knl", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def rows_of(drawing):
    """Each rank's letters, put together from the blocks of a wide node."""
    found = {}
    for line in drawing.splitlines():
        if row := ROW.match(line):
            found[int(row[1])] = found.get(int(row[1]), "") + row[2]
    return found


def letter_of(core, rank, node, plan):
    """What a core is to a rank, from the plan's own words."""
    mine = set(core.cpus)
    for letter, cpus in zip("CWL", (rank.compute_cpus, rank.comm_cpus, rank.loader_cpus)):
        if mine & set(cpus):
            return letter
    mine &= set(node.allowed_cpus)
    if not mine:
        return "x"
    return "S" if mine <= set(plan.spare_cpus) else "."


@settings(max_examples=120, deadline=None)
@given(
    nodes(),
    st.integers(1, 9) | st.integers(1, 128),
    st.integers(1, 2),
    st.none() | st.integers(0, 99),
)
def test_a_drawing_fits_a_terminal_and_its_letters_are_the_plan_s(node, ranks, threads, workers):
    try:
        choices = Choices(ranks_per_node=ranks, threads_per_core=threads, comm_workers=workers)
        plan = make_plan(node, choices, {}, "rule")
    except InputError:
        return
    drawing = text(node, plan, color=False)
    assert max(map(len, drawing.splitlines())) <= 80
    expected = {
        rank.local_rank: "".join(letter_of(core, rank, node, plan) for core in node.cores)
        for rank in plan.ranks
    }
    assert rows_of(drawing) == expected
    assert list(expected.values()) == cells(node, plan)
    (legend,) = [line for line in drawing.splitlines() if line.startswith("C compute")]
    used = set("".join(expected.values()))
    assert legend.split(", ") == [words for letter, words in LEGEND.items() if letter in used]
    memory = [line for line in drawing.splitlines() if line.startswith("memory node ")]
    assert len(memory) == len(node.memory_nodes)


def test_a_drawing_of_four_clusters_reads_like_this():
    node = read("snc4-flat")
    lines = text(node, plan_by_rule(node, 4, {}), color=False).splitlines()
    dots = "." * 16
    assert lines[1:5] == [
        f"rank 0    SW{'C' * 16}S{'.' * 17}{dots}{dots}",
        f"rank 1    S{'.' * 17}SW{'C' * 16}{dots}{dots}",
        f"rank 2    S{'.' * 17}S{'.' * 17}{'C' * 16}{dots}",
        f"rank 3    S{'.' * 17}S{'.' * 17}{dots}{'C' * 16}",
    ]
    assert "memory node 5: mcdram, 4 GiB, preferred by rank 0" in lines


def test_the_ruler_names_the_first_cpu_of_each_block_and_tens_of_every_tenth():
    node = read("epyc-nps4")
    rulers = [line for line in text(node, plan_by_rule(node, 1, {}), color=False).splitlines()
              if line.startswith("CPU ")]  # fmt: skip
    assert [ruler.split()[:2] for ruler in rulers] == [["CPU", "0"], ["CPU", "70"]]
    assert rulers[0][10:] == "0         1         2         3         4         5         6"


def test_colours_change_nothing_but_the_colour():
    node = read("half-cpuset")
    plan = plan_by_rule(node, 2, {})
    colored = text(node, plan, color=True)
    assert "\033[32mC\033[0m" in colored
    assert re.sub(r"\033\[\d+m", "", colored) == text(node, plan, color=False)


@pytest.mark.parametrize(("name", "ranks"), [("vm", 1), ("epyc-nps4", 8), ("snc4-flat", 64)])
def test_a_picture_is_a_png_of_a_size_to_look_at(name, ranks, tmp_path):
    node, path = read(name), tmp_path / "a picture.png"
    picture(node, plan_by_rule(node, min(ranks, len(node.cores)), {}), path)
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:])
    assert 300 <= width <= 4000 and 150 <= height <= 5000


def test_a_picture_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    node = read("vm")
    for path in (tmp_path / "none" / "x.png", tmp_path):
        with pytest.raises(InputError, match=r"--png .*: cannot be written: ") as refusal:
            picture(node, plan_by_rule(node, 1, {}), path)
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_command_draws_another_node_in_letters_and_as_a_picture(tmp_path):
    root = TREES["snc4-flat"][0].write(tmp_path / "root")
    arguments = ["show", "--fsroot", str(root), "--ranks-per-node", "2"]
    done = knl(*arguments, "--png", str(tmp_path / "x.png"), KNL_PROFILES=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plan by rule")
    assert set(rows_of(done.stdout)) == {0, 1}
    assert "\033" not in done.stdout
    assert "leave" in done.stderr and "cores idle" in done.stderr
    assert (tmp_path / "x.png").stat().st_size > 1000
    done = knl(*arguments, "--png", "/proc/x.png", KNL_PROFILES=str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_shell_reads_the_environment_back_as_the_plan_has_it(tmp_path):
    """Quotes, spaces, brackets and dollars of values and of the profile's name are the shell's to
    see, not to act on."""
    node = read_topology()
    choices = Choices(ranks_per_node=1, allocator="jemalloc", hugepages=True, comm_workers=1)
    mine = {"OMP_PLACES": "{0:2}, 'a' $HOME `date` \"b\" \\", "FI_PROVIDER": "a\nb # c",
            "LD_PRELOAD": ""}  # fmt: skip
    plan = make_plan(node, choices, mine, "profile")
    path = tmp_path / "my $(exit 3) 'p'.json"
    save_profile(
        Profile(SCHEMA, "2026-11-23", "digits", "convnet", 8, 8, fingerprint(node), plan), path
    )
    done = knl("env", str(path), **mine)
    assert done.returncode == 0, done.stderr
    expected = {name: s.value for name, s in plan.env.items() if name != "LD_PRELOAD"}
    assert {"MALLOC_CONF", "I_MPI_PIN_DOMAIN", "CCL_WORKER_AFFINITY"} <= set(expected)
    printer = "import json, os, sys; json.dump(dict(os.environ), sys.stdout)"
    script = f'set -eu; eval "$1"; unset LD_PRELOAD; exec {shlex.quote(sys.executable)} -c "$2"'
    shell = subprocess.run(
        ["sh", "-c", script, "sh", done.stdout, printer],
        capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert (shell.returncode, shell.stderr) == (0, "")
    seen = json.loads(shell.stdout)
    assert {name: seen.get(name) for name in expected} == expected
    assert "FI_PROVIDER=a\nb # c: set by you" in done.stderr
    assert done.stdout.startswith("# plan of profile ")
    for line in ("# user: set by you; the profile would be", "# profile: "):
        assert line in done.stdout
