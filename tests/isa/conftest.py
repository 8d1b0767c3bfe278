"""What the tests in this folder share: the parts of a pretended KNL, built once a session."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ..conftest import HARDWARE
from . import pretend


@pytest.fixture(scope="session")
def as_knl(tmp_path_factory) -> pretend.Knl:
    """oneDNN that sees a Xeon Phi 7250."""
    return pretend.build(tmp_path_factory.mktemp("knl"))


@pytest.fixture
def avx512f() -> None:
    """Skips where a KNL's kernels can be chosen, and cannot run."""
    flags = re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if flags is None or "avx512f" not in flags[1].split():
        pytest.skip(HARDWARE)
