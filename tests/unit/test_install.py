"""What `make demo` says on a machine that lacks something, before it installs anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OTHER_STACK = "modern" if sys.version_info < (3, 10) else "knl"
OWN_STACK = "knl" if sys.version_info < (3, 10) else "modern"


def install(venv, stack, **environment):
    command = [sys.executable, str(ROOT / "tools" / "install.py"), "--venv", str(venv)]
    return subprocess.run(
        [*command, "--stack", stack],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("stack", "environment", "words"),
    [
        ("neither", {}, ["STACK=neither", "knl or modern"]),
        (OTHER_STACK, {}, [f"the {OTHER_STACK} stack needs Python", f"STACK={OTHER_STACK}"]),
        (OWN_STACK, {"CXX": "no-such-g++"}, ["no C++ compiler (no-such-g++)", "apt install g++"]),
    ],
)
def test_what_is_missing_is_one_line_with_the_cure(stack, environment, words, tmp_path):
    done = install(tmp_path / "venv", stack, **environment)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "venv").exists()


def test_too_little_room_is_told_before_anything_is_written(tmp_path):
    full = tmp_path / "small disk"
    full.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root rights")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "knl-test", str(full)], check=True)
    try:
        done = install(full / "venv", OWN_STACK)
        assert "0.0 GB free" in done.stderr
        assert done.returncode == 1
        assert not any((full / "venv").iterdir())
    finally:
        subprocess.run(["umount", str(full)], check=True)


@pytest.mark.parametrize("python", ["no-such-python", "python3.6"])
def test_make_refuses_what_is_no_recent_python(python, tmp_path):
    if shutil.which(python) is None:
        python = "no-such-python"
    done = subprocess.run(
        ["make", "-C", str(ROOT), "demo", f"PYTHON={python}", f"VENV={tmp_path}/venv"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert f"{python} is not Python 3.9 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()
