"""Starting the real commands in tests, and reading what they leave behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.processes import wait_until_alone

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 420


def environment(ranks: int = 1) -> dict[str, str]:
    """This process's environment without a launcher's, and with the repository importable.

    Args:
        ranks: that are started with it on this machine: on its CPUs, where it has GPUs and not enough of them.
    """
    left = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**left, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", **on_cpus(ranks)}


def on_cpus(ranks: int) -> dict[str, str]:
    """What hides this machine's GPUs from so many ranks, where there are fewer."""
    if ranks < 2:
        return {}
    import torch  # here, since processes that tests of the tools start need no torch

    # The second for DeepSpeed's launcher, which overwrites the first.
    return {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if 0 < torch.cuda.device_count() < ranks else {}


def ranks_of(words_of_command: list[str]) -> int:
    """How many ranks a command line asks its launcher for."""
    line = " ".join(words_of_command)
    asked = re.search(r"--(?:num_gpus|nproc_per_node|ranks)[= ](\d+)", line)
    return int(asked.group(1)) if asked else 1


def words(settings: dict[str, object]) -> list[str]:
    """Settings as `section.key=value` words."""
    return [f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in settings.items()]


def command(script: str, json_file: str | Path, settings: dict[str, object], ranks: int = 1, config: str = "demo"):
    """The command line a user types: python for one rank, the deepspeed launcher for more."""
    arguments = ["--deepspeed", str(json_file), "--config", config, *words(settings)]
    path = str(ROOT / "launch" / script)
    if ranks == 1:
        return [sys.executable, path, *arguments]
    port = str(29600 + os.getpid() % 1000)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", port]
    return [*launcher, path, *arguments]


def run(
    words_of_command: list[str], cwd: Path | None = None, check: bool = True, timeout: int = TIMEOUT
) -> subprocess.CompletedProcess:
    """Run to the end; on an unexpected exit code show the output."""
    done = subprocess.run(
        words_of_command, cwd=cwd or ROOT, env=environment(ranks_of(words_of_command)), capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    if check and done.returncode:
        raise AssertionError(f"{' '.join(words_of_command)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def run_until(words_of_command: list[str], condition, cwd: Path, number: int, to_group: bool = True) -> int:
    """Start a command, send it (or its whole process group) a signal once `condition()` holds, return its exit code."""
    log = open(cwd / "killed.log", "w")
    process = subprocess.Popen(
        words_of_command, cwd=cwd, env=environment(ranks_of(words_of_command)), stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            log.close()
            raise AssertionError(f"it ended before the signal:\n{(cwd / 'killed.log').read_text()}")
        time.sleep(0.005)
    os.killpg(process.pid, number) if to_group else os.kill(process.pid, number)
    code = process.wait(timeout=TIMEOUT)
    if number == signal.SIGKILL:
        wait_until_alone(process)  # children of the launcher got the signal too
    log.close()
    return code


def metrics(run_dir: Path) -> list[dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run_dir: Path) -> list[float]:
    """The training loss of each step, in order; a step that is there twice is an error."""
    found = [(r["step"], r["loss"]) for r in metrics(run_dir) if "loss" in r]
    assert [s for s, _ in found] == list(range(1, len(found) + 1)), found
    return [loss for _, loss in found]


def checkpoint(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights and moments."""
    from safetensors.torch import load_file  # here, since processes that tests of the tools start need no torch

    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    tensors = {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}
    return {name: tensor.clone() for name, tensor in tensors.items()}  # load_file maps the file: it may change


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    import torch

    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
