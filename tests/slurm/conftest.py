"""The real Slurm that the tests in this folder share."""

from __future__ import annotations

import ctypes.util
import os
import shutil
from collections.abc import Iterator

import pytest

from .cluster import SlurmCluster, slurm_cluster

_NODES = 8
_PROGRAMS = {  # program: the Debian package that has it
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
}


def missing_parts() -> list[str]:
    """Return what this machine lacks to start a Slurm, each part in a few words."""
    packages = [package for name, package in _PROGRAMS.items() if shutil.which(name) is None]
    if ctypes.util.find_library("pmi2") is None:
        packages.append("libpmi2-0")
    parts = [f"Debian package {package}" for package in packages]
    return parts if os.geteuid() == 0 else ["root rights", *parts]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Eight idle nodes, c1 to c8, for the whole session."""
    missing = missing_parts()
    if missing:
        pytest.skip(f"no real Slurm: this machine lacks {', '.join(missing)}")
    with slurm_cluster(_NODES, tmp_path_factory.mktemp("cluster")) as running:
        yield running
