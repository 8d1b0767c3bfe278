"""The module files under a real Lmod, Lua and Tcl: they load, unload, swap, conflict, are found."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from knl import __version__

ROOT = Path(__file__).resolve().parents[2]
LMOD = Path("/usr/share/lmod/lmod/init/bash")
TREES = ("modulefiles", "modulefiles-tcl")
# What a login shell has, and nothing of this process's.
CLEAN = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/nonexistent", "LC_ALL": "C.UTF-8"}
# Lmod's own books, and what a shell counts.
BOOKS = re.compile(r"_ModuleTable|__LMOD_REF_COUNT|LMOD_|_LMFILES_|LOADEDMODULES|_=|SHLVL=|PWD=")


def tool():
    """tools/module.py, which lies in no package."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        spec = importlib.util.spec_from_file_location("module", ROOT / "tools" / "module.py")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules["module"] = loaded
        spec.loader.exec_module(loaded)
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return loaded


MODULE = tool()


def shell(prefix, tree, script, **environment):
    """The lines that a script writes between marks, in a shell with Lmod and a tree of modules."""
    if not LMOD.exists():
        pytest.skip("no Lmod: this machine lacks Debian package lmod")
    full = f"source {LMOD}\nmodule use {prefix}/{tree} {prefix}/site\n{script}"
    done = subprocess.run(
        ["bash", "--norc", "-c", full],
        env={**CLEAN, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Two versions of knl, the first with an MPI of the site; both point to the environment that
    runs the tests."""
    folder = tmp_path_factory.mktemp("site")
    home = Path(sys.prefix)
    MODULE.write_modules(folder, MODULE.Module("1.0", "modern", home, mpi="sitempi/3"))
    MODULE.write_modules(folder, MODULE.Module("2.0", "modern", home))
    (folder / "site" / "sitempi").mkdir(parents=True)
    (folder / "site" / "sitempi" / "3.lua").write_text('setenv("SITE_MPI", "3")\n')
    (folder / "site" / "other").mkdir()
    (folder / "site" / "other" / "1.lua").write_text('family("knl")\nsetenv("OTHER", "1")\n')
    return folder


def variables(text, mark):
    """What `env` wrote between two marks."""
    inside = text.split(f"<{mark}>\n")[1].split(f"</{mark}>\n")[0]
    return sorted(line for line in inside.splitlines() if not BOOKS.match(line))


@pytest.mark.one_stack
@pytest.mark.parametrize("threads", [None, "7"])
@pytest.mark.parametrize("tree", TREES)
def test_unloading_restores_the_environment_to_the_byte(prefix, tree, threads):
    script = """
    echo "<before>"; env; echo "</before>"
    module load knl/1.0
    echo "<loaded>"; env; echo "</loaded>"
    module unload knl
    echo "<after>"; env; echo "</after>"
    module load knl; module swap knl/2.0 knl/1.0; module swap knl knl/2.0; module unload knl
    echo "<swapped>"; env; echo "</swapped>"
    """
    own = {"OMP_NUM_THREADS": threads} if threads else {}
    said = shell(prefix, tree, script, **own)
    loaded = variables(said, "loaded")
    assert {f"OMP_NUM_THREADS={threads or 1}", f"KNL_HOME={sys.prefix}", "SITE_MPI=3"} <= {*loaded}
    assert f"PATH={sys.prefix}/bin:{CLEAN['PATH']}" in loaded
    before = variables(said, "before")
    assert variables(said, "after") == before
    assert variables(said, "swapped") == before


@pytest.mark.parametrize("tree", TREES)
def test_one_version_at_a_time_and_one_of_a_family(prefix, tree):
    script = """
    module load knl/1.0; module load knl/2.0; echo "<one>"; module -t list 2>&1; echo "</one>"
    module load other; echo "<family>"; module -t list 2>&1; echo "</family>"
    """
    said = shell(prefix, tree, script)
    assert variables(said, "one") == ["knl/2.0"]
    assert variables(said, "family") == ["other/1"]
    strict = {"LMOD_DISABLE_SAME_NAME_AUTOSWAP": "yes"}  # as some sites have it
    said = shell(prefix, tree, "module load knl/2.0; module load knl/1.0; module -t list", **strict)
    assert "Lmod has detected the following error" in said
    assert re.search(r"^knl/2.0$", said, re.M) and not re.search(r"^knl/1.0$", said, re.M)


@pytest.mark.parametrize("tree", TREES)
def test_it_is_found_and_says_what_it_is(prefix, tree):
    said = shell(prefix, tree, "module spider knl; module help knl/2.0; module whatis knl/2.0")
    assert re.search(r"Versions:\n\s+knl/1.0\n\s+knl/2.0", said)
    assert "knl train digits -n 2" in said
    assert [
        line.split(": ", 1)[1].split(":")[0]
        for line in said.splitlines()
        if line.startswith("knl/2.0 ")
    ] == ["Name", "Version", "Category", "Description", "URL"]


@pytest.mark.parametrize("tree", TREES)
def test_a_hidden_version_is_the_default_and_not_shown(tmp_path, tree):
    home = Path(sys.prefix)
    for version, hidden in (("1.0", True), ("2.0", True), ("3.0", False)):
        MODULE.write_modules(tmp_path, MODULE.Module(version, "knl", home, hidden=hidden))
    script = """
    echo "<avail>"; module -t avail knl 2>&1; echo "</avail>"
    module load knl; echo "<list>"; module -t list 2>&1; echo "</list>"
    """
    said = shell(tmp_path, tree, script)
    assert variables(said, "avail") == [f"{tmp_path}/{tree}:", "knl/3.0"]
    assert variables(said, "list") == ["knl/2.0"]
    MODULE.write_modules(tmp_path, MODULE.Module("2.0", "knl", home))
    said = shell(tmp_path, tree, script)
    assert "knl/2.0" in variables(said, "avail")


def test_threads_of_the_module_are_for_other_programs(prefix):
    """knl counts the cores of its plan; what the user set is the user's."""
    script = "module load knl; knl plan --json --ranks-per-node 1; echo; export OMP_NUM_THREADS=1; "
    script += "unset KNL_MODULE_OMP_NUM_THREADS; knl plan --json --ranks-per-node 1"
    lines = shell(prefix, "modulefiles", script, **{"KNL_PROFILES": "/nonexistent"}).splitlines()
    sources = [re.search(r'"OMP_NUM_THREADS": \{"value": "(\d+)", "source": "(\w+)"', line)
               for line in lines if line.startswith("{")]  # fmt: skip
    assert sources[0].groups()[1] == "rule"
    if len(os.sched_getaffinity(0)) > 1:
        assert int(sources[0].group(1)) > 1
        assert sources[1].groups() == ("1", "user")


def make_module(tmp_path, *arguments):
    return subprocess.run(
        ["make", "-s", "-C", str(ROOT), "module", f"PYTHON={sys.executable}", *arguments],
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "say where to install"),
        (("PREFIX=/tmp/with a blank",), "' ' in a path cannot be written into every module file"),
        (("PREFIX=/proc/knl",), "/proc/knl/knl/"),
        (("PREFIX=/nonexistent", "MPI=two words"), "MPI=two words: must be the name of one module"),
    ],
)
def test_what_cannot_be_installed_is_refused_in_one_line(tmp_path, arguments, words):
    done = make_module(tmp_path, *arguments)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1 and words in lines[0], done.stderr


