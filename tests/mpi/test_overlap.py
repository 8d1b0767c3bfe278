"""Does communication go on while backward runs? Told from memory alone, not from a clock."""

from __future__ import annotations

import pytest

from .launch import check_ranks


@pytest.mark.parametrize("name", ["workers", "no-workers"])
def test_sums_are_there_before_backward_ends_only_with_workers(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    outcomes = check_ranks("ranks_overlap.py", 2, folder)
    outcomes.require("the memory in the last sleep")
    outcomes.require_orderly_end()
