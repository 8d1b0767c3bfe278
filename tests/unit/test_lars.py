"""LARS and SGD against formulas worked out in NumPy float64, and the kernel's OpenMP runtime."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.linalg import norm

from knl.errors import InputError, NonFiniteError
from knl.optim.lars import FORMS, Lars

MOMENTUM, DECAY, ETA, STEPS = 0.9, 2e-5, 0.002, 50
DEFAULT_SKIP = ("bias", "norm")
SHAPES = {
    "conv.weight": (16, 8, 3, 3),  # made channels_last
    "long.weight": (150, 130),  # more than one of the kernel's pieces
    "one.weight": (1, 1),
    "norm.weight": (32,),
    "norm.bias": (32,),
    "fc.weight": (10, 32),
    "fc.bias": (10,),
    "from_zero.weight": (6, 7),  # starts at |w| = 0
    "unused.weight": (5, 9),  # its gradient is always 0
}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of so small a step wait for each other for longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rates():
    """Warm-up, from 0, then decay: the rate changes at every step and passes 1 twice."""
    return [2.0 * k / 10 if k < 10 else 2.0 * (1 - (k - 10) / 50) ** 2 for k in range(STEPS)]


def start(shapes=SHAPES):
    random = np.random.default_rng(1)
    named = []
    for name, shape in shapes.items():
        values = random.normal(size=shape) + 0.5
        if name in ("from_zero.weight", "fc.bias", "norm.bias"):
            values *= 0.0
        tensor = torch.tensor(values, dtype=torch.float32)
        if len(shape) == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        named.append((name, torch.nn.Parameter(tensor)))
    return named


def gradients(named, step):
    random = np.random.default_rng(100 + step)
    scale = {"unused.weight": 0.0, "fc.weight": 1e-5, "from_zero.weight": 0.01}
    return [
        (random.normal(size=p.shape) * scale.get(name, 0.3)).astype(np.float32) for name, p in named
    ]


def optimiser(named, form, skip=DEFAULT_SKIP, decay=DECAY):
    return Lars(named, form=form, momentum=MOMENTUM, weight_decay=decay, eta=ETA, skip=skip)


def reference_step(form, w, v, g, lr, skipped):
    """One tensor's new weights, velocity and ratio."""
    decay = 0.0 if skipped else DECAY
    r = 1.0
    if form != "sgd" and not skipped and norm(w) > 0 and norm(g) > 0:
        r = ETA * norm(w) / (norm(g) + decay * norm(w))
        r = min(r, 50.0) if form == "nus" else r
        r = (min(r / lr, 1.0) if lr else 1.0) if form == "larc" else r
    into_velocity = {"paper": lr * r, "torch": r, "larc": r}.get(form, 1.0)
    into_weight = {"paper": 1.0, "nus": lr * r}.get(form, lr)
    v = MOMENTUM * v + into_velocity * (g + decay * w)
    return w - into_weight * v, v, r


def set_gradients(named, values, factor=1.0):
    for (_, p), g in zip(named, values):
        p.grad = torch.empty_like(p, requires_grad=False).copy_(torch.from_numpy(g)) * factor


def five_steps(form, **options):
    named = start()
    lars = optimiser(named, form, **options)
    for step, lr in enumerate(rates()[:5]):
        set_gradients(named, gradients(named, step))
        lars.step(lr, 1.0)
    return [*(p.detach() for _, p in named), torch.from_numpy(lars.trust)]


@pytest.mark.parametrize("skip", [DEFAULT_SKIP, (), ("bias", "long")])
@pytest.mark.parametrize("form", FORMS)
def test_fifty_steps_follow_the_formula_as_the_rate_changes(form, skip):
    named = start()
    lars = optimiser(named, form, skip)
    weights = [p.detach().numpy().astype(np.float64) for _, p in named]
    velocities = [np.zeros_like(w) for w in weights]
    left_out = [any(word in name for word in skip) for name, _ in named]
    seen = set()
    for step, lr in enumerate(rates()):
        values = gradients(named, step)
        set_gradients(named, values, 3.0)  # as if three lanes had been added up
        report = lars.step(lr, 1.0 / 3.0)
        ratios = []
        for i, g in enumerate(values):
            weights[i], velocities[i], r = reference_step(
                form, weights[i], velocities[i], g.astype(np.float64), lr, left_out[i]
            )
            ratios.append(r)
        np.testing.assert_allclose(lars.trust, ratios, rtol=1e-6)
        adapted = [r for r, out in zip(ratios, left_out) if not out]
        extremes = pytest.approx((min(adapted), max(adapted)), rel=1e-6)
        assert (report.trust_min, report.trust_max) == extremes
        seen.update(adapted)
    for (name, p), w, v, buffer in zip(named, weights, velocities, lars.momentum_buffers):
        assert norm(p.detach().numpy() - w) <= 1e-6 * norm(w), name
        assert norm(buffer.numpy() - v) <= 1e-5 * norm(v), name  # its terms cancel
    assert form != "nus" or 50.0 in seen  # the cap was reached
    assert form == "sgd" or len(seen) > STEPS


