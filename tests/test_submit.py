"""launch/submit.py: what it would submit, what it refuses, and that it needs sbatch only to submit."""

from __future__ import annotations

import math
import os
import shlex
import stat
import subprocess
import sys

import pytest

from minillm.planning.devices import DEVICES
from minillm.planning.step import Setup, speed
from minillm.settings.deepspeed_json import read_deepspeed_json, resolve_deepspeed_config
from minillm.settings.presets import PRESETS
from minillm.settings.reading import load_run_config
from tests.support.launching import ROOT, environment

SUBMIT = str(ROOT / "launch" / "submit.py")


def submit(*words: str, cwd=ROOT, path: str | None = None) -> subprocess.CompletedProcess:
    variables = {**environment(), **({} if path is None else {"PATH": path})}
    return subprocess.run([sys.executable, SUBMIT, *words], cwd=cwd, env=variables, capture_output=True, text=True)


def sbatch_line(stdout: str) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """(environment, options, words) of the printed command."""
    parts = shlex.split(next(line for line in stdout.splitlines() if " sbatch " in line))
    at = parts.index("sbatch")
    options = [part[2:].partition("=") for part in parts[at + 1 :] if part.startswith("--")]
    rest = [part for part in parts[at + 1 :] if not part.startswith("--")]
    return dict(p.split("=", 1) for p in parts[:at]), {k: v for k, _, v in options}, rest


def seconds(limit: str) -> int:
    days, clock = limit.split("-")
    hours, minutes, rest = map(int, clock.split(":"))
    return ((int(days) * 24 + hours) * 60 + minutes) * 60 + rest


def test_dry_run_prints_command_and_filled_script():
    done = submit("demo", "train.train_batch_size=16", "--hours", "2.5", "--sbatch=--partition=gpu", "--dry-run")
    assert done.returncode == 0, done.stderr
    variables, options, words = sbatch_line(done.stdout)
    assert variables == {"DEEPSPEED": "ds_configs/zero1.json", "GPUS": "8"}
    assert options == {"job-name": "demo", "nodes": "1", "gres": "gpu:8", "ntasks-per-node": "8",
                       "time": "0-02:30:00", "partition": "gpu"}  # fmt: skip
    assert words == [str(ROOT / "launch" / "slurm" / "pretrain.sbatch"), "demo", "train.train_batch_size=16"]
    script = done.stdout.partition("#!/usr/bin/env bash\n")[2].splitlines()
    assert "#SBATCH --time=0-02:30:00" in script and "#SBATCH --job-name=demo" in script
    assert "#SBATCH --signal=B:USR1@120" in script and not any("24:00:00" in line for line in script)


def test_the_time_limit_is_the_planned_time_with_a_margin():
    steps = 200_000
    done = submit("dense-26m", f"train.max_steps={steps}", "train.num_epochs=null", "--max-hours", "9999", "--dry-run")
    assert done.returncode == 0, done.stderr
    run, _ = load_run_config("dense-26m", [], stage="pretrain", configs_dir=ROOT / "launch" / "configs")
    json_file = ROOT / "ds_configs" / "zero1.json"
    values, _ = resolve_deepspeed_config(read_deepspeed_json(json_file), run, 8, "")
    setup = Setup(arch=PRESETS["dense-26m"], values=values, world_size=8, backend="torch", expert_parallel=1,
                  batch=run.train.train_batch_size, length=run.data.seq_len,
                  micro=run.train.train_micro_batch_size_per_gpu, checkpointing=False)  # fmt: skip
    expected = 1.5 * steps * speed(setup, DEVICES["rtx3090"]).seconds + 15 * 60
    assert seconds(sbatch_line(done.stdout)[1]["time"]) == math.ceil(round(expected) / 60) * 60


def test_a_longer_run_gets_the_longest_time_and_is_requeued():
    done = submit("dense-171m", "--tokens", "1e12", "--max-hours", "12", "--dry-run")
    assert sbatch_line(done.stdout)[1]["time"] == "0-12:00:00"
    assert "is requeued" in done.stdout


@pytest.mark.parametrize(
    "words, script, expected",
    [(["sft-demo", "--stage", "sft"], "sft", {}),
     (["demo", "--nodes", "4", "--stage", "pretrain", "train.train_batch_size=32"], "multinode",
      {"nodes": "4", "ntasks-per-node": "8"})],
)  # fmt: skip
def test_the_script_fits_the_run(words, script, expected):
    done = submit(*words, "--hours", "1", "--dry-run")
    assert done.returncode == 0, done.stderr
    variables, options, rest = sbatch_line(done.stdout)
    assert rest[0].endswith(f"/{script}.sbatch") and expected.items() <= options.items()
    assert ("STAGE" in variables) == (script == "multinode")


def test_a_sweep_is_an_array_over_its_lines(tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("# comment\noptim.learning_rate=1e-3\n\noptim.learning_rate=2e-3 run_name=two\n")
    done = submit("demo", "--sweep", str(lines), "--hours", "1", "--dry-run")
    assert done.returncode == 0, done.stderr
    variables, options, words = sbatch_line(done.stdout)
    assert options["array"] == "1-2" and options["gres"] == "gpu:1" and variables["GPUS"] == "1"
    assert words[1:] == ["demo", str(lines)] and "#SBATCH --array=1-2" in done.stdout.splitlines()


@pytest.mark.parametrize(
    "text, message",
    [("optim.learning_rat=1\noptim.learning_rate=-1\n", "run 2: "), ("run_name=x\nrun_name=x\n", "by several runs"),
     ("# nothing\n", "there is no line in it"), ("samples.prompts='[a\n", "close the quotation")],
)  # fmt: skip
def test_every_line_of_a_sweep_is_checked(tmp_path, text, message):
    lines = tmp_path / "lines.txt"
    lines.write_text(text)
    done = submit("demo", "--sweep", str(lines), "--hours", "1", "--dry-run")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words, message",
    [(["demo", "optim.learning_rat=1"], "did you mean `learning_rate`"), (["dense-171m"], "give --tokens N"),
     (["demo", "--gpus", "3"], "does not divide"), (["demo", "--hours", "-1"], "--hours -1.0: it must be above 0"),
     (["demo", "--deepspeed", "no.json"], "no such file"), (["demo", "--sweep", "no.txt"], "no such file")],
)  # fmt: skip
def test_what_cannot_run_is_not_submitted(words, message):
    done = submit(*words, "--dry-run")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_machine_without_sbatch_is_one_error(tmp_path):
    done = submit("demo", path=str(tmp_path))
    assert done.returncode == 2 and "sbatch is not on PATH" in done.stderr and len(done.stderr.splitlines()) == 1


def test_what_is_printed_is_what_sbatch_gets(tmp_path):
    """A program named sbatch that records its call stands where a cluster's would."""
    recorder = tmp_path / "sbatch"
    recorder.write_text('#!/bin/sh\nprintf "%s\\n" "$GPUS" "$@" >"$0.called"\nexit 3\n')
    recorder.chmod(recorder.stat().st_mode | stat.S_IXUSR)
    done = submit("demo", "--hours", "1", "--gpus", "2", path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 3  # sbatch's own
    line = next(line for line in done.stdout.splitlines() if " sbatch " in line)
    parts = shlex.split(line)
    assert (tmp_path / "sbatch.called").read_text().splitlines() == ["2", *parts[parts.index("sbatch") + 1 :]]
