"""What the tests in this folder share: the run of one rank that others are compared with."""

from __future__ import annotations

import pytest

from .runs import Run, train_digits


@pytest.fixture(scope="session")
def single(tmp_path_factory) -> Run:
    """Digits, trained by one rank."""
    return train_digits(tmp_path_factory.mktemp("single"), 1)
