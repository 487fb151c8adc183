"""The shipped batch scripts, unmodified, on a real Slurm: time limit, requeue, cancellation, sweeps, two stages.

Contract: needs a Slurm whose first node has 8 GPUs (count-only ones do); without one, SLURM_START (default
../shared/slurm/start-local-slurm.sh) is run where it is there, else the tests skip. Ranks are CPU ranks where there is
no GPU; GPUS=2 in the environment makes two.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.support.launching import ROOT, checkpoint, command, environment, losses, metrics, run, same_bits, words

pytestmark = pytest.mark.slurm
START = Path(os.environ.get("SLURM_START", ROOT.parent / "shared" / "slurm" / "start-local-slurm.sh"))
ZERO2 = ROOT / "ds_configs" / "zero2.json"
PATIENCE = 900  # seconds; the jobs share two cores with whatever else runs


def output(*words_of_command: str, check: bool = True) -> str:
    done = subprocess.run(words_of_command, capture_output=True, text=True, check=False, timeout=300)
    assert not check or done.returncode == 0, f"{words_of_command}: {done.stderr}"
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def slurm():
    def up() -> bool:
        return shutil.which("sinfo") is not None and bool(output("sinfo", "-h", "-o", "%T", check=False).strip())

    if not up() and START.is_file() and os.getuid() == 0:
        subprocess.run(["bash", str(START)], capture_output=True, timeout=600, check=False)
    if not up():
        pytest.skip(f"there is no Slurm here, and {START} could not start one (it needs root)")


class Job:
    """A submitted job, cancelled at the latest when the test ends."""

    def __init__(self, script: str, arguments: list[str], folder: Path, *options: str, **variables: str):
        self.folder = folder
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(ROOT / "launch" / "slurm" / script), *arguments], cwd=folder,
            env={**environment(ranks=2), "DEEPSPEED": "ds_configs/zero2.json", "GPUS": "2", **variables},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()

    def fields(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", output("scontrol", "show", "job", "-o", self.id)))

    @property
    def state(self) -> str:
        return self.fields()["JobState"]

    def logs(self) -> str:
        paths = sorted([*self.folder.glob("*.log"), *self.folder.glob("slurm-logs/*/*.log")])
        return "\n".join(f"== {path}\n{path.read_text()}" for path in paths)

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"{self.fields()}\n{self.logs()}"
            time.sleep(0.5)

    def wait(self) -> str:
        """Its last state."""
        self.wait_until(lambda: self.state not in ("PENDING", "RUNNING", "COMPLETING"))
        return self.state


@pytest.fixture
def two_nodes(tmp_path, monkeypatch):
    """A second Slurm beside the first, of two nodes with one GPU each: two slurmd under two names on this machine."""
    if os.getuid() != 0 or shutil.which("slurmctld") is None or shutil.which("slurmd") is None:
        pytest.skip("starting a Slurm of two nodes needs root, slurmctld and slurmd")
    host = output("hostname", "-s").strip()
    lines = [
        "ClusterName=two", f"SlurmctldHost={host}(127.0.0.1)", "SlurmctldPort=17817", "AuthType=auth/munge",
        "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core", "SlurmdParameters=config_overrides", "ReturnToService=2", "GresTypes=gpu",
        "SlurmUser=root", "SlurmdUser=root", "JobCompType=jobcomp/none", "JobAcctGatherType=jobacct_gather/none",
        "MpiDefault=none", f"StateSaveLocation={tmp_path}/state", f"SlurmdSpoolDir={tmp_path}/spool.%n",
        f"SlurmctldPidFile={tmp_path}/slurmctld.pid", f"SlurmdPidFile={tmp_path}/slurmd.%n.pid",
    ]  # fmt: skip
    (tmp_path / "state").mkdir()
    gres = ["AutoDetect=off"]
    for number, name in enumerate(("n1", "n2"), start=1):
        (tmp_path / f"spool.{name}").mkdir()
        gpu = tmp_path / f"spool.{name}" / "gpu0"
        output("mknod", str(gpu), "c", "1", "3")  # a null device, to be counted
        gres.append(f"NodeName={name} Name=gpu File={gpu}")
        lines.append(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={17000 + number} CPUs=32 "
                     f"RealMemory=4000 Gres=gpu:1 State=UNKNOWN")  # fmt: skip
    lines.append("PartitionName=gpu Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP")
    (tmp_path / "slurm.conf").write_text("\n".join(lines) + "\n")
    (tmp_path / "gres.conf").write_text("\n".join(gres) + "\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    commands = (["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"])
    with contextlib.ExitStack() as started:
        log = started.enter_context(open(tmp_path / "daemons.txt", "w"))
        for words_of_daemon in commands:
            daemon = subprocess.Popen(words_of_daemon, stdout=log, stderr=log)
            started.callback(daemon.wait, timeout=60)
            started.callback(daemon.terminate)
        deadline = time.monotonic() + 60
        while output("sinfo", "-h", "-N", "-o", "%T", check=False).split() != ["idle", "idle"]:
            assert time.monotonic() < deadline, (tmp_path / "daemons.txt").read_text()
            time.sleep(0.5)
        yield


@pytest.fixture
def submit(tmp_path):
    jobs: list[Job] = []

    def start(script: str, arguments: list[str], *options: str, **variables: str) -> Job:
        jobs.append(Job(script, arguments, tmp_path, *options, **variables))
        return jobs[-1]

    yield start
    for job in jobs:
        output("scancel", job.id, check=False)
    for job in jobs:
        job.wait_until(lambda job=job: job.id not in output("squeue", "-h", "-o", "%A"))


def test_the_time_limit_saves_requeues_and_resumes(tiny_settings, tmp_path, submit):
    """Slurm's own warning, two minutes before a limit of four; the loss curve is that of an unbroken run."""
    steps = 40
    settings = {**tiny_settings, "train.max_steps": steps, "checkpoint.every": 0, "validation.every": 0}
    slow = {"samples.every": 1, "samples.prompts": ["The list"] * 60, "samples.max_new_tokens": 40}  # changes no loss
    job = submit("pretrain.sbatch", ["demo", *words({**settings, **slow, "run_name": "broken"})], "--time=4")
    broken = tmp_path / "runs" / "broken"
    job.wait_until(lambda: "requeued" in job.logs() or job.state not in ("PENDING", "RUNNING"))
    job.wait_until(lambda: job.state == "PENDING")
    stopped = len(losses(broken))
    assert 0 < stopped < steps
    assert checkpoint(broken, stopped)
    assert f"the time limit is near: saved as step {stopped}, requeued" in job.logs()

    output("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    time.sleep(3)  # Slurm lets a requeued job wait for two minutes; not at all, and its credential is still revoked
    output("scontrol", "update", f"JobId={job.id}", "StartTime=now")
    job.wait()
    assert job.state == "COMPLETED", job.logs()
    assert job.fields()["Restarts"] == "1"
    assert f"resumed from step {stopped} of runs/broken" in job.logs()

    run(command("pretrain.py", ZERO2, {**settings, "run_root": str(tmp_path / "runs"), "run_name": "straight"}, 2))
    straight = tmp_path / "runs" / "straight"  # by the deepspeed launcher, without Slurm
    assert losses(broken) == losses(straight)
    assert same_bits(checkpoint(broken, steps), checkpoint(straight, steps))


def test_a_cancelled_job_saves(tiny_settings, tmp_path, submit):
    settings = {**tiny_settings, "run_name": "r", "train.max_steps": 100_000, "checkpoint.every": 0,
                "validation.every": 0}  # fmt: skip
    job = submit("pretrain.sbatch", ["demo", *words(settings)], "--time=30")
    job.wait_until(lambda: len(metrics(tmp_path / "runs" / "r")) >= 3)
    output("scancel", job.id)
    assert job.wait() == "CANCELLED"
    job.wait_until(lambda: "saved" in job.logs())
    steps = len(losses(tmp_path / "runs" / "r"))
    assert checkpoint(tmp_path / "runs" / "r", steps)
    # Slurm tells the ranks TERM (15), supervise.sh tells them USR1 (10): either comes first.
    assert re.search(rf"stopped by signal (15|10) after step {steps};", job.logs())


def test_pretraining_then_fine_tuning(tiny_settings, tiny_data, tmp_path, submit):
    first = submit("pretrain.sbatch", ["demo", *words({**tiny_settings, "run_name": "base"})])
    model = [key for key in tiny_settings if key.startswith(("model.", "data."))]
    settings = {key: value for key, value in tiny_settings.items() if key not in model}
    settings |= {"model.init_from": "base", "run_name": "chat", "train.max_steps": 4, "data.seq_len": 64}
    settings |= {"data.train": tiny_data["chat.train"], "data.validation": tiny_data["chat.validation"],
                 "data.cache_dir": tiny_data["data.cache_dir"]}  # fmt: skip
    second = submit("sft.sbatch", ["sft-demo", *words(settings)], f"--dependency=afterok:{first.id}")
    assert first.wait() == "COMPLETED", first.logs()
    assert second.wait() == "COMPLETED", second.logs()
    assert len(losses(tmp_path / "runs" / "base")) == 12 and len(losses(tmp_path / "runs" / "chat")) == 4
    names = {path.name for path in (tmp_path / "slurm-logs" / f"minillm-sft-{second.id}").iterdir()}
    assert names == {"rank-0.log", "rank-1.log"}


def test_a_sweep_runs_each_line(tiny_settings, tmp_path, submit):
    lines = tmp_path / "lines.txt"
    lines.write_text("# two runs\n\noptim.learning_rate=1e-3\noptim.learning_rate=2e-3 run_name='mine'\n")
    arguments = ["demo", str(lines), *words({**tiny_settings, "train.max_steps": 4})]
    job = submit("sweep.sbatch", arguments, "--array=1-2", GPUS="1")
    job.wait_until(lambda: job.id not in output("squeue", "-h", "-o", "%F"))
    for name, rate in (("demo-sweep-1", 1e-3), ("mine", 2e-3)):
        folder = tmp_path / "runs" / name
        assert len(losses(folder)) == 4, job.logs()
        assert yaml.safe_load((folder / "run.yaml").read_text())["optim"]["learning_rate"] == rate


def test_a_configuration_error_fails_the_job_at_once(tiny_settings, submit):
    job = submit("pretrain.sbatch", ["demo", *words(tiny_settings), "optim.learning_rat=1"])
    assert job.wait() == "FAILED"
    assert job.fields()["ExitCode"] == "2:0"
    assert "did you mean `learning_rate`" in job.logs() and "restart 1" not in job.logs()


def test_two_nodes_train_one_run(two_nodes, tiny_settings, tmp_path, submit):
    """One rank on each of two nodes, the curve of two ranks on one."""
    one_gpu = ("--gres=gpu:1", "--ntasks-per-node=1")
    job = submit("multinode.sbatch", ["demo", *words({**tiny_settings, "run_name": "nodes"})], *one_gpu, GPUS="1")
    assert job.wait() == "COMPLETED", job.logs()
    assert job.fields()["NodeList"] == "n[1-2]"
    run(command("pretrain.py", ZERO2, {**tiny_settings, "run_root": str(tmp_path / "runs"), "run_name": "one"}, 2))
    assert losses(tmp_path / "runs" / "nodes") == losses(tmp_path / "runs" / "one")
