"""One training step with the kernels of a KNL, executed: their numbers are those of AVX2. An
instruction that the host lacks fails the test, with its address and bytes."""

from __future__ import annotations

import pytest
import torch

from . import pretend

# Few images, but the sizes of real ones: each width has a path of its own in a kernel.
CASES = {"resnet50": (2, 224), "alexnet-bn": (2, 227), "alexnet": (2, 227)}

# Of an operation, against double precision. Sums of up to 25,000 products, in float32: 6e-6 was
# seen, of AVX2 as of AVX-512.
OPERATION = 2e-5
# Of the loss, against AVX2's: it has the rounding of all layers, 7e-7 as seen.
LOSS = 1e-5
# Of a gradient, against AVX2's. Each ReLU and maximum decides by a number that rounds; where it
# falls on the other side, a term of the gradient comes or goes, and BatchNorm spreads it. So the
# gradients of ResNet-50 differ by 2e-2, AVX2's from double precision's as well; of an AlexNet by
# 1e-5, or as much as one term where one does. What is exact is the bound on operations.
GRADIENT = {"resnet50": 0.1, "alexnet-bn": 1e-2, "alexnet": 1e-2}


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.usefixtures("avx512f")
@pytest.mark.parametrize("name", CASES)
def test_a_step_has_the_numbers_of_avx2(as_knl, tmp_path, name):
    code = f"import step\nanswer(step.run({name!r}, *{CASES[name]!r}, %r))"
    operations = as_knl.run(code % "knl.pt", tmp_path)
    others = pretend.run_python(code % "avx2.pt", tmp_path, DNNL_MAX_CPU_ISA="AVX2")
    assert operations and all("avx512" in kernel for _, kernel, _ in operations)
    assert len(others) == len(operations) and all("avx2" in kernel for _, kernel, _ in others)
    for asked, kernel, error in operations:
        assert error < OPERATION, f"{asked} by {kernel}"
    # Not only below a bound: as exact as AVX2's, taken together.
    assert sum(one[2] for one in operations) < 2 * sum(one[2] for one in others)
    found, wanted = (torch.load(tmp_path / file) for file in ("knl.pt", "avx2.pt"))
    assert difference(found.pop("loss"), wanted.pop("loss")) < LOSS
    assert found.keys() == wanted.keys() and len(found) > 10
    for parameter, gradient in wanted.items():
        assert difference(found[parameter], gradient) < GRADIENT[name], parameter
