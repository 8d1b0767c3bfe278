"""What doctor reads, and what it says of this machine, of this stack, and of one made ill."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

import psutil
import pytest

from knl.doctor import describe, examine
from knl.doctor.facts import read_memory_limit, read_policy, room
from knl.doctor.stack import Convolution, Stack, convolutions, isa_level, isa_of, run_probe
from knl.sysfs import read_topology

from ..topology.trees import TREES

OLD = (
    "dnnl_verbose,exec,cpu,convolution,jit:avx512_common,forward_training,src_f32::blocked:aBcd8b",
    "onednn_verbose,exec,cpu,reorder,jit:uni,undef,src_f32::blocked:acdb:f0,,,64x64x3x3,0.05",
)
NEW = (
    "onednn_verbose,v1,primitive,exec,cpu,convolution,brg_conv_bwd:avx512_core+jit:avx2,"
    "backward_data,src:f32::blocked:acdb::f0,attr-scratchpad:user,alg:convolution_direct,1x1,27.6",
    "onednn_verbose,v1,primitive,create:cache_hit,cpu,convolution,jit:avx2,forward_training,x",
)


def test_lines_of_old_and_new_onednn_tell_what_ran_and_only_that():
    assert [(c.direction, c.isa) for c in convolutions("x", OLD)] == [("forward", "avx512_common")]
    (ran,) = convolutions("x", NEW)
    assert ran == Convolution("x", "backward_data", "brg_conv_bwd:avx512_core+jit:avx2", "avx2")
    names = ["gemm:ref", "jit:sse41", "jit:avx", "jit:avx2_vnni", "jit:avx512_core_amx"]
    assert [isa_level(isa_of(name)) for name in names] == [0, 1, 2, 3, 4]
    assert isa_level(isa_of("brgconv:avx10_1_512_amx")) == 4


def test_memory_limits_of_both_control_group_versions(tmp_path):
    for root, group, files in (
        ("v2", "0::/job/step\n", {"job/memory.max": "2000", "job/step/memory.max": "max"}),
        ("v1", "4:memory:/job\n1:cpu:/\n0::/\n", {"memory/job/memory.limit_in_bytes": "3000",
                                    "memory/memory.limit_in_bytes": "9223372036854771712"}),
        ("inside", "", {"memory.max": "4000"}),
        ("none", "0::/\n", {}),
    ):  # fmt: skip
        texts = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
        for name, text in {"proc/self/cgroup": group, **texts}.items():
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    roots = ("v2", "v1", "inside", "none")
    assert [read_memory_limit(tmp_path / root) for root in roots] == [2000, 3000, 4000, 0]


@pytest.mark.parametrize(("number", "mode"), [(1, "prefer"), (2, "bind"), (3, "interleave")])
def test_the_policy_of_this_process_is_read_as_it_was_set(number, mode):
    set_mempolicy, libc, first = 238, ctypes.CDLL(None, use_errno=True), ctypes.c_ulong(1)
    assert read_policy(Path("/")).mode == "default"
    if libc.syscall(set_mempolicy, number, ctypes.byref(first), 64):
        pytest.skip(f"set_mempolicy: {os.strerror(ctypes.get_errno())}")
    try:
        policy = read_policy(Path("/"))
    finally:
        libc.syscall(set_mempolicy, 0, None, 0)
    assert (policy.mode, policy.nodes) == (mode, (0,))
    assert policy.allowed is not None and 0 in policy.allowed


def test_policies_that_this_kernel_may_not_have(tmp_path):
    maps = tmp_path / "proc/self/numa_maps"
    maps.parent.mkdir(parents=True)
    for text, expected in {
        "7f00 default\n7f10 prefer (many):4-5 anon=1\n7f20 prefer (many):4-5\n": ((4, 5)),
        "7f00 bind=static:1 file=/x\n": (1,),
        "7f00 local anon=3 N0=3\n": (),
    }.items():
        maps.write_text(text)
        assert read_policy(tmp_path).nodes == expected


def test_room_in_a_folder(tmp_path):
    assert room(str(tmp_path / "none")).free is None
    free = room(str(tmp_path)).free
    assert free == pytest.approx(psutil.disk_usage(str(tmp_path)).free, abs=1 << 30)


def fake(code: str, limit_s: float = 60.0) -> Stack:
    return run_probe(dict(os.environ), (sys.executable, "-c", code), limit_s)


def test_a_probe_that_dies_hangs_or_fails_still_says_what_it_knew():
    said = 'import os, sys, time\nprint(\'{"found": {"torch": "9.9"}}\', flush=True)\n'
    said += 'print(\'{"doing": "convolution"}\\nnoise\', flush=True)\n'
    died = fake(said + "os.kill(os.getpid(), 4)")
    assert (died.torch, died.doing, died.killed_by) == ("9.9", "convolution", "SIGILL")
    hung = fake(said + "time.sleep(60)", 1.0)
    assert (hung.torch, hung.failure) == ("9.9", "did not end in 1 s")
    ended = fake(said + "sys.exit('two\\nlines')")
    assert ended.failure == "ended with status 1: lines"


def names(report):
    return {warning.name for warning in report.warnings}


def test_this_machine_s_convolutions_use_what_its_cpu_has_and_the_stack_is_whole():
    report = examine(Path("/"), {**os.environ, "OMP_NUM_THREADS": "2"})
    found = json.loads(json.dumps(report.to_json()))
    flags = found["hardware"]["isa"]
    full = {"avx512bw", "avx512vl", "avx512dq"} <= set(flags) or report.facts.node.is_knl
    expected = 4 if full else 3 if "avx2" in flags else 2 if "avx" in flags else 1
    assert {isa_level(c["isa"]) for c in found["convolutions"]} == {expected}
    ran = {(c["layout"], c["direction"]) for c in found["convolutions"]}
    layouts = [
        "contiguous",
        "channels_last",
        "blocked",
        *(["ipex_optimized"] if found["stack"]["ipex"] else []),
    ]
    directions = ("forward", "backward_data", "backward_weights")
    assert ran == {(layout, direction) for layout in layouts for direction in directions}
    missing = [name for name, value in found["stack"].items() if not value]
    assert set(missing) <= {"ipex", "problems", "failure"}
    assert found["collectives"]["provider"] == "oneccl"
    assert not names(report) & {"isa-below-cpu", "two-openmp-runtimes", "mpi-no-provider"}
    text = describe(report)
    assert all(line in text for line in (found["stack"]["torch"], found["stack"]["mpi"]))
    assert all(len(line) <= 96 or "/" in line for line in text.splitlines())


def test_a_stack_made_ill_by_its_environment_is_seen_to_be(tmp_path):
    import sklearn

    (gomp,) = (Path(sklearn.__file__).parents[1] / "scikit_learn.libs").glob("libgomp-*")
    ill = {"ONEDNN_MAX_CPU_ISA": "SSE41", "LD_PRELOAD": str(gomp), "TMPDIR": "/nowhere",
           "FI_PROVIDER_PATH": str(tmp_path)}  # fmt: skip
    report = examine(Path("/"), {**os.environ, **ill})
    expected = {"isa-below-cpu", "two-openmp-runtimes", "mpi-no-provider", "tmp-small"}
    assert expected <= names(report)
    assert not report.ok
    assert isa_level(report.facts.stack.isa) <= 1
    assert "unset ONEDNN_MAX_CPU_ISA" in describe(report)


def test_a_crash_of_torch_is_a_warning_and_not_doctor_s_own(tmp_path):
    report = examine(
        TREES["quadrant-flat"][0].write(tmp_path), {**os.environ, "ATEN_CPU_CAPABILITY": "avx512"}
    )
    assert {"aten-capability", "mcdram-unused"} <= names(report)
    assert ("knl-avx2-convolutions" in names(report)) == (
        report.facts.stack.torch_release > (1, 11)
    )
    assert f"read below {tmp_path}" in describe(report)
    if "avx512bw" not in read_topology().isa:
        (crash,) = [w for w in report.warnings if w.name == "probe-failed"]
        assert "SIGILL" in crash.message
        assert crash.cure == "unset ATEN_CPU_CAPABILITY"
        assert report.facts.stack.torch
