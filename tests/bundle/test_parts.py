"""The parts of `knl bundle`: what stays out, the archive's bytes, and bundles that do not work."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knl import bundle
from knl.bundle import archive, contents
from knl.bundle.archive import write_archive
from knl.bundle.contents import Entry
from knl.bundle.environment import Environment, environment_here
from knl.bundle.leave_out import reason
from knl.bundle.try_out import _elsewhere, try_out
from knl.errors import FailedError, InputError

PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"
TAG = sys.implementation.cache_tag
SITE = f"lib/{PYTHON}/site-packages"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (f"{SITE}/torch/nn/modules.py", ""),
        (f"{SITE}/torch/nn/__pycache__/a.{TAG}.pyc", ""),
        (f"{SITE}/torch/nn/__pycache__/a.{TAG}.opt-1.pyc", "byte code of others"),
        (f"{SITE}/torch/nn/__pycache__/a.cpython-27.pyc", "byte code of others"),
        (f"{SITE}/numpy/testing/utils.py", ""),
        (f"{SITE}/numpy/core/tests/test_a.py", "tests"),
        (f"{SITE}/torch/bin/test_jit", "tests"),
        (f"{SITE}/torch/bin/torch_shm_manager", ""),
        (f"lib/{PYTHON}/test/test_os.py", "tests"),
        (f"lib/{PYTHON}/ensurepip/x.whl", "tests"),
        (f"lib/{PYTHON}/os.py", ""),
        (f"{SITE}/pyarrow/include/arrow/api.h", "headers"),
        (f"{SITE}/torch/include/ATen/ATen.h", "headers"),
        ("lib/libiomp5.a", "static libraries, debug symbols"),
        ("lib/libomptarget.so", "GPU libraries"),
        (f"{SITE}/nvidia/cudnn/lib/libcudnn.so.9", "GPU libraries"),
        (f"{SITE}/torch/lib/libtorch_cuda.so", "GPU libraries"),
        ("lib/libdnnl.so.2", ""),
        ("lib/libdnnl.so", "copies of a library under other names"),
        ("lib/libdnnl.so.2.5", "copies of a library under other names"),
        ("lib/libmpi.so.12", ""),
        ("bin/mpiexec.hydra", ""),
        ("etc/tuning_knl_shm.dat", ""),
        ("share/man/man1/mpiexec.1", "documentation"),
    ],
)
def test_what_stays_out(name, why):
    assert reason(PurePosixPath(name), compiles=False, loaded=False) == why


def test_what_a_job_loads_or_compiles_with_goes_in():
    cuda = PurePosixPath(SITE, "torch/lib/libtorch_cuda.so")  # linked in torch's CUDA builds
    assert reason(cuda, compiles=False, loaded=True) == ""
    for name in (f"{SITE}/torch/include/ATen/ATen.h", f"include/{PYTHON}/Python.h"):
        assert reason(PurePosixPath(name), compiles=True, loaded=False) == ""


@given(st.lists(st.binary(max_size=300), max_size=40), st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_blocks_compressed_apart_are_one_file(monkeypatch_block, parts, block):
    monkeypatch_block(block)
    results = []
    for _ in range(2):
        file = io.BytesIO()
        with ThreadPoolExecutor(2) as threads:
            packed = archive._Gzip(file, threads)
            for part in parts:
                packed.write(part)
            packed.finish()
        assert packed.tell() == len(b"".join(parts))
        results.append(file.getvalue())
    assert gzip.decompress(results[0]) == b"".join(parts)
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def monkeypatch_block():
    before = archive._BLOCK
    yield lambda size: setattr(archive, "_BLOCK", size)
    archive._BLOCK = before


def archived(tmp_path, name, entries):
    path = tmp_path / name
    with path.open("wb") as file:
        write_archive(file, entries, lambda _: None)
    return path


def entry(name, source, mode=0o644, mtime=5):
    return Entry(PurePosixPath(name), source, source.stat().st_size, mode, mtime)


def test_an_archive_is_the_same_later_and_elsewhere(tmp_path):
    (tmp_path / "a").write_text("one")
    long = "/".join(["a-long-name-of-a-folder"] * 8)
    for name in ("first", "second"):
        source = tmp_path / name
        source.write_text("two")
        entries = [entry("bin/a", tmp_path / "a", 0o755), entry(f"{long}/b", source)]
        entries.append(Entry(PurePosixPath("bin/c"), link="a"))
        archived(tmp_path, f"{name}.tar.gz", entries)
        time.sleep(1.1 if name == "first" else 0)
    first, second = tmp_path / "first.tar.gz", tmp_path / "second.tar.gz"
    assert first.read_bytes() == second.read_bytes()
    subprocess.run(["tar", "-xzf", str(first), "-C", str(tmp_path)], check=True)
    root = tmp_path / "knl-env"
    assert (root / "bin" / "a").stat().st_mode & 0o777 == 0o755
    assert (root / "bin" / "c").read_text() == "one"
    assert (root / long / "b").read_text() == "two"
    assert (root / long / "b").stat().st_mtime == 5


def test_copies_of_a_library_become_links(tmp_path):
    for name, text in (("libx.so", "x"), ("libx.so.1", "x"), ("liby.so", "y"), ("doc", "x")):
        (tmp_path / name).write_text(text * (64 << 10))
    names = sorted(path.name for path in tmp_path.iterdir())
    linked = contents._links_for_copies([entry(f"lib/{n}", tmp_path / n) for n in names])
    assert {str(e.name): e.link for e in linked if e.link} == {"lib/libx.so.1": "libx.so"}
    assert sum(e.size for e in linked) == 3 * (64 << 10)


def test_a_script_finds_the_python_beside_it(tmp_path):
    place = tmp_path / "a place"
    place.mkdir()
    script = tmp_path / "hello"
    script.write_text(f"#!{sys.prefix}/bin/{PYTHON}\n# -*- coding: utf-8 -*-\nimport sys\n"
                      "print(sys.executable, sys.argv[1:])\n")  # fmt: skip
    moved = contents._restarted(script, place)
    moved = moved.rename(place / "hello")
    (place / "python").symlink_to(sys.executable)
    (tmp_path / "link").symlink_to(moved)
    done = subprocess.run([str(tmp_path / "link"), "an argument"], capture_output=True, text=True)
    assert done.stdout.strip() == f"{place}/python ['an argument']", done
    shell = tmp_path / "shell"
    shell.write_text("#!/bin/sh\necho python\n")
    assert contents._restarted(shell, place) == shell


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return Environment(
        prefix=Path(sys.prefix),
        base=Path(sys.base_prefix),
        executable=Path(sys.executable).resolve(),
        stdlib=Path("lib", PYTHON),
        headers=Path("include", PYTHON),
        libraries=frozenset(),
        packages=Path(sys.prefix, SITE),
        packages_to=Path(SITE),
        loaded=frozenset(),
    )


def test_knl_s_own_byte_code_is_the_same_each_time(environment, tmp_path):
    kept = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        own = contents._own_package(environment, tmp_path / name)
        kept.append({str(path): source.read_bytes() for path, source in own.items()})
    assert kept[0] == kept[1]
    assert f"{SITE}/knl/recipes/digits.toml" in kept[0]
    assert f"{SITE}/knl/slurm/jobs/train.sbatch" in kept[0]
    assert f"{SITE}/knl/native/libknl_kernels.so" in kept[0]
    assert f"{SITE}/knl/__pycache__/cli.{TAG}.pyc" in kept[0]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'knl: it broke' >&2; exit 1", "does not run, so it was not written: knl: it broke"),
        (
            'echo \'{"ranks": 2, "provider": "x", "files": ["PREFIX/lib/libmpi.so.12"]}\'',
            "still loads PREFIX/lib/libmpi.so.12",
        ),
        (
            'echo \'{"ranks": 2, "provider": "x", "files": ["/elsewhere/module.py"]}\'',
            "still loads /elsewhere/module.py",
        ),
    ],
)
def test_a_bundle_that_does_not_stand_alone_is_told(environment, tmp_path, script, words):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n" + script.replace("PREFIX", sys.prefix))
    packed = archived(tmp_path, "b.tar.gz", [entry("bin/python", python, 0o755)])
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(FailedError) as told:
        try_out(packed, place, environment, {"PATH": "/usr/bin:/bin"})
    assert words.replace("PREFIX", sys.prefix) in str(told.value)


def test_libraries_of_the_site_are_told_of(environment, tmp_path):
    python = tmp_path / "python"
    report = '{"ranks": 1, "provider": "x", "files": ["/opt/gcc/libstdc++.so.6", "/lib/libc.so.6"]}'
    python.write_text(f"#!/bin/sh\necho '{report}'\n")
    packed = archived(tmp_path, "b.tar.gz", [entry("bin/python", python, 0o755)])
    place = tmp_path / "place"
    place.mkdir()
    proof = try_out(packed, place, environment, {"PATH": "/usr/bin:/bin"})
    assert proof.outside == ["/opt/gcc/libstdc++.so.6"]


def test_the_variables_of_the_environment_are_not_taken_along(environment, tmp_path):
    variables = {
        "PATH": f"{sys.prefix}/bin:/usr/bin:/bin",
        "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": "/x",
        "LD_LIBRARY_PATH": f"{sys.prefix}/lib:/opt/gcc/lib",
    }
    kept = _elsewhere(variables, environment, tmp_path)
    assert kept["PATH"] == "/usr/bin:/bin"
    assert kept == {**kept, "LD_LIBRARY_PATH": "/opt/gcc/lib", "HOME": str(tmp_path)}
    assert len(kept) == 3


def test_a_whole_system_is_no_environment(monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/usr")
    with pytest.raises(InputError, match=r"/usr is the whole system"):
        environment_here()


def test_too_little_room_is_told_with_the_cure(tmp_path):
    with pytest.raises(InputError, match=r"GB free, up to 9000\.00 GB are needed: TMPDIR moves it"):
        bundle._require_room(tmp_path, 9e12, "TMPDIR moves it")


def test_an_archive_is_readable_by_python_too(tmp_path):
    (tmp_path / "a").write_text("one")
    path = archived(tmp_path, "b.tar.gz", [entry("a", tmp_path / "a")])
    with tarfile.open(path) as tar:
        (member,) = tar.getmembers()
        assert (member.name, member.uid, member.uname) == ("knl-env/a", 0, "")
