"""kill -9 of a rank or of everything, at every phase of a save, a step, a start and the data, and at random moments.

Contract: tests/faults/kills.py says what is checked after each kill and at the end of each run. The runs are the real
commands; a wrapper sets the trap (tests/faults/kill_at.py), resuming is the same command.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import closing

import pytest

from tests.faults import places as p
from tests.faults.kills import (
    KINDS,
    Broken,
    clean,
    random_moments,
    run_chain,
    unbroken,
    victim_of,
    whole_lines,
)
from tests.support.launching import TIMEOUT, losses
from tests.support.processes import wait_until_alone

pytestmark = pytest.mark.faults
SYNCHRONOUS, ASYNCHRONOUS = {"checkpoint.asynchronous": False}, {"checkpoint.asynchronous": True}


@pytest.fixture(scope="session")
def unbroken_runs(tiny_settings, tmp_path_factory):
    """kind -> its unbroken run, made when it is first asked for."""
    found = {}

    def of(name: str):
        if name not in found:
            found[name] = unbroken(KINDS[name], tiny_settings, tmp_path_factory.mktemp(f"unbroken-{name}"))
        return found[name]

    return of


START, SAVE, BACK, STEP = "the first start", "a save", "a save in the background", "a step"
RESUME = "a resume and the end"
CHAINS = {
    "two-start": ("two", SYNCHRONOUS, START, [
        p.TOKENIZING, p.TOKENS_WHOLE, p.LOCKED, p.WARM_UP.on(1), p.FIRST_STEP, p.FIRST_SAVE.all(),
    ]),
    "one-start": ("one", SYNCHRONOUS, START, [
        p.TOKENS_HALF, p.TOKENS_PUBLISHED, p.SETTINGS, p.SETTINGS_LEFT, p.FIRST_VALIDATION,
    ]),
    "one-save": ("one", SYNCHRONOUS, SAVE, [
        p.GENERATORS, p.EMPTY, p.TOKENIZER, p.COUNTERS, p.RNG, p.UNSYNCED, p.UNLISTED, p.LISTED, p.SYNCING,
        p.LEFTOVER, p.OLD_RENAMED, p.OLD_HALF, p.PRUNED, p.REPLACING,
    ]),
    "two-save": ("two", SYNCHRONOUS, SAVE, [
        p.BEFORE_SAVE.on(1), p.GATHER_WEIGHTS.on(1), p.GATHER_MOMENTS.all(), p.HALF_WEIGHTS, p.HALF_MOMENTS.all(),
        p.BEFORE_RENAME.all(), p.AFTER_RENAME, p.PUBLISHED.all(), p.AGREEING.on(1),
    ]),
    "two-back": ("two", ASYNCHRONOUS, BACK, [
        p.BACKGROUND.all(), p.HALF_WEIGHTS.after(1), p.HALF_MOMENTS.after(1).all(), p.MANIFEST.all(), p.BEFORE_RENAME,
        p.AFTER_RENAME.all(), p.OLD_RENAMED.all(), p.SAVED.on(1),
    ]),
    "two-step": ("two", ASYNCHRONOUS, STEP, [
        p.MICRO_STEPS.on(1), p.BEFORE_UPDATE, p.IN_UPDATE.on(1), p.AFTER_UPDATE.all(), p.AGREEING_LOSS, p.LOGGING,
        p.LOADER.on(1), p.BATCH.all(), p.VALIDATING.on(1),
    ]),
    "one-step": ("one", ASYNCHRONOUS, STEP, [p.ROWS, p.MICRO_STEPS, p.IN_UPDATE, p.LOGGING]),
    "one-resume": ("one", ASYNCHRONOUS, RESUME, [p.SAVED, p.RNG_LEFT, p.CUTTING, p.STARTED, p.CONCLUDING]),
    "two-resume": ("two", SYNCHRONOUS, RESUME, [p.SAVED.all(), p.WEIGHTS_LOADED.on(1), p.RESTORING, p.DRAWING]),
    "zero3": ("zero3", ASYNCHRONOUS, "ZeRO-3", [
        p.GATHER_MOMENTS.on(1), p.HALF_WEIGHTS.all(), p.MICRO_STEPS, p.IN_UPDATE.all(), p.AFTER_RENAME,
        p.RESTORING.all(),
    ]),
    "experts": ("experts", ASYNCHRONOUS, "experts", [
        p.GATHER_EXPERTS.on(1), p.BEFORE_BALANCE.all(), p.AFTER_BALANCE, p.LOGGING_EXPERTS.all(),
        p.HALF_MOMENTS.after(1).all(), p.RESTORING.all(),
    ]),
    "autoep": ("autoep", SYNCHRONOUS, "experts", [p.GATHER_EXPERTS, p.IN_UPDATE.on(1), p.HALF_WEIGHTS.all()]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_kills_at_named_places(name, tiny_settings, tmp_path, unbroken_runs, fault_table):
    kind, changes, section, places = CHAINS[name]
    with closing(Broken(KINDS[kind], tiny_settings, tmp_path, unbroken_runs(kind), **changes)) as broken:
        run_chain(broken, places, fault_table, f"kill -9 at named places: {section}")
    clean(tmp_path)


RANDOM = {  # name -> kind, settings, seed, moments; 15 in all
    "two": ("two", ASYNCHRONOUS, 20, 4),
    "two-synchronous": ("two", SYNCHRONOUS, 21, 3),
    "zero3": ("zero3", ASYNCHRONOUS, 22, 3),
    "experts": ("experts", ASYNCHRONOUS, 26, 3),
    "one": ("one", ASYNCHRONOUS, 15, 2),
}


@pytest.mark.parametrize("name", RANDOM)
def test_kills_at_random_moments(name, tiny_settings, tmp_path, unbroken_runs, fault_table):
    kind, changes, seed, count = RANDOM[name]
    with closing(Broken(KINDS[kind], tiny_settings, tmp_path, unbroken_runs(kind), **changes)) as broken:
        for moment in random_moments(seed, count, KINDS[kind].ranks):
            broken.kill_after(*moment)
        broken.tell(fault_table, f"kill -9 at random moments, seed {seed}")
    clean(tmp_path)


@pytest.mark.parametrize("starting", [True, False], ids=["start-up", "training"])
@pytest.mark.parametrize("victim", ["command", "launcher"])
def test_nothing_trains_on_as_an_orphan(victim, starting, tiny_settings, tmp_path, fault_table):
    """A run without end, whose `deepspeed` command or launch.py is killed: the ranks save and leave."""
    endless = {"train.max_steps": 100_000, "checkpoint.every": 0, "validation.every": 0}
    with closing(Broken(KINDS["two"], tiny_settings, tmp_path, (tmp_path, 0), **endless)) as broken:
        process = broken.start(broken.words)
        deadline = time.monotonic() + TIMEOUT
        while not (victim_of(process, "1") if starting else broken.started_events()):
            assert process.poll() is None and time.monotonic() < deadline, broken.log()
            time.sleep(0.01)
        time.sleep(2)
        os.kill(victim_of(process, victim), signal.SIGKILL)
        process.wait(timeout=TIMEOUT)
        seconds = wait_until_alone(process, broken.log)
    events = [json.loads(line) for line in whole_lines(broken.folder / "events.jsonl")]
    assert events[-1]["event"] == "stopped", broken.log()
    done = len(losses(broken.folder))
    assert events[-1]["step"] == done and (not done or (broken.folder / f"checkpoints/step-{done:06d}").is_dir())
    name = "the deepspeed command" if victim == "command" else "its launch.py"
    fault_table.row(
        "the launcher dies", f"{name}, {'while the ranks import torch' if starting else 'while they train'}",
        f"the ranks saved {f'step {done} ' if done else 'nothing, there was no step, '}and left within {seconds:.0f} s",
    )  # fmt: skip
