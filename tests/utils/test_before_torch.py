"""The environment that torch finds in a process that trains."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.launching import ROOT, environment

SCRIPT = "runpy.run_path({0!r}, run_name='__main__')"
DATA = [f"data.{key}=here" for key in ("train", "validation", "tokenizer")]
ENTRIES = {
    "pretrain": (SCRIPT.format(str(ROOT / "launch" / "pretrain.py")), DATA),
    "preflight": (SCRIPT.format(str(ROOT / "launch" / "preflight.py")), []),
    "parity": ("runpy.run_module('minillm.parity', run_name='__main__')", ["--list"]),
}


def seen_by_torch(entry: str, folder, variable: str, **given: str) -> str:
    """What a variable is when an entry point imports torch (or transformers, which does)."""
    (folder / "here").mkdir(exist_ok=True)
    start, arguments = ENTRIES[entry]
    code = f"""
import importlib.abc, os, runpy, sys
class Stop(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "transformers"):
            print("SEEN=" + str(os.environ.get({variable!r})), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Stop())
sys.path.insert(0, {str(ROOT / "launch")!r})
sys.argv = ["entry", *{arguments!r}]
{start}
"""
    left = {name: value for name, value in environment().items() if name not in (variable, *given)}
    done = subprocess.run([sys.executable, "-c", code], env={**left, **given}, cwd=folder, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("SEEN=")[2].strip()


@pytest.mark.parametrize("entry", ENTRIES)
def test_deepspeeds_word_for_the_cpu_hides_the_gpus(entry, tmp_path):
    # What DeepSpeed's launcher gives two ranks, on CPUs too (0.19: CPU_Accelerator.set_visible_devices_envs).
    numbers = {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert seen_by_torch(entry, tmp_path, "CUDA_VISIBLE_DEVICES", **numbers, DS_ACCELERATOR="cpu") == ""
    assert seen_by_torch(entry, tmp_path, "CUDA_VISIBLE_DEVICES", **numbers, DS_ACCELERATOR="cuda") == "0,1"


@pytest.mark.parametrize("entry", ENTRIES)
def test_cudas_allocator_grows_its_segments(entry, tmp_path):
    assert seen_by_torch(entry, tmp_path, "PYTORCH_ALLOC_CONF") == "expandable_segments:True"


def test_a_users_allocator_stays(tmp_path):
    own = "max_split_size_mb:128"
    assert seen_by_torch("pretrain", tmp_path, "PYTORCH_ALLOC_CONF", PYTORCH_ALLOC_CONF=own) == own
    assert seen_by_torch("pretrain", tmp_path, "PYTORCH_ALLOC_CONF", PYTORCH_CUDA_ALLOC_CONF=own) == "None"