def test_paper_and_torch_forms_agree_only_while_the_rate_is_constant():
    results = {}
    for form in ("paper", "torch"):
        for lrs in ((0.5, 0.5, 0.5), (0.5, 1.0, 0.25)):
            named = start()
            lars = optimiser(named, form)
            for step, lr in enumerate(lrs):
                set_gradients(named, gradients(named, step))
                lars.step(lr, 1.0)
            results[form, lrs[1]] = named[0][1].detach()
    assert torch.allclose(results["paper", 0.5], results["torch", 0.5], rtol=1e-5, atol=1e-7)
    assert (results["paper", 1.0] - results["torch", 1.0]).abs().max() > 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_the_ratio_is_one_where_weights_or_gradient_are_zero(form, weight, gradient):
    p = torch.nn.Parameter(torch.full((3, 4), weight))
    p.grad = torch.full((3, 4), gradient)
    lars = optimiser([("layer.weight", p)], form)
    assert lars.step(2.0, 1.0).trust_max == 1.0
    expected = weight - 2.0 * (gradient + DECAY * weight)
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sums_of_squares_neither_vanish_nor_overflow(size):
    p = torch.nn.Parameter(torch.full((100,), 2.0))
    p.grad = torch.full((100,), size)
    report = optimiser([("w", p)], "torch", skip=(), decay=0.0).step(0.1, 1.0)
    assert report.trust_max == pytest.approx(ETA * 2.0 / size, rel=1e-6)


def test_by_default_biases_and_norms_move_as_in_sgd_without_decay():
    by_lars, by_sgd = five_steps("torch"), five_steps("sgd", decay=0.0)
    for name, a, b in zip(SHAPES, by_lars, by_sgd):
        close = torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        assert close == (name in ("norm.weight", "norm.bias", "fc.bias")), name


def test_a_gradient_in_another_memory_order_counts_the_same():
    results = []
    for order in (torch.channels_last, torch.contiguous_format):
        named = start({"conv.weight": (16, 8, 3, 3)})
        named[0][1].grad = torch.from_numpy(gradients(named, 0)[0]).contiguous(memory_format=order)
        optimiser(named, "paper").step(0.5, 1.0)
        results.append(named[0][1].detach())
    assert torch.equal(*results)


def test_a_parameter_that_backward_did_not_reach_counts_as_zero_gradient():
    named = start()
    optimiser(named, "paper").step(0.5, 1.0)
    for (name, p), (_, before) in zip(named, start()):
        decay = 1.0 if before.dim() == 1 else 1.0 - 0.5 * DECAY
        assert torch.allclose(p, before * decay, rtol=1e-6), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", ["conv.weight", "long.weight", "fc.bias"])
@pytest.mark.parametrize("where", ["gradient", "weight"])
def test_a_number_that_is_not_finite_is_named_and_changes_nothing(where, at, value):
    named = start()
    lars = optimiser(named, "paper")
    set_gradients(named, gradients(named, 0))
    lars.step(0.1, 1.0)
    parameter = dict(named)[at]
    broken = parameter.grad if where == "gradient" else parameter.detach()
    broken[(-1,) * broken.dim()] = value
    state = [p.detach() for _, p in named] + lars.momentum_buffers
    before = [tensor.clone() for tensor in state]
    with pytest.raises(NonFiniteError, match=re.escape(at)):
        lars.step(0.1, 1.0)
    for old, new in zip(before, state):
        np.testing.assert_array_equal(old.numpy(), new.numpy())  # nan equals nan here


