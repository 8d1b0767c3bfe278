"""Trees are thousands of small files: each is written once a session and only read."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from .trees import TREES

# Where there is memory to write to: a disk takes seconds for a tree.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture(scope="session")
def root_of():
    """The root of a tree of TREES, by its name."""
    with TemporaryDirectory(dir=MEMORY) as folder:

        def root(name):
            path = Path(folder) / name
            return path if path.exists() else TREES[name][0].write(path)

        yield root
