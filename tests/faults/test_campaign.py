"""The short form of the campaign: ten kills of real ranks, and the same weights in the end."""

from __future__ import annotations

import shutil

import pytest

from .campaign import MOMENTS, campaign


@pytest.mark.slow
@pytest.mark.one_stack  # make campaign was run on both: reliability.md
def test_ten_kills_leave_no_trace(tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build slow_and_back.c with: install g++")
    report = campaign(tmp_path, kills=10, ranks=2, seed=1, say=print)
    assert report.survived, report
    assert {kill.moment for kill in report.kills if kill.hit} == set(MOMENTS)
    for kill in report.kills:
        assert kill.status == 1 and kill.line.startswith("knl: rank "), kill
        assert kill.end_s < 30.0, kill
