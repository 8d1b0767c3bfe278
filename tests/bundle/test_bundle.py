"""`knl bundle` of the environment that runs the tests: made once, unpacked elsewhere, and run there
with that environment out of reach."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from knl import __version__

pytestmark = pytest.mark.slow
SOURCE = Path(__file__).resolve().parents[2]
BARE = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "LC_ALL": "C.UTF-8"}


@dataclass(frozen=True)
class Made:
    """What the command told, the archive, the names in it, the folder it was unpacked to."""

    told: dict[str, Any]
    archive: Path
    names: list[str]
    root: Path


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    archive = folder / "env.tar.gz"
    done = subprocess.run(
        [sys.executable, "-m", "knl", "bundle", "--json", "--out", str(archive)],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    unpack = ["tar", "-xzvf", str(archive), "-C", str(folder)]
    names = subprocess.run(unpack, capture_output=True, text=True, check=True, timeout=120).stdout
    yield Made(json.loads(done.stdout), archive, names.splitlines(), folder / "knl-env")
    shutil.rmtree(folder)


def elsewhere(made, *command):
    """Run a command of the bundle on a machine that has neither the environment that was packed nor
    its interpreter nor knl's source."""
    if os.geteuid() != 0:
        pytest.skip("hiding folders from one process needs root rights")
    hidden = {Path(sys.prefix), Path(sys.base_prefix), SOURCE} - {Path("/usr"), Path("/usr/local")}
    mounts = [f"mount -t tmpfs hidden {shlex.quote(str(path))}" for path in sorted(hidden)]
    run = shlex.join([str(made.root / command[0]), *command[1:]])
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", " && ".join(["cd /", *mounts[::-1], f"exec {run}"])],
        env={**BARE, "TMPDIR": str(made.root.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(root):
    return [path for path in root.rglob("*") if path.is_symlink() or path.is_file()]


def test_it_trains_where_the_environment_is_out_of_reach(made):
    before = len(list(made.root.rglob("*.pyc")))
    run_dir = made.root.parent / "run"
    train = ("train", "digits", "-n", "2", "--set", "train.steps=2", "--json")
    told = elsewhere(made, "bin/python", "-m", "knl", *train, "--run-dir", str(run_dir))
    result = json.loads(told)
    assert (result["ranks"], result["steps"]) == (2, 2)
    assert result["provider"] == made.told["provider"] == "oneccl"
    # Hundreds of slow cores have no modules to compile: the byte code that came is taken.
    new = len(list(made.root.rglob("*.pyc"))) - before
    assert new == 0


def test_its_scripts_start_the_python_beside_them(made):
    assert elsewhere(made, "bin/knl", "--version").strip() == f"knl {__version__}"
    where = "import sys, site; print(sys.prefix, site.ENABLE_USER_SITE)"
    assert elsewhere(made, "bin/python", "-c", where).split() == [str(made.root), "False"]


def test_what_it_tells_is_what_there_is(made):
    found = files(made.root)
    assert made.told["path"] == str(made.archive)
    assert made.told["bytes"] == made.archive.stat().st_size
    assert made.told["outside"] == []
    assert made.told["unpacked_bytes"] >= sum(
        path.stat().st_size for path in found if not path.is_symlink() and "/run/" not in str(path)
    )
    assert len(made.names) == made.told["files"]
    assert {name.partition("/")[0] for name in made.names} == {"knl-env"}
    assert made.names == sorted(made.names, key=lambda name: name.split("/"))


def test_nothing_in_it_leads_out_of_it(made):
    for path in files(made.root):
        if path.is_symlink():
            assert not path.readlink().is_absolute() and path.exists(), path
    for script in (made.root / "bin").iterdir():
        if script.is_file():
            first = script.read_bytes()[:200].split(b"\n")[0]
            assert sys.prefix.encode() not in first and sys.base_prefix.encode() not in first


def test_what_a_job_never_opens_is_left_out(made):
    names = {str(path.relative_to(made.root)) for path in files(made.root)}
    packages = {name.split("/")[3] for name in names if "/site-packages/" in name}
    assert not packages & {"mypy", "pytest", "_pytest", "pip", "hypothesis"}
    assert {"torch", "knl", "numpy", "mpi4py", "msgspec"} <= packages
    assert not [name for name in names if name.endswith((".a", ".opt-2.pyc", ".pth.bak"))]
    assert not [name for name in names if name.startswith("include/") and "/python" not in name]
    assert set(made.told["left_out"]) >= {"tests", "development tools", "headers"}


def test_a_name_that_is_no_archive_s_is_refused(tmp_path):
    for out, words in (
        ("env.zip", "let its name end in that"),
        ("no/env.tar.gz", "there is no folder no"),
        (".", "is a folder; name a file in it"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "knl", "bundle", "--out", out],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
        )
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert words in line
