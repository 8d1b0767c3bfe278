"""The kernels that oneDNN takes on a KNL: every one of a step is AVX-512 in the layout of our rule,
and none is in channels-last."""

from __future__ import annotations

import pytest

from ..unit.nodes import by_rule
from . import instructions

# Pixels a side; resnet-small takes any.
NETWORKS = {
    "resnet50": 224, "alexnet": 227, "alexnet-bn": 227, "alexnet-torch": 224, "resnet-small": 32,
}  # fmt: skip
XEON_PHIS = [
    "quadrant-cache", "quadrant-flat", "snc4-flat", "snc4-cache", "snc2-flat", "a2a-hybrid50",
    "7210", "no-hyper-threading", "half-cpuset", "offline-cores",
]  # fmt: skip
# Of the names of oneDNN's generators: each kind of kernel that a step has.
GENERATED = ("conv_fwd", "bwd_data", "bwd_weights", "1x1", "pool", "lrn", "reorder", "reducer")


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Where oneDNN leaves the code of its kernels."""
    return tmp_path_factory.mktemp("generated")


@pytest.fixture(scope="module")
def asked(as_knl, generated):
    """Of each network, what it asks of oneDNN on a KNL with the plan of our rule."""
    plan = by_rule("quadrant-cache", 1)
    layout, threads = plan.env["KNL_LAYOUT"].value, len(plan.ranks[0].compute_cpus)
    code = f"import asked\nanswer(asked.kernels({NETWORKS!r}, {layout!r}, {threads}))"
    return as_knl.run(code, generated, DNNL_JIT_DUMP="1")


def of_kind(network, kind, **wanted):
    """The operations of that kind; of a pass, of a step or an evaluation where one is named."""
    found = [one for one in network["asked"] if one["kind"] == kind]
    return [one for one in found if all(one[key] == value for key, value in wanted.items())]


def number(operations):
    return sum(one["times"] for one in operations)


@pytest.mark.parametrize("name", XEON_PHIS)
def test_the_rule_for_a_knl_is_the_blocked_layout(name):
    assert by_rule(name, None).env["KNL_LAYOUT"].value == "blocked"


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_of_a_step_is_asked_for(asked, name):
    network, step = asked[name], {"kind": "convolution", "when": "step"}
    every = network["convolutions"]
    assert number(of_kind(network, **step, **{"pass": "forward"})) == every
    assert number(of_kind(network, **step, **{"pass": "backward weights"})) == every
    # Images have no gradient.
    assert number(of_kind(network, **step, **{"pass": "backward data"})) == every - 1
    assert number(of_kind(network, "convolution", when="evaluation")) == every
    assert all(one["shape"][0] == 64 for one in network["asked"])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_has_an_avx512_kernel(asked, name):
    taken = {one["kernel"] for one in of_kind(asked[name], "convolution")}
    assert taken <= {"jit:avx512_common", "jit_1x1:avx512_common"}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_convolution_has_one_in_channels_last(asked, name):
    """So that the test before can fail, and why the rule is blocked."""
    taken = {one["channels_last"] for one in of_kind(asked[name], "convolution")}
    if name == "alexnet-torch":  # whose first layer finds no direct convolution at all
        taken.remove("x64:gemm:jit")
    assert taken <= {"jit:avx2", "jit_1x1:avx2"}


@pytest.mark.parametrize("name", NETWORKS)
def test_pooling_and_response_norm_have_avx512_kernels_too(asked, name):
    pools = {one["kernel"] for one in of_kind(asked[name], "max_pooling")}
    norms = {one["kernel"] for one in of_kind(asked[name], "response_norm")}
    assert pools == (set() if name == "resnet-small" else {"jit:avx512_common"})
    assert norms == ({"lrn_jit:avx512_common"} if name == "alexnet" else set())


def test_the_kernels_hold_no_instruction_that_a_knl_lacks(asked, generated):
    """The generated code itself, with that of reorders and sums: a host with more extensions would
    run what a KNL cannot, and show nothing."""
    kernels = sorted(generated.glob("*.bin"))
    for kind in GENERATED:
        assert any(kind in kernel.name for kernel in kernels), kind
    found = instructions.generated(*kernels)
    assert sum("%zmm" in text for _, text in found) > 1000
    assert instructions.foreign(found) == []
