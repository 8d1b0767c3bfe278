"""environment.yml and pyproject.toml pin the same knl stack."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def test_the_conda_environment_pins_the_knl_stack_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stack = project["optional-dependencies"]["knl"]
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    pinned = [m[1] for line in lines if (m := re.match(r"\s*- (\S+==\S+)", line))]
    assert sorted(pinned) == sorted(stack)
    assert all("==" in requirement for requirement in stack)


@pytest.mark.parametrize("stack", ["knl", "modern"])
def test_every_version_of_a_stack_is_exact(stack):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in project["optional-dependencies"][stack]:
        assert re.fullmatch(r"[\w-]+==[\d.]+", requirement)
