"""Profiles: kept whole, refused elsewhere, and taken where they fit."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from dataclasses import replace

import msgspec
import pytest

from knl.choices import Choices
from knl.comm.world import SINGLE, World
from knl.config import load_recipe
from knl.errors import InputError
from knl.plan import make_plan
from knl.profile import (
    SCHEMA,
    Gain,
    Profile,
    Trial,
    fingerprint,
    load_profile,
    newest_that_fits,
    plan_for,
    plan_of_rank,
    profile_folder,
    require_fit,
    save_profile,
)
from knl.sysfs import read_topology

from ..topology.trees import QUADRANT_FLAT, TREES, knl

CHOICES = Choices(ranks_per_node=1, reserve_cores=1, comm_workers=1, blocktime_ms=0)


@pytest.fixture
def node(tmp_path):
    """Two cores."""
    return read_topology(TREES["vm"][0].write(tmp_path / "vm"))


def profile(node, choices=CHOICES, created="2026-11-23T10:00:00Z", peak=0):
    trial = Trial(1, "search", choices, "complete", 8.0, (1.0, 1.1), peak_bytes=peak)
    return Profile(
        schema=SCHEMA,
        created=created,
        recipe="resnet50-bench",
        model="resnet50",
        pixels=224,
        images=128,
        fingerprint=fingerprint(node),
        plan=make_plan(node, choices, {}, "profile"),
        gain=Gain(4.0, 7.5, 8.0, 2.0, 1.9, 2.1, 1.0, 0.9),
        trials=(Trial(0, "as-is", None, "failed", 0.0, (), "ended with status 1"), trial),
    )


def refusal_of(call, *arguments):
    with pytest.raises(InputError) as refusal:
        call(*arguments)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_profile_comes_back_as_it_was_saved(node, tmp_path):
    path = tmp_path / "new" / "folder" / "p.json"
    save_profile(profile(node), path)
    assert load_profile(path) == profile(node)
    require_fit(load_profile(path), node, path)
    assert json.loads(path.read_text())["plan"]["ranks"][0]["local_rank"] == 0
    assert [p.name for p in path.parent.iterdir()] == ["p.json"]


def test_a_profile_is_as_readable_as_the_umask_says(node, tmp_path):
    before = os.umask(0o027)
    try:
        save_profile(profile(node), tmp_path / "p.json")
    finally:
        os.umask(before)
    assert (tmp_path / "p.json").stat().st_mode & 0o777 == 0o640


def test_what_is_no_profile_is_refused_with_file_and_cure(node, tmp_path):
    path = tmp_path / "p.json"
    whole = msgspec.to_builtins(profile(node))
    good = json.dumps(whole)
    for content, words in {
        "": ["truncated"],
        good[: len(good) // 2]: ["truncated"],
        good + "x": ["malformed"],
        "[1, 2]": ["not a JSON object"],
        "3": ["not a JSON object"],
        "{}": ["schema = None", "must be 1"],
        json.dumps({**whole, "schema": 2}): ["schema = 2", "must be 1"],
        json.dumps({**whole, "schema": "1"}): ["schema = '1'"],
        json.dumps({**whole, "images": "many"}): ["Expected `int`, got `str`", "$.images"],
        json.dumps({**whole, "extra": 1}): ["unknown field `extra`"],
        json.dumps({**whole, "trials": [{"number": 1}]}): ["missing required field", "trials"],
        good.replace('"libgomp"', '"libfoo"', 1): ["libfoo", "openmp"],
    }.items():
        path.write_text(content)
        message = refusal_of(load_profile, path)
        assert message.startswith(f"profile {path}: ")
        assert all(word in message for word in words), message
        assert "knl tune --out" in message
    path.write_bytes(good.encode().replace(b"resnet50", b"resnet\xff\xfe"))
    assert str(path) in refusal_of(load_profile, path)
    path.write_text("[" * 100_000)
    assert str(path) in refusal_of(load_profile, path)


def test_a_profile_that_cannot_be_read_says_why(tmp_path):
    assert "No such file" in refusal_of(load_profile, tmp_path / "none.json")
    assert "Is a directory" in refusal_of(load_profile, tmp_path)
    assert "knl tune --out" in refusal_of(load_profile, tmp_path)


@contextlib.contextmanager
def disk_full_at(size):
    """No file of this process may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_the_old_profile_and_nothing_else(node, tmp_path):
    path = tmp_path / "folder" / "p.json"
    save_profile(profile(node), path)
    with disk_full_at(100):
        message = refusal_of(save_profile, profile(node, created="later"), path)
    assert f"profile {path}: cannot be written: File too large" in message
    assert load_profile(path) == profile(node)
    assert [p.name for p in path.parent.iterdir()] == ["p.json"]


