"""`knl bench lars` with a small network, and how rivals take turns."""

from __future__ import annotations

import pytest
import torch

from knl.bench import lars
from knl.bench.lars import bench_lars, describe
from knl.bench.timing import in_turn
from knl.config import load_recipe


@pytest.fixture
def result(monkeypatch) -> dict:
    monkeypatch.setattr(lars, "_TRIAD_ELEMENTS", 1000)
    return bench_lars(load_recipe("digits"), 3)


def test_ratios_are_quotients_and_the_limit_is_five_passes(result):
    assert result["limit_ms"] == pytest.approx(
        5 * 4 * result["parameters"] / result["triad_gbs"] / 1e6
    )
    assert result["ratio_to_limit"] == pytest.approx(result["knl_ms"] / result["limit_ms"])
    quotient = result["per_tensor_lars_ms"] / result["knl_ms"]
    assert result["speedup_vs_per_tensor"] == pytest.approx(quotient)
    assert result["model"] == "resnet-small" and result["rounds"] == 3


def test_fused_sgd_is_there_or_a_reason(result):
    fused = result["torch_fused_sgd_ms"]
    if torch.__version__.startswith("1."):
        assert fused is None and result["ratio_to_fused_sgd"] is None
        assert result["summed_ratio_to_fused_sgd"] is None
        assert "fused" in result["torch_fused_sgd_reason"]
    else:
        assert result["ratio_to_fused_sgd"] == pytest.approx(result["knl_ms"] / fused)
        summed = result["summed_ratio_to_fused_sgd"]
        assert summed == pytest.approx(result["knl_summed_ms"] / fused)
    assert "triad" in describe(result)


def test_rivals_take_turns_in_changing_order():
    calls: list[str] = []
    rivals = {name: (lambda n=name: calls.append(n)) for name in "abc"}
    seconds = in_turn(rivals, rounds=8, warmup=1)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 8)
    rounds = ["".join(calls[at : at + 3]) for at in range(0, len(calls), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds) and len(set(rounds)) > 2
