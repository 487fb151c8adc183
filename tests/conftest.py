"""Fixtures several floors share."""

from __future__ import annotations

import pytest

from tests.training.tiny_data import TINY_MODEL, TINY_RUN, write_tiny_data


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> dict[str, str]:
    """Settings of a tiny corpus on disk (see tests/training/tiny_data.py)."""
    return write_tiny_data(tmp_path_factory.mktemp("tiny-data"))


@pytest.fixture(scope="session")
def tiny_settings(tiny_data) -> dict[str, object]:
    """Everything a tiny pretraining run needs on its command line but run_root and run_name."""
    data = {key: value for key, value in tiny_data.items() if key.startswith("data.")}
    return {**TINY_MODEL, **TINY_RUN, **data}


@pytest.fixture(scope="session")
def group():
    """A process group of one, for the tests that train inside the test's process."""
    from minillm.training.engine import process_group

    with process_group():
        yield


pytest_plugins = ["tests.minutes"]
