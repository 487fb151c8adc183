"""A real run that is killed again and again, each time resumed by the same command, held against the unbroken run.

Contract: after every kill nothing of the run is alive any more, every published checkpoint is whole and equal to the
unbroken run's of the same step to the last bit (weights, moments, generators, counters), and the newest one is no older
than before the kill; the next start resumes from it. At the end the records and the last checkpoint are equal too.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minillm.run_folder import RunFolder
from minillm.utils.files import manifest_problems
from tests.faults.places import Place
from tests.support.launching import ROOT, TIMEOUT, checkpoint, command, environment, losses, run, same_bits
from tests.support.processes import session_of, wait_until_alone

WRAPPER = ROOT / "tests" / "faults" / "kill_at.py"
STEPS = 72
EVERY = 3
LAUNCHERS = {"command": b"deepspeed.launcher.runner", "launcher": b"deepspeed.launcher.launch"}  # parent, child


@dataclass(frozen=True)
class Kind:
    """A configuration that has one unbroken run."""

    title: str
    ranks: int
    json_name: str
    config: str = "demo"
    settings: dict[str, object] = field(default_factory=dict, hash=False)


EXPERTS = {
    "model.moe_intermediate_size": 48, "model.mlp_layer_types": ["sparse", "sparse"], "model.router_type": "sigmoid",
    "model.num_experts": 4, "model.router_noise": "none", "model.router_bias_update_speed": 0.01,
}  # fmt: skip
KINDS = {
    "one": Kind("1 rank, ZeRO-2", 1, "zero2.json"),
    "two": Kind("2 ranks, ZeRO-2", 2, "zero2.json"),
    "zero3": Kind("2 ranks, ZeRO-3", 2, "zero3.json"),
    "experts": Kind("2 ranks, experts by DeepSpeed, ZeRO-2", 2, "moe_zero2.json", "moe-demo", EXPERTS),
    "autoep": Kind("2 ranks, experts by AutoEP, ZeRO-3", 2, "moe_zero3.json", "moe-demo", EXPERTS),
}


def settings_of(kind: Kind, tiny_settings: dict, root: Path, name: str, **changes: object) -> dict[str, object]:
    own = {
        "run_root": str(root), "run_name": name, "data.cache_dir": str(root / f"{name}-cache"),
        "train.max_steps": STEPS, "train.train_micro_batch_size_per_gpu": 4 // kind.ranks, "model.hidden_dropout": 0.1,
        "validation.every": 3 * EVERY, "checkpoint.every": EVERY, "checkpoint.keep": 2,
    }  # fmt: skip
    return {**tiny_settings, **kind.settings, **own, **changes}


def unbroken(kind: Kind, tiny_settings: dict, root: Path) -> tuple[Path, float]:
    """The run that nobody disturbs, with a checkpoint of every step, and the seconds from its start to its first."""
    every_step = {"checkpoint.keep": STEPS, "checkpoint.every": 1}
    settings = settings_of(kind, tiny_settings, root, "unbroken", **every_step)
    start = time.time()
    run(command("pretrain.py", ROOT / "ds_configs" / kind.json_name, settings, kind.ranks, kind.config))
    assert len(losses(root / "unbroken")) == STEPS
    first = root / "unbroken" / "checkpoints" / "step-000001" / "manifest.json"
    return root / "unbroken", first.stat().st_mtime - start


class Broken:
    """One run folder, its kills and its table rows; `close` leaves no process behind."""

    def __init__(self, kind: Kind, tiny_settings: dict, root: Path, reference: tuple[Path, float], **changes: object):
        self.kind, self.root, self.folder = kind, root, root / "broken"
        self.reference, self.startup = reference
        settings = settings_of(kind, tiny_settings, root, "broken", **changes)
        self.words = command("pretrain.py", ROOT / "ds_configs" / kind.json_name, settings, kind.ranks, kind.config)
        self.process: subprocess.Popen | None = None
        self.starts = 0
        self.newest = 0
        self.rows: list[tuple[str, str]] = []  # what was done, what was left

    def kill_at(self, place: Place) -> None:
        """Start, let the trap of `place` kill, and look at what is left."""
        damaged = self.damage() if place.damage else None
        marker = self.root / f"marker-{self.starts}"
        spec = {**asdict(place), "marker": str(marker)}
        real = str(ROOT / "launch" / "pretrain.py")
        process = self.start([str(WRAPPER) if word == real else word for word in self.words], spec)
        code, log = process.wait(timeout=TIMEOUT), self.log()
        assert marker.exists(), f"{place} was never reached, exit {code}:\n{log}"
        assert code == -signal.SIGKILL if place.victim == "all" else code != 0, f"{place}: exit {code}\n{log}"
        killed_at = marker.stat().st_mtime + place.delay
        self.examine(str(place), process, None if place.victim == "all" else killed_at, damaged)

    def kill_after(self, steps: int | None, part: float, victim: str) -> None:
        """Start the real command, and kill in the middle.

        Args:
            steps: so many steps of this start are logged first; None: in the start-up.
            part: of the time that a start-up takes; of a tenth of a second after those steps.
            victim: all, launcher, or a rank's number. A process that is not there yet stands for all.
        """
        starts = self.started_events()
        process = self.start(self.words)
        deadline = time.monotonic() + TIMEOUT

        def is_training() -> bool:
            logged = [r for r in metrics_so_far(self.folder) if "loss" in r and r["step"] > self.newest]
            return self.started_events() > starts and len(logged) >= steps

        while steps is not None and not is_training():
            assert process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.005)
        seconds = part * (self.startup if steps is None else 0.1)
        time.sleep(seconds)
        assert process.poll() is None, f"it ended before the kill:\n{self.log()}"
        found = victim_of(process, victim)
        who = {"all": "everything", "launcher": "the launcher"}.get(victim, f"rank {victim}")
        if found is None:
            os.killpg(process.pid, signal.SIGKILL)
            who = who if victim == "all" else f"everything ({who} was not there yet)"
        else:
            os.kill(found, signal.SIGKILL)
        killed_at = time.time() if found else None
        process.wait(timeout=TIMEOUT)
        after = "its start" if steps is None else f"{steps} steps of this start"
        self.examine(f"{who}: {seconds:.2f} s after {after}", process, killed_at)

    def started_events(self) -> int:
        """How often this run has begun or resumed training."""
        path = self.folder / "events.jsonl"
        return sum(json.loads(line)["event"] == "started" for line in whole_lines(path)) if path.exists() else 0

    def start(self, words: list[str], spec: dict | None = None) -> subprocess.Popen:
        self.starts += 1
        self.started = time.monotonic()
        own = {"MINILLM_KILL": json.dumps(spec)} if spec else {}
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(words, cwd=ROOT, env={**environment(self.kind.ranks), **own}, stdout=log,
                                            stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        return self.process

    def close(self) -> None:
        """Kill what a failed case has left running."""
        if self.process is not None and session_of(self.process):
            os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def log_path(self) -> Path:
        return self.root / f"start-{self.starts}.log"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def damage(self) -> Path:
        """Flip a bit of the newest checkpoint's weights."""
        newest = RunFolder(self.folder).checkpoints()[0].path
        with open(newest / "model.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        self.newest = RunFolder(self.folder).checkpoints()[1].step
        return newest

    def examine(
        self, what: str, process: subprocess.Popen, killed_at: float | None, damaged: Path | None = None
    ) -> None:
        """The contract after a kill; `killed_at`: when, where not everything was killed at once."""
        wait_until_alone(process, self.log)
        seconds = 0.0 if killed_at is None or self.kind.ranks == 1 else time.time() - killed_at
        self.check_resumed()
        before = self.newest
        folders = [one.path for one in RunFolder(self.folder).checkpoints() if one.path != damaged]
        for folder in folders:
            assert manifest_problems(folder) == [], what
            self.check_equal(folder, what)
        whole = [int(folder.name.removeprefix("step-")) for folder in folders]
        self.newest = max(whole, default=0)
        assert self.newest >= before, f"{what}: step {before} is lost, there are {whole}"
        if whole and damaged is None:  # the best may have been the damaged one
            best = read_counters(self.folder, self.newest)["best_step"]
            assert best is None or best in whole, f"{what}: the best, step {best}, is lost, there are {whole}"
        left = f"step {self.newest} is the newest whole checkpoint" if whole else "no checkpoint yet"
        others = f"; the others left within {max(1, seconds):.0f} s" if seconds else ""
        self.rows.append((what, f"{left}{others}"))
        print(f"{time.monotonic() - self.started:5.1f} s  {what}: {left}{others}")

    def check_resumed(self) -> None:
        """This start, where it came so far, went on from what the kill before it had left."""
        log = self.log()
        if "[minillm] resumed from step" in log:
            assert f"[minillm] resumed from step {self.newest} of" in log, log
        else:
            assert self.newest == 0 or "[minillm] fresh start" not in log, log

    def check_equal(self, folder: Path, what: str) -> None:
        step = int(folder.name.removeprefix("step-"))
        where = f"{what}: step {step} differs"
        assert same_bits(checkpoint(self.folder, step), checkpoint(self.reference, step)), where
        twin = self.reference / "checkpoints" / folder.name
        assert (folder / "rng.json").read_text() == (twin / "rng.json").read_text(), where
        assert read_counters(self.folder, step) == read_counters(self.reference, step), where

    def finish(self) -> None:
        """The real command, once more, to its end; everything is equal."""
        process = self.start(self.words)
        assert process.wait(timeout=TIMEOUT) == 0, self.log()
        wait_until_alone(process, self.log)
        print(f"{time.monotonic() - self.started:5.1f} s  to the end")
        if "is complete" not in self.log():
            self.check_resumed()
        assert self.records() == self.records(self.reference)
        self.check_equal(self.folder / "checkpoints" / f"step-{STEPS:06d}", "the end")
        assert losses(self.folder) == losses(self.reference)
        self.check_events()
        rubbish = [path.name for path in self.folder.rglob("*") if path.name.endswith((".tmp", ".deleted"))]
        assert not rubbish, rubbish

    def check_events(self) -> None:
        """events.jsonl is never cut back: a line that a kill cut short spoils no other."""
        path = self.folder / "events.jsonl"
        assert "finished" in [json.loads(line)["event"] for line in whole_lines(path)]
        assert all(line.count('{"time"') <= 1 for line in path.read_text().splitlines()), path.read_text()

    def records(self, folder: Path | None = None) -> dict[str, list[dict]]:
        """What the run logged that does not depend on the clock."""
        folder = folder or self.folder
        kept = ("step", "loss", "lr", "grad_norm", "tokens", "val_loss", "val_ppl", "val_bpb", "layers", "share",
                "entropy")  # fmt: skip
        return {
            name: [{key: record[key] for key in kept if key in record} for record in map(json.loads, whole_lines(path))]
            for name in ("metrics.jsonl", "experts.jsonl")
            if (path := folder / name).exists()
        }

    def tell(self, table, section: str) -> None:
        """One row a kill; called when the run was held against the unbroken one."""
        self.finish()
        for what, left in self.rows:
            table.row(section, f"{self.kind.title}. {what}", f"{left}; resumed, every bit equal to the end")


def run_chain(broken: Broken, places: list[Place], table, section: str) -> None:
    """Kill at one place after the other in one run, and hold its end against the unbroken run."""
    for place in places:
        broken.kill_at(place)
    broken.tell(table, section)


def random_moments(seed: int, count: int, ranks: int) -> list[tuple[int | None, float, str]]:
    """Arguments of `kill_after`: a third of them in the start-up, the others while it trains."""
    draw = random.Random(seed)
    victims = ["all", "launcher", *map(str, range(ranks))] if ranks > 1 else ["all"]
    return [
        (None if draw.random() < 1 / 3 else draw.randrange(1, 12), draw.random(), draw.choice(victims))
        for _ in range(count)
    ]


def read_counters(folder: Path, step: int) -> dict[str, object]:
    values = json.loads((folder / "checkpoints" / f"step-{step:06d}" / "trainer_state.json").read_text())
    return {key: value for key, value in values["state"].items() if key != "train_seconds"}


def whole_lines(path: Path) -> list[str]:
    """The lines that parse; a kill may leave half a line in a log that is only appended to."""
    lines = []
    for line in path.read_text(errors="replace").split("\n"):
        try:
            json.loads(line)
        except ValueError:
            continue
        lines.append(line)
    return lines


def metrics_so_far(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in whole_lines(path)] if path.exists() else []


def victim_of(process: subprocess.Popen, victim: str) -> int | None:
    """The process to kill; None for all, or where it is not there yet."""
    if victim == "all":
        return None
    for pid in session_of(process):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        is_launcher = LAUNCHERS["launcher"] in words
        if victim in LAUNCHERS:
            found = LAUNCHERS[victim] in words
        else:
            found = not is_launcher and f"RANK={victim}".encode() in variables
        if found:
            return pid
    return None


def clean(root: Path) -> None:
    """Drop what a passed case has left on disk."""
    shutil.rmtree(root, ignore_errors=True)
