"""The memory of GPUs as nvidia-smi tells it, on a machine that has neither."""

from __future__ import annotations

import os

import pytest

from minillm.utils import gpus


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A function that makes a program of that name, which answers so and keeps what it was asked."""
    monkeypatch.setattr(gpus, "version", lambda package: "2.13.0+cu130")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def answers(text: str, code: int = 0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat <<END\n{text}\nEND\nexit {code}\n')
        program.chmod(0o755)
        return tmp_path / "asked"

    return answers


def test_the_smallest_visible_card_in_bytes(nvidia_smi, monkeypatch):
    asked = nvidia_smi("24576, [N/A]\n81559, Disabled")  # an RTX 3090 and an H100, in MiB
    assert gpus.smallest_gpu_memory() == 24 * 2**30
    assert "memory.total" in asked.read_text() and "--id" not in asked.read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert gpus.smallest_gpu_memory() == 24 * 2**30
    assert "--id=1,3" in asked.read_text()


@pytest.mark.parametrize(
    "text, code", [("81559, Enabled", 0), ("No devices were found", 6), ("[N/A], [N/A]", 0), ("", 0)]
)
def test_a_card_in_slices_and_no_card_are_not_guessed(nvidia_smi, text, code):
    nvidia_smi(text, code)
    assert gpus.smallest_gpu_memory() is None


def test_a_run_on_the_cpu_has_none(nvidia_smi, monkeypatch):
    asked = nvidia_smi("24576, [N/A]")
    with monkeypatch.context() as hidden:
        hidden.setenv("CUDA_VISIBLE_DEVICES", "")
        assert gpus.smallest_gpu_memory() is None
    with monkeypatch.context() as hidden:
        hidden.setenv("DS_ACCELERATOR", "cpu")
        assert gpus.smallest_gpu_memory() is None
    with monkeypatch.context() as hidden:
        hidden.setattr(gpus, "version", lambda package: "2.13.0+cpu")
        assert gpus.smallest_gpu_memory() is None
    assert not asked.exists()
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpus.smallest_gpu_memory() is None
