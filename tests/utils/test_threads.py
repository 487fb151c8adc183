"""The waiting policy is there before OpenMP's runtime is, at every entry point; cores are counted as they are given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.utils import threads
from minillm.utils.threads import WAIT_VARIABLES, num_cores, set_wait_policy, threads_of_user
from tests.support.launching import ROOT, environment

SCRIPT = "runpy.run_path({!r}, run_name='__main__')"
MODULE = "runpy.run_module({!r}, run_name='__main__')"
RUN = ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json"), "data.train=here", "data.validation=here"]


def without_policy(**extra: str) -> dict[str, str]:
    return {name: value for name, value in environment().items() if name not in WAIT_VARIABLES} | extra


@pytest.fixture
def no_policy(monkeypatch):
    for name in WAIT_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_policy")
@pytest.mark.parametrize("name", WAIT_VARIABLES)
def test_the_users_policy_stays(name, monkeypatch):
    monkeypatch.setenv(name, "1000")
    set_wait_policy()
    assert {n: os.environ[n] for n in WAIT_VARIABLES if n in os.environ} == {name: "1000"}


@pytest.mark.skipif(sys.platform != "linux", reason="the wheels of other systems carry another runtime")
def test_the_runtime_that_torch_loads_obeys_it():
    code = "from minillm.utils.threads import set_wait_policy; set_wait_policy(); import torch"
    shown = subprocess.run([sys.executable, "-c", code], env=without_policy(OMP_DISPLAY_ENV="verbose"),
                           capture_output=True, text=True, check=True, timeout=120).stderr  # fmt: skip
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown and "GOMP_SPINCOUNT = '10000'" in shown, shown


@pytest.mark.parametrize(
    "entry, arguments",
    [
        (SCRIPT.format(str(ROOT / "launch" / "pretrain.py")), [*RUN, "data.tokenizer=here"]),
        (SCRIPT.format(str(ROOT / "launch" / "sft.py")), [*RUN, "model.init_from=here"]),
        (SCRIPT.format(str(ROOT / "launch" / "preflight.py")), []),
        (MODULE.format("minillm.chat"), ["here"]),
        (MODULE.format("minillm.export"), ["here", "out"]),
        (MODULE.format("minillm.parity"), ["--list"]),
    ],
    ids=["pretrain", "sft", "preflight", "chat", "export", "parity"],
)  # fmt: skip
def test_every_entry_point_sets_it_before_torch(entry, arguments, tmp_path):
    """Each is run until it imports torch, or transformers, which does."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text('{"model_type": "minillm"}')
    code = f"""
import importlib.abc, os, runpy, sys
class Stop(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "transformers"):
            print(name, os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Stop())
sys.path.insert(0, {str(ROOT / "launch")!r})
sys.argv = ["entry", *{arguments!r}]
{entry}
"""
    done = subprocess.run([sys.executable, "-c", code], env=without_policy(), cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.stdout.split()[-2:] in (["torch", "passive"], ["transformers", "passive"]), done.stdout + done.stderr


@pytest.mark.parametrize(
    "asked, launcher, found",
    [
        ("3", {}, 3),
        ("4,2", {}, 4),
        ("", {}, None),
        ("many", {}, None),
        ("0", {}, None),
        ("1", {}, 1),
        ("1", {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, None),  # torchrun's own
        ("1", {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1"}, 1),
        ("2", {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, 2),
    ],
)
def test_the_number_that_a_user_asks_for(asked, launcher, found, monkeypatch):
    for name, value in {"OMP_NUM_THREADS": asked, **launcher}.items():
        monkeypatch.setenv(name, value)
    assert threads_of_user() == found


@pytest.mark.parametrize(
    "lines, files, cores",
    [
        (["0::/"], {}, 64),
        (["0::/"], {"cpu.max": "max 100000"}, 64),
        (["0::/"], {"cpu.max": "200000 100000"}, 2),
        (["0::/"], {"cpu.max": "250000 100000"}, 3),
        (["0::/"], {"cpu.max": "50000 100000"}, 1),
        (["0::/job/step"], {"cpu.max": "max 100000", "job/cpu.max": "400000 100000", "job/step/cpu.max": "max 1"}, 4),
        (["0::/outside/of/the/container"], {"cpu.max": "300000 100000"}, 3),
        (["4:cpu,cpuacct:/job", "3:memory:/m"],
         {"cpu,cpuacct/job/cpu.cfs_quota_us": "150000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 2),
        (["1:cpu:/"], {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        (None, {}, 64),
    ],
)  # fmt: skip
def test_cores_of_a_control_group(lines, files, cores, tmp_path, monkeypatch):
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    own = tmp_path / "own"
    if lines is not None:
        own.write_text("\n".join(lines) + "\n")
    quota = threads._cores_of_group(tmp_path / "cgroup", own)
    monkeypatch.setattr(threads, "_cores_of_group", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert num_cores() == cores


def test_cores_are_at_most_those_a_process_may_run_on():
    assert 1 <= num_cores() <= os.cpu_count()
    assert Path("/proc").exists() is False or num_cores() <= len(os.sched_getaffinity(0))
