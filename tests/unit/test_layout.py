"""Which layout a plan takes: on a KNL never one that runs as AVX2, and nothing in silence."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from knl import choices, packages
from knl.choices import Choices, layout_problem, layouts, rule_layout
from knl.config import load_recipe
from knl.errors import InputError
from knl.plan import make_plan, plan_by_rule
from knl.profile import require_fit
from knl.train.job import resolved
from knl.tune.space import canonical

from ..topology.trees import TREES
from .nodes import by_rule, read
from .test_profile import profile, refusal_of

KNL = [name for name in TREES if read(name).is_knl]
OTHERS = [name for name in TREES if not read(name).is_knl]
AS_AVX2 = ("channels_last", "ipex")


@pytest.fixture
def without_onednn(monkeypatch):
    def version_of(package):
        return "" if package == packages.ONEDNN else packages.version_of(package)

    monkeypatch.setattr("knl.choices.version_of", version_of)
    monkeypatch.setattr("knl.plan.version_of", version_of)


def test_there_are_trees_of_both_kinds():
    assert len(KNL) >= 6
    assert len(OTHERS) >= 4


@pytest.mark.parametrize("name", TREES)
def test_the_rule_is_blocked_everywhere_without_a_warning(name):
    plan = by_rule(name, 1)
    assert plan.env["KNL_LAYOUT"].value == "blocked"
    assert not any("layout" in warning for warning in plan.warnings)


@pytest.mark.parametrize("name", KNL)
@pytest.mark.parametrize("layout", AS_AVX2)
def test_a_layout_that_runs_as_avx2_on_a_knl_is_never_planned_in_silence(name, layout):
    node = read(name)
    words = f"layout = '{layout}' runs convolutions as AVX2 on a {node.uarch}"
    measured = Choices(ranks_per_node=1, layout=layout)
    assert any(words in w for w in make_plan(node, measured, {}, "profile").warnings)
    by_user = plan_by_rule(node, 1, {"KNL_LAYOUT": layout})
    assert any(words in w for w in by_user.warnings)
    assert layout not in layouts(node)


@pytest.mark.parametrize("layout", AS_AVX2)
def test_a_profile_that_wastes_a_knl_is_refused_with_the_reason(layout, tmp_path):
    node = read("quadrant-cache")
    wasteful = profile(node, Choices(ranks_per_node=1, layout=layout))
    message = refusal_of(require_fit, wasteful, node, tmp_path / "p.json")
    for words in ("p.json", f"layout = '{layout}'", "as AVX2", "blocked", "run knl tune here"):
        assert words in message
    for good in ("blocked", "contiguous"):
        require_fit(profile(node, Choices(ranks_per_node=1, layout=good)), node, tmp_path)


@pytest.mark.parametrize("name", OTHERS)
def test_elsewhere_channels_last_is_measured_too_and_kept(name, tmp_path):
    node = read(name)
    assert layouts(node)[:2] == ["blocked", "channels_last"]
    require_fit(profile(node, Choices(ranks_per_node=1, layout="channels_last")), node, tmp_path)
    assert layout_problem(node, "channels_last") == ""


def test_without_our_onednn_the_next_best_is_taken_and_said(without_onednn, monkeypatch):
    monkeypatch.setattr(choices, "has_ipex", lambda: False)
    knl, other = read("quadrant-cache"), read("skx-alternating")
    assert (rule_layout(knl), rule_layout(other)) == ("contiguous", "channels_last")
    monkeypatch.setattr(choices, "has_ipex", lambda: True)
    assert (rule_layout(knl), rule_layout(other)) == ("contiguous", "ipex")
    plan = by_rule("quadrant-cache", 1)
    assert plan.env["KNL_LAYOUT"].value == "contiguous"
    (said,) = [
        warning for warning in plan.warnings if "onednn-cpu-gomp is not installed" in warning
    ]
    assert "layout contiguous in place of blocked" in said
    assert layouts(read("quadrant-cache")) == ["contiguous"]


def test_a_cpu_without_avx2_for_which_our_onednn_has_no_kernels_gets_another_layout(monkeypatch):
    monkeypatch.setattr(choices, "has_ipex", lambda: False)
    old = replace(read("skx-alternating"), isa=("sse4_1", "avx"))
    assert rule_layout(old) == "channels_last"


@pytest.mark.parametrize("layout", ["blocked", "ipex"])
@pytest.mark.parametrize("changes", [{"dtype": "bf16"}, {"compile": True}])
def test_what_a_layout_cannot_do_is_measured_in_channels_last(changes, layout):
    asked = Choices(ranks_per_node=1, layout=layout, **changes)
    assert canonical(asked) == msgspec.structs.replace(asked, layout="channels_last")


@pytest.mark.parametrize("layout", ["blocked", "ipex"])
@pytest.mark.parametrize("change", ["train.dtype=bf16", "train.compile=true"])
def test_a_recipe_that_a_layout_cannot_take_gets_channels_last_or_is_refused(
    change, layout, monkeypatch
):
    monkeypatch.setenv("KNL_LAYOUT", layout)
    settings = [change, "train.slow_bf16=true"]
    assert resolved(load_recipe("digits")).train.layout == layout
    assert resolved(load_recipe("digits", settings)).train.layout == "channels_last"
    with pytest.raises(InputError) as refusal:
        resolved(load_recipe("digits", [*settings, f"train.layout={layout}"]))
    key, _, value = change.partition("=")
    assert f"{key} = " in str(refusal.value)
    assert value in str(refusal.value)
    assert "use 'auto' or 'channels_last'" in str(refusal.value)