def test_a_place_that_cannot_be_written_is_told_and_stays_as_it_is(node, tmp_path):
    (tmp_path / "folder" / "p.json").mkdir(parents=True)
    assert "Is a directory" in refusal_of(
        save_profile, profile(node), tmp_path / "folder" / "p.json"
    )
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["p.json"]
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refusal_of(save_profile, profile(node), tmp_path / "file/p")
    assert "cannot be written" in refusal_of(save_profile, profile(node), tmp_path / "file/p")


def test_a_profile_of_other_hardware_is_refused_with_what_differs_on_both_sides(node, tmp_path):
    other = read_topology(QUADRANT_FLAT.write(tmp_path / "knl"))
    message = refusal_of(require_fit, profile(other), node, tmp_path / "p.json")
    then, now = message.split("; here is ")
    assert str(tmp_path / "p.json") in then
    for words, side in (
        (["7250", "cores = 68", "threads_per_core = 4", "memory_mode = flat", "mcdram"], then),
        (["cpu_model = AMD EPYC", "cores = 2", "threads_per_core = 1", "memory_mode = "], now),
    ):
        assert all(word in side for word in words), side
    assert "sockets = " not in message and "stack = " not in message  # these are the same
    assert "run knl tune here" in message


def test_less_memory_of_the_same_kind_is_the_same_node_and_a_smaller_cpuset_is_not(tmp_path):
    nodes = [(range(4), 96 << 30), ((), 16 << 30)]
    small = read_topology(knl(nodes, cores=4).write(tmp_path / "a"))
    nodes[0] = (range(4), 95 << 30)
    less = read_topology(knl(nodes, cores=4).write(tmp_path / "b"))
    assert fingerprint(small) == fingerprint(less)
    half = replace(small, allowed_cpus=small.allowed_cpus[:8])
    assert "allowed_cpus = 16" in refusal_of(require_fit, profile(small), half, tmp_path / "p")


def test_another_stack_is_refused(node, tmp_path):
    mine = profile(node)
    stack = {**mine.fingerprint.stack, "torch": "0.1"}
    old = msgspec.structs.replace(
        mine, fingerprint=msgspec.structs.replace(mine.fingerprint, stack=stack)
    )
    assert "'torch': '0.1'" in refusal_of(require_fit, old, node, tmp_path / "p.json")


def test_the_newest_that_fits_is_taken_and_others_are_passed_over(node, tmp_path):
    folder = tmp_path / "profiles"
    environment = {"KNL_PROFILES": str(folder)}
    assert newest_that_fits(node, environment) is None
    assert "plan by rule (no profile fits" in plan_for(node, None, None, environment)[1]
    for old, new in (("a.json", "z.json"), ("z.json", "a.json")):
        save_profile(profile(node, created="2026-11-02T00:00:00Z"), folder / old)
        save_profile(profile(node, created="2026-11-20T00:00:00Z"), folder / new)
        assert newest_that_fits(node, environment) == folder / new
    foreign = read_topology(knl([(range(4), 96 << 30)], cores=4).write(tmp_path / "knl"))
    save_profile(profile(foreign, created="2026-12-01T00:00:00Z"), folder / "foreign.json")
    (folder / "damaged.json").write_text("{")
    (folder / "folder.json").mkdir()
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "journal.txt").write_text("no profile")
    assert newest_that_fits(node, environment) == folder / "a.json"
    assert newest_that_fits(foreign, environment) == folder / "foreign.json"
    plan, where = plan_for(node, None, None, environment)
    assert (plan.choices, where) == (CHOICES, f"plan of profile {folder / 'a.json'}")


def test_profiles_lie_where_the_user_says():
    assert str(profile_folder({"KNL_PROFILES": "/a", "XDG_DATA_HOME": "/b"})) == "/a"
    assert str(profile_folder({"XDG_DATA_HOME": "/b"})) == "/b/knl/profiles"
    assert profile_folder({}).parts[-4:] == (".local", "share", "knl", "profiles")


