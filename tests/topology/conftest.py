"""Trees are thousands of small files: each is written once a session and only read."""

from __future__ import annotations

import pytest

from .trees import TREES


@pytest.fixture(scope="session")
def root_of(tmp_path_factory):
    """The root of a tree of TREES, by its name."""
    roots = {}

    def root(name):
        if name not in roots:
            roots[name] = TREES[name][0].write(tmp_path_factory.mktemp(name))
        return roots[name]

    return root