LARGE = {"first.weight": (700, 900), "second.weight": (900, 800), "third.bias": (5,)}


def steps_of(named, lars, steps, group=None):
    """Steps in groups of so many tensors; all of them in one call without."""
    numbers = list(range(len(named)))
    size = group or len(numbers)
    for step in steps:
        set_gradients(named, gradients(named, step))
        for first in range(0, len(numbers), size):
            some = numbers[first : first + size]
            lars.update(some, [named[n][1].grad for n in some], 0.3, 1.0)


def test_norms_kept_from_the_last_update_are_those_of_the_weights_to_the_bit():
    whole, halved = start(LARGE), start(LARGE)
    lars = optimiser(whole, "paper")
    steps_of(whole, lars, range(4))
    before, after = optimiser(halved, "paper"), optimiser(halved, "paper")
    steps_of(halved, before, range(2))
    for old, new in zip(before.momentum_buffers, after.momentum_buffers):
        new.copy_(old)  # as from a checkpoint
    steps_of(halved, after, range(2, 4))
    for (name, a), (_, b) in zip(whole, halved):
        assert torch.equal(a, b), name
    np.testing.assert_array_equal(lars.trust, after.trust)


def test_weights_changed_by_others_get_new_norms():
    named = start(LARGE)
    lars = optimiser(named, "torch", skip=())
    steps_of(named, lars, [0])
    with torch.no_grad():
        named[0][1].mul_(10.0)
    named[1][1].data = named[1][1].detach() * 10.0
    before = lars.trust.copy()
    steps_of(named, lars, [0])
    assert lars.trust[:2] / before[:2] == pytest.approx([10.0, 10.0], rel=0.01)


@pytest.mark.parametrize("group", [1, 2])
def test_groups_of_tensors_move_as_all_together(group):
    results = []
    for size in (None, group):
        named = start({**SHAPES, **LARGE})
        lars = optimiser(named, "paper")
        steps_of(named, lars, range(3), size)
        report = lars.report()
        results.append([*(p.detach() for _, p in named), torch.from_numpy(lars.trust)])
        assert (report.trust_min, report.trust_max) == (
            lars.trust[~lars.skipped].min(),
            lars.trust[~lars.skipped].max(),
        )
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_bfloat16_gradients_count_as_their_own_values():
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        named = start({**SHAPES, **LARGE})
        lars = optimiser(named, "paper")
        rounded = [
            torch.empty_like(p, dtype=torch.bfloat16).copy_(torch.from_numpy(g))
            for (_, p), g in zip(named, gradients(named, 0))
        ]
        lars.update(range(len(named)), [g.to(dtype) for g in rounded], 0.3, 1.0)
        results.append([p.detach() for _, p in named])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_large_layer_that_is_not_finite_stays_as_it_was():
    named = start(LARGE)
    lars = optimiser(named, "paper")
    set_gradients(named, gradients(named, 0))
    named[1][1].grad[899, 799] = float("nan")
    before = named[1][1].detach().clone()
    with pytest.raises(NonFiniteError, match=re.escape("second.weight")):
        lars.step(0.1, 1.0)
    assert torch.equal(before, named[1][1])
    named[1][1].grad[899, 799] = 0.0
    lars.step(0.1, 1.0)  # and norms are made anew
    assert not torch.equal(before, named[1][1])


PIECE = 4096  # squares.h


def squares_of(gradients):
    """As a sum over ranks leaves them: of each tensor one number a piece."""
    flat = [np.asarray(g, dtype=np.float64).ravel() for g in gradients]
    pieces = [g[at : at + PIECE] for g in flat for at in range(0, g.size, PIECE)]
    return np.array([np.square(piece).sum() for piece in pieces])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 4095, 4096, 4097, 3 * 4096 + 16, 300_001])
def test_norms_are_exact_to_more_digits_than_a_float_has(size, dtype):
    random = np.random.default_rng(size)
    w = torch.tensor(random.normal(size=size), dtype=torch.float32)
    g = torch.tensor(random.normal(size=size) + 0.1, dtype=dtype)
    exact = [norm(x.double().numpy()) for x in (w, g)]
    lars = optimiser([("w", torch.nn.Parameter(w.clone()))], "torch", skip=(), decay=0.0)
    for number in range(2):  # of weights from memory, then of those that the update had at hand
        lars.update([0], [g], 0.1, 1.0)
        assert lars.trust[0] == pytest.approx(ETA * exact[0] / exact[1], rel=1e-12), number
        exact[0] = norm(lars.parameters[0].detach().double().numpy())