def test_the_plan_of_a_profile_says_so_of_each_variable(node, tmp_path):
    path = tmp_path / "p.json"
    save_profile(profile(node), path)
    plan, where = plan_for(node, 1, path, {"OMP_NUM_THREADS": "7"})
    assert where == f"plan of profile {path}"
    sources = {name: setting.source for name, setting in plan.env.items()}
    assert sources.pop("OMP_NUM_THREADS") == "user"
    assert set(sources.values()) == {"profile"}
    assert "the profile would be '1'" in plan.env["OMP_NUM_THREADS"].reason


def test_a_profile_for_another_number_of_ranks_says_so_and_drops_what_does_not_carry_over(
    node, tmp_path
):
    save_profile(profile(node), tmp_path / "p.json")
    plan, where = plan_for(node, 2, tmp_path / "p.json", {})
    assert "p.json, measured with 1 rank(s), here for 2" in where
    assert len(plan.ranks) == 2
    assert (plan.choices.reserve_cores, plan.choices.comm_workers) == (None, None)
    assert plan.choices.blocktime_ms == 0
    refusal_of(plan_for, node, 3, tmp_path / "p.json", {})


@pytest.mark.parametrize(
    ("gigabytes", "changes", "ranks", "policy"),
    [
        (2, [], None, "bind"),
        (2, ["train.lane_batch=64"], None, "bind"),
        (15, [], None, "preferred"),  # does not fit
        (2, [], 2, "preferred"),  # the rest was not measured
        (2, ["train.lane_batch=256"], None, "preferred"),
        (2, ["data.image_size=256"], None, "preferred"),
        (2, ["model.name=alexnet", "data.image_size=227"], None, "preferred"),
        (2, ["train.dtype=bf16"], None, "preferred"),
        (2, None, None, "preferred"),  # another program
    ],
)
def test_only_memory_that_was_measured_in_such_a_training_can_be_bound(
    gigabytes, changes, ranks, policy, tmp_path
):
    flat = knl([(range(4), 96 << 30), ((), 16 << 30)], [[10, 31], [31, 10]], cores=4)
    node = read_topology(flat.write(tmp_path / "knl"))
    save_profile(profile(node, peak=gigabytes << 30), tmp_path / "p.json")
    recipe = None
    if changes is not None:
        recipe = load_recipe("resnet50-bench", ["train.lane_batch=128", "train.lanes=1", *changes])
    plan, _ = plan_for(node, ranks, tmp_path / "p.json", {}, recipe)
    assert {rank.memory.policy for rank in plan.ranks} == {policy}


def test_a_rank_of_a_launcher_gets_its_part_and_a_crowd_shares(tmp_path):
    here = read_topology()
    environment = {"KNL_PROFILES": str(tmp_path), "SLURM_STEP_ID": "0"}  # which bound nobody
    cores = len({core for core in here.cores if set(core.cpus) & set(here.allowed_cpus)})
    assert plan_of_rank(here, SINGLE, None, environment)[1] == 0
    last = World(cores - 1, cores, cores - 1, cores, "mpi")
    plan, number, where = plan_of_rank(here, last, None, environment)
    assert (len(plan.ranks), number) == (cores, cores - 1)
    assert where.startswith("plan by rule")
    crowd = World(cores, cores + 1, cores, cores + 1, "mpi")
    plan, number, _ = plan_of_rank(here, crowd, None, environment)
    assert (plan.ranks[number].compute_cpus, len(plan.ranks)) == (here.allowed_cpus, cores + 1)


def test_within_what_a_launcher_gave_to_a_rank_alone_it_is_the_only_one(tmp_path):
    here = read_topology()
    slurm = {
        "SLURM_STEP_ID": "0",
        "SLURM_CPU_BIND_TYPE": "mask_cpu:",
        "KNL_PROFILES": str(tmp_path),
    }
    world = World(1, 2, 1, 2, "mpi")
    plan, number, where = plan_of_rank(
        here, world, None, {**slurm, "SLURM_CPU_BIND_LIST": "0x1,0x2"}
    )
    assert (len(plan.ranks), number) == (1, 0)
    assert where == "plan by rule within the CPUs that mpi gave each rank"
