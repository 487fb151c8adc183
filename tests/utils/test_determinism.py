"""PyTorch's deterministic kernels: on a GPU, where they are asked for, and nowhere else."""

from __future__ import annotations

import os

import pytest
import torch

from minillm.utils.determinism import deterministic_kernels


def state() -> dict[str, object]:
    return {
        "on": torch.are_deterministic_algorithms_enabled(),
        "warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_on_a_gpu_everything_is_set_and_put_back(monkeypatch):
    before = state()
    assert before == {"on": False, "warns": False, "fills": True, "cublas": None}  # PyTorch's defaults
    with pytest.raises(KeyError), deterministic_kernels(True):
        # Of the settings of docs.pytorch.org/docs/stable/notes/randomness.html; with warn_only FlashAttention's
        # backward pass does not repeat.
        assert state() == {"on": True, "warns": False, "fills": False, "cublas": ":4096:8"}
        raise KeyError
    assert state() == before
    with deterministic_kernels(False):
        assert state() == before
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the other setting that repeats
    with deterministic_kernels(True):
        assert state()["cublas"] == ":16:8"
    assert state()["cublas"] == ":16:8"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_on_a_cpu_nothing_changes():
    before = state()
    with deterministic_kernels(True):
        assert state() == before
