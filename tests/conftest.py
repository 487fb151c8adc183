"""Fixtures several floors share, and how many cores a test takes: one, in this process and in those it starts.

Tiny models gain nothing from a second thread, tests run side by side, and a number that is measured anew in every run
would let other work on the machine change the last bits of runs that a test compares. A test of several threads sets
OMP_NUM_THREADS itself.
"""

from __future__ import annotations

import os

import pytest

from minillm.utils.threads import set_wait_policy

set_wait_policy()  # before anything imports torch
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.tiny_data import TINY_MODEL, TINY_RUN, write_tiny_data  # noqa: E402


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> dict[str, str]:
    """Settings of a tiny corpus on disk (see tests/support/tiny_data.py)."""
    return write_tiny_data(tmp_path_factory.mktemp("tiny-data"))


@pytest.fixture(scope="session")
def tiny_settings(tiny_data) -> dict[str, object]:
    """Everything a tiny pretraining run needs on its command line but run_root and run_name.

    On a GPU with the kernels that repeat: many tests compare bits.
    """
    import torch  # here, since tests of the tools need none

    deterministic = {"train.deterministic": True} if torch.cuda.is_available() else {}
    data = {key: value for key, value in tiny_data.items() if key.startswith("data.")}
    return {**TINY_MODEL, **TINY_RUN, **deterministic, **data}


@pytest.fixture(scope="session")
def group():
    """A process group of one, for the tests that train inside the test's process."""
    from minillm.training.engine import process_group

    with process_group():
        yield


@pytest.fixture(scope="session")
def two_ranks():
    """Two ranks for all tests of this process that need two; see tests/support/ranks.py."""
    from tests.support.ranks import Ranks

    with Ranks(2) as ranks:
        yield ranks


pytest_plugins = ["tests.support.minutes"]
