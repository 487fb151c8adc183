"""launch/supervise.sh around real ranks under the deepspeed launcher: signals reach the ranks, failures are restarted,
and nothing is left behind. Commands without ranks stand in only where no rank would be reached."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.launching import ROOT, TIMEOUT, checkpoint, command, environment, losses, metrics, run, same_bits

SUPERVISE = str(ROOT / "launch" / "supervise.sh")
ZERO2 = ROOT / "ds_configs" / "zero2.json"


class Supervised:
    """A started supervise.sh; what it and its command print is in `log`."""

    def __init__(self, words: list[str], folder: Path, restarts: int = 0):
        self.path = folder / "supervise.log"
        with open(self.path, "w") as file:
            self.process = subprocess.Popen(
                [SUPERVISE, "--restarts", str(restarts), "--", *words],
                cwd=folder, env={**environment(ranks=2), "SUPERVISE_PAUSE": "1"}, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self.path.read_text()

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.005)

    def wait(self) -> int:
        return self.process.wait(timeout=TIMEOUT)


def processes(*parts: str) -> dict[int, str]:
    """pid -> command line of the living processes whose command line has all `parts`."""
    listed = subprocess.run(["ps", "-ewwo", "pid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return {int(row[0]): row[2] for row in rows
            if len(row) == 3 and row[1][0] != "Z" and all(part in row[2] for part in parts)}  # fmt: skip


def launched(settings: dict[str, object], **changes: object) -> list[str]:
    return command("pretrain.py", ZERO2, {**settings, **changes}, ranks=2)


@pytest.fixture
def endless(tiny_settings, tmp_path) -> dict[str, object]:
    """A run that saves only when it is told to leave."""
    return {**tiny_settings, "run_root": str(tmp_path), "run_name": "r", "train.max_steps": 100_000,
            "checkpoint.every": 0, "validation.every": 0}  # fmt: skip


@pytest.mark.parametrize(
    "number",
    [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
     pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_signal_to_it_makes_the_ranks_save_and_leave(endless, tmp_path, number):
    started = Supervised(launched(endless), tmp_path, restarts=3)
    started.wait_until(lambda: len(metrics(tmp_path / "r")) >= 3)
    started.process.send_signal(number)
    assert started.wait() == 128 + number, started.log
    assert checkpoint(tmp_path / "r", len(losses(tmp_path / "r")))  # of the last finished step
    assert "restart" not in started.log and "the ranks saved and left" in started.log
    assert not processes(str(tmp_path))


@pytest.mark.slow
def test_ranks_save_and_leave_when_it_is_killed(endless, tmp_path):
    started = Supervised(launched(endless), tmp_path)
    started.wait_until(lambda: len(metrics(tmp_path / "r")) >= 3)
    started.process.kill()
    deadline = time.monotonic() + TIMEOUT
    while processes(str(tmp_path)):
        assert time.monotonic() < deadline, started.log
        time.sleep(0.2)
    assert checkpoint(tmp_path / "r", len(losses(tmp_path / "r")))


STEPS = 30  # checkpoints are at 5, 10 ...


def killed_and_straight(settings: dict[str, object], folder: Path, *parts: str) -> Supervised:
    """A supervised run in which one process is killed after step 12, and an unbroken run, to compare with."""
    settings = {**settings, "run_root": str(folder), "train.max_steps": STEPS, "checkpoint.every": 5}
    started = Supervised(launched(settings, run_name="broken"), folder, restarts=2)
    started.wait_until(lambda: len([r for r in metrics(folder / "broken") if "loss" in r]) >= 12)
    (victim,) = processes("run_name=broken", *parts)
    os.kill(victim, signal.SIGKILL)
    assert started.wait() == 0, started.log
    run(launched(settings, run_name="straight"))
    assert losses(folder / "broken") == losses(folder / "straight")
    assert same_bits(checkpoint(folder / "broken", STEPS), checkpoint(folder / "straight", STEPS))
    assert started.log.count("restart 1 of 2") == 1 and "restart 2 of 2" not in started.log
    assert "resumed from step" in started.log
    assert not processes(str(folder))
    return started


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_the_curve_is_that_of_an_unbroken_run(tiny_settings, tmp_path):
    killed_and_straight(tiny_settings, tmp_path, "--local_rank=1")


@pytest.mark.slow
def test_a_killed_launcher_is_restarted_when_its_ranks_have_left(tiny_settings, tmp_path):
    """The deepspeed runner answers 0 to a launch.py that was killed, and the ranks are without parents."""
    killed_and_straight(tiny_settings, tmp_path, "-m deepspeed.launcher.launch")


def stand_in(code: str, folder: Path) -> list[str]:
    """A Python program with the words of a real start behind it, so that its run has a folder."""
    words = command("pretrain.py", ZERO2, {"run_root": str(folder), "run_name": "r"})
    return [sys.executable, "-c", code, *words[1:]]


def test_it_gives_up_when_two_starts_bring_no_newer_checkpoint(tmp_path):
    started = Supervised(stand_in("import sys; print('a start'); sys.exit(7)", tmp_path), tmp_path, restarts=9)
    assert started.wait() == 7
    assert started.log.count("a start") == 2
    assert "giving up" in started.log and "before step 0 none, after step 0 none" in started.log


def test_restarts_are_counted_while_there_is_progress(tmp_path):
    """Each start leaves a newer checkpoint behind and fails: only the number of restarts ends it."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from minillm.utils.files import write_manifest\n"
        "folder = Path('r/checkpoints'); step = 1 + len(list(folder.glob('*')))\n"
        "(folder / f'step-{step:06d}').mkdir(parents=True)\n"
        "write_manifest(folder / f'step-{step:06d}', {'format': 'minillm-checkpoint-1', 'step': step})\n"
        "sys.exit(7)"
    )
    words = stand_in(code, tmp_path)
    words.insert(3, str(ROOT))  # sys.argv[1]; the script's path follows
    words.insert(3, "-")
    started = Supervised(words, tmp_path, restarts=3)
    assert started.wait() == 7
    assert [started.log.count(f"restart {n} of 3 in") for n in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert "started again 3 of 3 times; the newest good checkpoint is step 4 " in started.log


def test_a_configuration_error_is_not_restarted(tmp_path):
    started = Supervised(command("pretrain.py", ZERO2, {"optim.learning_rat": 1}), tmp_path, restarts=3)
    assert started.wait() == 2
    assert started.log.count("did you mean") == 1 and "cannot mend" in started.log


def test_a_second_interrupt_kills(tmp_path):
    started = Supervised(stand_in("import time; print('up', flush=True); time.sleep(300)", tmp_path), tmp_path)
    started.wait_until(lambda: "up" in started.log)  # USR1 is ignored: it stands for ranks that never finish a step
    started.process.send_signal(signal.SIGINT)
    started.wait_until(lambda: "signal 2" in started.log)
    started.process.send_signal(signal.SIGINT)
    assert started.wait() == 128 + signal.SIGKILL
    assert "INT again" in started.log and not processes(str(tmp_path))


@pytest.mark.parametrize(
    "words, message",
    [([], "there is no command"), (["--restarts", "many", "--", "true"], "--restarts takes a number"),
     (["--again"], "`--again` is not an option"), (["--", "no-such-program"], "no-such-program: command not found")],
)  # fmt: skip
def test_a_mistake_on_its_command_line_is_one_line(words, message):
    done = subprocess.run([SUPERVISE, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_shell_scripts_are_clean():
    shellcheck = subprocess.run(["which", "shellcheck"], capture_output=True, text=True, check=False).stdout.strip()
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    scripts = [SUPERVISE, *map(str, sorted((ROOT / "launch" / "slurm").iterdir()))]
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
