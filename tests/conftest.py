"""What all tests share: a skip for lack of a part is a failure where every part must be there."""

from __future__ import annotations

import os

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail") and "KNL_TESTS_REQUIRE_ALL" in os.environ:
        report.outcome = "failed"
        report.longrepr = f"skipped, though KNL_TESTS_REQUIRE_ALL is set: {report.longrepr[2]}"
