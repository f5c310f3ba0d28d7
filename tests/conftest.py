"""Puts this folder on the import path, so that `made_up` is shared by the tiers."""

from __future__ import annotations

import gc

import pytest

TOGETHER = {"tests/ray/test_search.py": "tests/ray/test_lanes.py"}
"""Files that use one cluster; the same process runs both."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests go to processes a file at a time."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file, file)

    return Scheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def out_of_the_collectors_sight():
    """What imports have left is no garbage and need not be looked through at every collection."""
    gc.freeze()
