"""What all tests share: a skip for lack of a part is a failure where every part must be there."""

from __future__ import annotations

import os
import sys

import pytest

# The one part that a machine cannot be given: a KNL's kernels do not run without it.
HARDWARE = "this host has no AVX-512F"


@pytest.fixture(scope="session", autouse=True)
def _no_profiles_of_the_user(tmp_path_factory):
    """What the user has measured on this machine must not change what tests see."""
    os.environ["KNL_PROFILES"] = str(tmp_path_factory.mktemp("profiles"))


def pytest_collection_modifyitems(config, items):
    """What is the same on both stacks runs on one of them, the one with the newer Python."""
    if sys.version_info >= (3, 10):
        return
    left_out = [item for item in items if item.get_closest_marker("one_stack")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("one_stack")]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail") and "KNL_TESTS_REQUIRE_ALL" in os.environ:
        if HARDWARE in str(report.longrepr):
            return
        report.outcome = "failed"
        report.longrepr = f"skipped, though KNL_TESTS_REQUIRE_ALL is set: {report.longrepr[2]}"
