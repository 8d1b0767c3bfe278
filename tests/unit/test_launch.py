"""Which MPI is found among several or none, and what a rank's environment gets from it."""

from __future__ import annotations

import sys

import pytest

from knl.errors import InputError
from knl.launch import find_mpi, mpi_environment


def make(root, *files):
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        path.chmod(0o755)
    return root


# As the wheels of impi-rt lay them out.
OLD = ("bin/mpiexec.hydra", "lib/libmpi.so.12", "lib/libfabric/libfabric.so.1",
       "lib/libfabric/prov/libtcp-fi.so")  # fmt: skip
NEW = ("bin/mpiexec.hydra", "lib/libmpi.so.12", "lib/libfabric.so.1", "lib/libtcp-fi.so")


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A Python environment without MPI."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "python"))
    return tmp_path


def test_a_site_s_mpi_wins_over_pip_s_and_pip_s_over_the_path_s(bare):
    path = make(bare / "usr", "bin/mpiexec") / "bin"
    environment = {"PATH": str(path)}
    assert find_mpi(environment).mpiexec == path / "mpiexec"
    assert find_mpi(environment).kind == "other"
    pip = make(bare / "python", *NEW)
    assert find_mpi(environment).root == pip
    site = make(bare / "site", *OLD)
    assert find_mpi({**environment, "I_MPI_ROOT": str(site)}).root == site


def test_no_mpi_is_told_with_the_cure(bare):
    with pytest.raises(InputError, match=r"no MPI: .*pip install '\.\[modern\]'.*module"):
        find_mpi({"PATH": str(bare)})
    assert mpi_environment({"PATH": str(bare)}) == {}


@pytest.mark.parametrize(
    ("layout", "folders", "providers"),
    [(OLD, ["lib", "lib/libfabric"], "lib/libfabric/prov"), (NEW, ["lib"], "lib")],
    ids=["2021.8", "2021.16"],
)
def test_ranks_get_what_intel_s_scripts_would_have_set(bare, layout, folders, providers):
    root = make(bare / "python", *layout)
    environment = mpi_environment({"LD_LIBRARY_PATH": "/mine"})
    assert environment["I_MPI_ROOT"] == str(root)
    assert environment["FI_PROVIDER_PATH"] == str(root / providers)
    assert environment["LD_LIBRARY_PATH"].split(":") == [*(str(root / f) for f in folders), "/mine"]
    assert mpi_environment({**environment}) == {}


def test_what_the_user_set_is_left_alone(bare):
    make(bare / "python", *NEW)
    mine = {"FI_PROVIDER_PATH": "/mine", "CCL_LOG_LEVEL": "info", "CCL_ATL_TRANSPORT": "ofi"}
    assert not set(mine) & set(mpi_environment(mine))