def test_what_make_module_installs_needs_the_source_no_more(tmp_path):
    # Torch and the others are lent by the environment that runs the tests; pip finds them there.
    home = tmp_path / "p" / "knl" / __version__
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, timeout=60)
    (home / "stack").write_text("knl\n" if sys.version_info < (3, 10) else "modern\n")
    (packages,) = home.glob("lib/python*/site-packages")
    lender = Path(sys.prefix, *packages.relative_to(home).parts)
    (packages / "zz.pth").write_text(f"import sys; sys.path.append({str(lender)!r})\n")
    done = make_module(tmp_path, f"PREFIX={tmp_path}/p", "HIDDEN=1")
    if re.search(r"(?i)connection|could not find a version", done.stderr):
        pytest.skip(f"no package index to build from: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    assert (packages / "knl" / "native" / "libknl_kernels.so").exists()
    assert (packages / "knl" / "recipes" / "digits.toml").exists()
    assert (packages / "knl" / "slurm" / "jobs" / "train.sbatch").exists()
    script = (
        "module load knl && knl train digits --set train.steps=1 --profile none --run-dir r && "
    )
    script += "python -c 'import knl; print(knl.__file__)'"
    said = shell(tmp_path / "p", "modulefiles", f"cd {tmp_path}; {script}")
    assert f"{packages}/knl/__init__.py" in said, said
    again = make_module(tmp_path, f"PREFIX={tmp_path}/p", "STACK=neither")
    assert again.returncode == 2 and "STACK=neither" in again.stderr
