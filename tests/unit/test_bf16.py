"""Training in bfloat16: it learns as float32 does, what stays float32, and where it is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

from knl.comm.collectives import Alone, Ranks
from knl.comm.world import SINGLE
from knl.config import BF16_ISA, load_recipe, require_cpu_fits
from knl.data.dataset import open_dataset
from knl.errors import InputError
from knl.models.norm import BatchNorm
from knl.sysfs import read_topology
from knl.train.job import resolved
from knl.train.trainer import Trainer
from knl.tune import search
from knl.tune.accuracy import Check, check, judged
from knl.tune.search import Search
from knl.tune.space import space

from .nodes import read

STEPS, LAST, SEEDS = 50, 10, range(5)
HERE = read_topology(Path("/"))
TORCH_1 = not hasattr(torch, "compile")
FAST = bool(set(BF16_ISA) & set(HERE.isa)) and not TORCH_1
# Else an image takes twenty times as long, or more.
SIZE = ["train.lanes=4"] if FAST else ["train.lanes=1", "train.lane_batch=8"]


@pytest.fixture(autouse=True)
def one_thread():
    """Networks so small gain nothing by more, and lose much where something else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer_of(name, dtype, seed=0, *settings):
    overrides = [f"train.seed={seed}", f"train.dtype={dtype}", "train.layout=channels_last"]
    overrides += ["train.slow_bf16=true", *SIZE, *settings]
    recipe = resolved(load_recipe(name, overrides))
    return Trainer(recipe, open_dataset(recipe.data, seed), Ranks(SINGLE, Alone()))


@cache
def loss(name, dtype, seed):
    """Mean of the last steps."""
    trainer = trainer_of(name, dtype, seed, f"train.steps={STEPS}")
    try:
        return mean([trainer.step(step).loss for step in range(STEPS)][-LAST:])
    finally:
        trainer.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_fifty_steps_come_to_the_loss_of_float32_within_the_scatter_of_its_seeds(name):
    """By seed no farther from float32 than three deviations of its seeds; on average over two no
    farther than one."""
    fp32 = [loss(name, "fp32", seed) for seed in SEEDS]
    apart = [loss(name, "bf16", seed) - fp32[seed] for seed in (0, 1)]
    assert all(abs(difference) <= 3 * stdev(fp32) for difference in apart), (fp32, apart)
    assert abs(mean(apart)) <= stdev(fp32), (fp32, apart)


def test_activations_are_bfloat16_and_everything_that_is_kept_is_float32():
    trainer = trainer_of("digits", "bf16")
    norms = [m for m in trainer.model.modules() if isinstance(m, BatchNorm)]
    seen = []
    for norm in norms:
        norm.register_forward_hook(
            lambda _, inputs, y: seen.append((inputs[0].dtype, y.dtype, y.grad_fn.name()))
        )
    trainer.step(0)
    trainer.close()
    kernel = (torch.bfloat16, torch.bfloat16, "_FusedBackward")
    if not TORCH_1:  # its convolutions give up channels_last
        assert seen == [kernel] * len(norms) * len(trainer.my_lanes)
    kept = [*trainer.model.parameters(), *(p.grad for p in trainer.model.parameters())]
    kept += [*trainer.statistics.buffers, *trainer.optimiser.momentum_buffers]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    evaluated = trainer_of("digits", "bf16")
    assert evaluated.evaluate().loss == pytest.approx(2.3, abs=0.2)
    evaluated.close()


def test_torchs_own_layout_gives_the_same_first_loss():
    losses = []
    for dtype in ("fp32", "bf16"):
        trainer = trainer_of("digits", dtype, 0, "train.lane_batch=16")
        losses.append(trainer.step(0).loss)
        trainer.close()
    assert losses[1] == pytest.approx(losses[0], abs=1e-2)


@pytest.mark.parametrize(
    ("override", "isa", "words"),
    [
        (
            "train.dtype=bf16", {"avx2", "avx512f"},
            ["train.dtype = 'bf16': slower", "neither avx512_bf16 nor amx_bf16", "slow_bf16=true"],
        ),
        (
            "comm.dtype=bf16", {"avx512f", "avx512bw"},
            ["comm.dtype = 'bf16': on this CPU", "oneCCL", "use comm.dtype = 'fp32'"],
        ),
    ],
)  # fmt: skip
def test_a_cpu_without_the_instructions_is_refused_in_one_line(override, isa, words, monkeypatch):
    recipe = load_recipe("digits", [override])  # as on a login node: no refusal here
    require_cpu_fits(recipe, {*isa, "avx512_bf16"})
    with pytest.raises(InputError) as refusal:
        require_cpu_fits(recipe, isa)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "\n" not in str(refusal.value)
    node = replace(HERE, isa=tuple(isa))
    monkeypatch.setattr("knl.train.job.read_topology", lambda _: node)
    with pytest.raises(InputError, match="bf16"):
        resolved(recipe)