@pytest.mark.parametrize("group", [None, 1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_squares_that_are_given_move_weights_as_those_that_are_made(form, group):
    results = []
    for given in (False, True):
        named = start({**SHAPES, **LARGE})
        lars = optimiser(named, form)
        for step in range(3):
            values = gradients(named, step)
            set_gradients(named, values)
            for first in range(0, len(named), group or len(named)):
                some = range(first, min(first + (group or len(named)), len(named)))
                squares = squares_of([values[n] for n in some]) if given else None
                lars.update(some, [named[n][1].grad for n in some], 0.3, 1.0, squares)
        results.append([*(p.detach() for _, p in named), torch.from_numpy(lars.trust)])
    for made, given in zip(*results):
        assert torch.allclose(made, given, rtol=1e-6, atol=1e-7)


def test_squares_that_are_given_are_the_ones_that_count():
    named = start(LARGE)
    values = gradients(named, 0)
    set_gradients(named, values)
    lars = optimiser(named, "torch", skip=(), decay=0.0)
    some, given = range(3), [p.grad for _, p in named]
    lars.update(some, given, 0.0, 1.0)  # nothing moves
    before = lars.trust.copy()
    lars.update(some, given, 0.0, 1.0, 4.0 * squares_of(values))
    np.testing.assert_allclose(lars.trust[:2], before[:2] / 2.0, rtol=1e-9)


def test_squares_that_are_not_finite_name_the_layer_and_no_weight_of_the_call_moves():
    named = start(LARGE)
    values = gradients(named, 0)
    set_gradients(named, values)
    before = [p.detach().clone() for _, p in named]
    squares = squares_of(values)
    squares[-2] = np.inf  # the last piece of the second tensor
    with pytest.raises(NonFiniteError, match=re.escape("second.weight")):
        optimiser(named, "paper").update(range(3), [p.grad for _, p in named], 0.1, 1.0, squares)
    assert all(torch.equal(p, old) for (_, p), old in zip(named, before))


def test_squares_for_other_tensors_are_refused():
    named = start(LARGE)
    set_gradients(named, gradients(named, 0))
    lars = optimiser(named, "paper")
    with pytest.raises(InputError, match=r"^7 sums of squares for 154 pieces of gradients$"):
        lars.update([0], [named[0][1].grad], 0.1, 1.0, np.ones(7))


@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_threads_does_not_change_a_bit(form):
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(five_steps(form))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


STEP = """
import torch
from knl.native import openmp_runtimes
from knl.optim.lars import Lars
p = torch.nn.Parameter(torch.ones(300, 300))
p.sum().backward()
options = dict(form="paper", momentum=0.9, weight_decay=0.0, eta=1e-3, skip=())
Lars([("p", p)], **options).step(0.1, 1.0)
print(torch.__file__, *openmp_runtimes(), sep="\\n")
print(*(line for line in open("/proc/self/maps") if "omp" in line.rsplit("/")[-1]), sep="")
"""


def in_a_fresh_process(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.check_output(command, env={**os.environ, **environment}, text=True)


def test_a_process_that_steps_has_one_openmp_runtime_and_it_is_torchs():
    torch_file, runtime, *maps = in_a_fresh_process(STEP).split("\n")
    assert Path(runtime).parent == Path(torch_file).parent / "lib"
    assert {line.split()[5] for line in maps if line} == {runtime}


def test_the_kernel_runs_on_torchs_threads_though_another_runtime_came_first(tmp_path):
    loader = {"LD_DEBUG": "bindings", "LD_DEBUG_OUTPUT": str(tmp_path / "log")}
    in_a_fresh_process("import sklearn.datasets" + STEP, **loader)
    lines = "".join(path.read_text() for path in tmp_path.iterdir())
    bound = re.findall(r"libknl_kernels\.so \[\d+\] to (\S+) .*`GOMP_parallel'", lines)
    assert bound and all(Path(path).parent.parent.name == "torch" for path in bound)