def test_a_knl_is_refused_both():
    node = read("quadrant-cache")
    for override in ("train.dtype=bf16", "comm.dtype=bf16"):
        with pytest.raises(InputError, match=override.split("=")[0]):
            require_cpu_fits(load_recipe("digits", [override]), node.isa)


def test_what_is_slow_is_taken_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("knl.train.job.read_topology", lambda _: replace(HERE, isa=("avx2",)))
    recipe = load_recipe("digits", ["train.dtype=bf16", "train.slow_bf16=true"])
    assert resolved(recipe).train.layout == "channels_last"


def test_torch_1_is_refused_as_slow(monkeypatch):
    node = replace(HERE, isa=(*HERE.isa, "avx512_bf16"))
    monkeypatch.setattr("knl.train.job.read_topology", lambda _: node)
    monkeypatch.delattr(torch, "compile", raising=False)
    monkeypatch.setenv("KNL_LAYOUT", "ipex")  # which would compute in float32 and not say so
    with pytest.raises(InputError, match=r"no fast convolutions .* the modern stack") as refusal:
        resolved(load_recipe("digits", ["train.dtype=bf16"]))
    assert "--set train.slow_bf16=true" in str(refusal.value)
    allowed = ["train.dtype=bf16", "train.slow_bf16=true"]
    assert resolved(load_recipe("digits", allowed)).train.layout == "channels_last"
    monkeypatch.setattr("knl.tune.space.version_of", lambda _: "1.11.0+cpu")
    assert "dtype" not in space(node, 64, {}, with_compile=False)


def test_the_tuner_offers_it_where_the_cpu_has_the_instructions(monkeypatch):
    monkeypatch.setattr("knl.tune.space.version_of", lambda _: "2.13.0+cpu")
    for isa, offered in ((("avx512f",), False), (("avx512_bf16",), True), (("amx_bf16",), True)):
        found = space(replace(read("vm"), isa=isa), 64, {}, with_compile=False)
        assert ("dtype" in found) == offered


@pytest.mark.parametrize(
    ("bf16", "passed"), [(0.4, True), (0.1, True), (0.71, False), (-0.1, False)]
)
def test_the_scatter_of_the_seeds_is_what_the_tuner_allows(bf16, passed):
    found = judged([0.2, 0.3, 0.45], bf16)
    assert found.passed == passed
    assert f"loss of {bf16:.4f} in bf16, 0.2000 to 0.4500 in fp32 with 3 seeds" in found.told
    assert judged([0.2, 0.3], float("nan")).passed is False


def test_a_check_that_has_no_time_or_fails_says_so():
    found = check({"PATH": ""}, 0.0)
    assert found == Check(True, "no accuracy check: it did not end in 0 s")
    failed = check({"PYTHONHASHSEED": "x"}, 60.0)
    assert not failed.passed
    assert failed.told.startswith("its accuracy check failed: Python")


@pytest.mark.slow
def test_the_check_trains_in_both_types():
    found = check({**os.environ, "OMP_NUM_THREADS": "1"}, 300.0)
    assert found.passed == FAST, found
    assert ("within the scatter" if FAST else "train.dtype = 'bf16': ") in found.told


@pytest.mark.parametrize("passed", [False, True])
def test_a_search_checks_once_before_it_tries_bfloat16(passed, monkeypatch):
    asked = []

    def checked(environment, limit_s):
        asked.append(limit_s)
        return Check(passed, "told")

    monkeypatch.setattr(search, "check", checked)

    class Bench:
        node, images, steps, environment = read("vm"), 8, 2, {}

    class History:
        space, trials, best = {"dtype": ("fp32", "bf16")}, [], None

        def suggest(self, near, is_new):
            return None

    class Display:
        def say(self, text):
            pass

    state = Search(Bench(), History(), Display(), 600.0, 0.0)
    found = [state._next() for _ in range(2)]
    assert [choices is not None and choices.dtype == "bf16" for choices in found] == [passed] * 2
    assert len(asked) == 1
