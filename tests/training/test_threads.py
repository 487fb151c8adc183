"""The number of threads: measured, written down before it is used, followed on resume to the same bits.

Time and speed are the test's own here (the code takes both as arguments); the last tests train.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from minillm.run_folder import RunFolder
from minillm.training import loop, threads
from minillm.training.threads import ThreadCount, product_seconds
from minillm.utils import distributed
from minillm.utils.errors import UserError
from tests.support.in_process import train
from tests.support.launching import checkpoint, losses, same_bits


class Machine:
    """Eight cores' worth of threads; `seconds` of the work by number of threads, and a clock."""

    def __init__(self):
        self.seconds = {8: 1.0, 7: 1.1, 4: 1.9, 2: 1.0, 1: 1.9}
        self.asked_for: list[list[int]] = []
        self.now = 0.0
        self.steps: list[float] = []  # seconds of each

    def measure(self, numbers: list[int]) -> list[float]:
        self.asked_for.append(numbers)
        return [self.seconds[number] for number in numbers]

    def clock(self) -> float:
        return self.now


@pytest.fixture
def machine(monkeypatch) -> Machine:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(distributed, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(distributed, "num_cores", lambda: 8)
    yield Machine()
    torch.set_num_threads(before)


@pytest.fixture
def start(machine, tmp_path):
    def start_at(step: int = 0) -> ThreadCount:
        return ThreadCount(RunFolder(tmp_path), step, machine.measure, machine.clock)

    return start_at


@pytest.fixture
def entries(tmp_path):
    return lambda: [tuple(entry.values()) for entry in json.loads((tmp_path / "threads.json").read_text())]


def go(count: ThreadCount, machine: Machine, first: int, last: int, seconds: float) -> list[int]:
    """Steps first .. last - 1, so long each; the number of threads of each."""
    used = []
    for step in range(first, last):
        count.begin_step(step, count.doubt(step, machine.steps))
        used.append(torch.get_num_threads())
        machine.steps.append(seconds)
        machine.now += seconds
    return used


def test_a_quiet_machine_uses_all_its_threads(start, machine, entries):
    machine.seconds[7] = 0.9  # chance: less than GAIN
    count = start()
    assert machine.asked_for == [[8, 7, 4]]
    assert entries() == [(0, 1, 8)]
    assert set(go(count, machine, 0, 500, 1.0)) == {8}
    assert len(machine.asked_for) == 1


def test_fewer_where_they_are_faster_and_more_again_when_they_are_not(start, machine, entries):
    machine.seconds |= {8: 9.0, 7: 2.0, 4: 2.2}
    count = start()
    assert go(count, machine, 0, 100, 1.0) == [7] * 100
    assert machine.asked_for == [[8, 7, 4]] * 2  # once at the start, once a minute
    machine.seconds |= {8: 1.0, 7: 1.1, 4: 1.9}
    assert go(count, machine, 100, 200, 1.0) == [7] * 20 + [8] * 80
    assert entries() == [(0, 1, 7), (120, 1, 8)]


def test_steps_that_became_much_slower_are_a_reason_to_measure(start, machine, entries):
    count = start()
    go(count, machine, 0, 100, 1.0)
    machine.seconds |= {8: 9.0, 7: 1.5}
    assert go(count, machine, 100, 150, 1.4) == [8] * 50  # not much slower
    used = go(count, machine, 150, 200, 1.6)
    assert used == [8] * 3 + [7] * 47  # the median of five
    assert entries() == [(0, 1, 8), (153, 1, 7)]


def test_what_stays_slow_is_not_measured_again_and_again(start, machine):
    count = start()
    go(count, machine, 0, 100, 1.0)
    go(count, machine, 100, 1000, 3.0)
    assert len(machine.asked_for) == 2


def test_two_measurements_are_a_minute_apart(start, machine):
    count = start()
    go(count, machine, 0, 30, 0.1)
    go(count, machine, 30, 120, 0.6)
    assert machine.now < 60
    assert len(machine.asked_for) == 1


def test_a_start_follows_what_is_written_and_only_then_measures(start, machine, entries):
    count = start()
    go(count, machine, 0, 100, 1.0)
    machine.seconds |= {8: 9.0, 7: 1.5}
    go(count, machine, 100, 160, 2.0)
    assert entries() == [(0, 1, 8), (103, 1, 7)]
    asked = len(machine.asked_for)

    again = start(60)  # the checkpoint's step
    assert go(again, machine, 60, 108, 50.0) == [8] * 43 + [7] * 5
    assert len(machine.asked_for) == asked
    assert go(again, machine, 108, 120, 50.0) == [7] * 12
    assert len(machine.asked_for) > asked
    assert torch.get_num_threads() == 7
    assert start(130) and torch.get_num_threads() == 7


def test_another_number_of_ranks_is_another_run_of_bits(start, machine, tmp_path, entries):
    written = [{"step": 0, "ranks": 4, "threads": 2}, {"step": 50, "ranks": 4, "threads": 1}]
    (tmp_path / "threads.json").write_text(json.dumps(written))
    start(20)
    assert entries() == [(0, 4, 2), (20, 1, 8)]


def test_a_number_that_this_machine_does_not_have_is_measured_again(start, tmp_path, entries):
    (tmp_path / "threads.json").write_text(json.dumps([{"step": 0, "ranks": 1, "threads": 64}]))
    start(20)
    assert entries() == [(0, 1, 64), (20, 1, 8)]


def test_the_users_number_is_used_and_never_measured(start, machine, entries, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    count = start()
    assert set(go(count, machine, 0, 50, 1.0) + go(count, machine, 50, 200, 5.0)) == {2}
    assert entries() == [(0, 1, 2)]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    start(200)
    assert torch.get_num_threads() == 3
    assert entries() == [(0, 1, 2), (200, 1, 3)]
    monkeypatch.delenv("OMP_NUM_THREADS")
    start(220)
    assert torch.get_num_threads() == 3
    assert machine.asked_for == []


def test_one_core_is_nothing_to_measure(start, machine, entries, monkeypatch):
    monkeypatch.setattr(distributed, "num_cores", lambda: 1)
    go(start(), machine, 0, 300, 1.0)
    assert machine.asked_for == [] and entries() == [(0, 1, 1)]


def test_ranks_of_one_machine_share_its_cores(start, machine, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    start()
    assert machine.asked_for == [[2, 1]]


def test_a_gpu_is_left_alone(start, machine, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(distributed, "default_device", lambda: torch.device("cuda", 0))
    count = start()
    for step in range(100):
        assert not count.doubt(step, [1.0] * 50 + [9.0] * 50)
        count.begin_step(step, False)
    assert machine.asked_for == [] and not (tmp_path / "threads.json").exists()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "text", ['{"a": 1}', '[{"step": 0}]', "[[0, 1, 2]]", '[{"step": 0, "ranks": 1, "threads": 0}]', "[7]"]
)
def test_a_damaged_file_is_named(text, start, tmp_path):
    (tmp_path / "threads.json").write_text(text)
    with pytest.raises(UserError, match="threads.json.*move it away"):
        start()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measurement_takes_half_a_second_and_leaves_no_trace(dtype, machine):
    torch.set_num_threads(2)
    generator = torch.get_rng_state()
    found = product_seconds(4096, 4096, 16384, dtype)([2, 1])
    assert len(found) == 2 and all(0 < seconds < 1 for seconds in found)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), generator)


class Restless:
    """A measurement that finds the other number of threads best, each time, the second the first time."""

    def __init__(self):
        self.times = 0

    def __call__(self, numbers: list[int]) -> list[float]:
        self.times += 1
        return [1.0, 2.0] if self.times % 2 == 0 else [2.0, 1.0]


@pytest.mark.usefixtures("group")
def test_a_resumed_run_changes_its_threads_where_it_did_and_comes_to_the_same_bits(settings, tmp_path, monkeypatch):
    """Changes after steps 0, 5 and 10 of 12; resumed from step 4, 8 and 12's weights compared."""
    settings = {**settings, "model.intermediate_size": 2048, "train.max_steps": 12,  # long sums, cut by threads
                "checkpoint.every": 4, "checkpoint.keep": 9}  # fmt: skip
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(distributed, "num_cores", lambda: 2)
    monkeypatch.setattr(threads, "SECONDS_BETWEEN_MEASUREMENTS", 0.0)
    monkeypatch.setattr(threads, "MUCH_SLOWER", 0.0)
    machine = Restless()
    monkeypatch.setattr(loop, "product_seconds", lambda *arguments: machine)
    try:
        train(settings)
        first = tmp_path / "r"
        written = json.loads((first / "threads.json").read_text())
        assert [(e["step"], e["threads"]) for e in written] == [(0, 1), (5, 2), (10, 1)]
        expected, curve = checkpoint(first, 12), losses(first)
        for step in (8, 12):
            shutil.rmtree(first / "checkpoints" / f"step-{step:06d}")

        times = machine.times
        train(settings)
        assert machine.times == times  # nothing is measured where there is something to follow
        assert losses(first) == curve
        assert same_bits(checkpoint(first, 12), expected)

        (first / "threads.json").unlink()
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        for step in (8, 12):
            shutil.rmtree(first / "checkpoints" / f"step-{step:06d}")
        train(settings)
        different = not same_bits(checkpoint(first, 12), expected)
    finally:
        torch.set_num_threads(before)
    if not different:
        pytest.skip("on this processor the number of threads changes no bit of this run: nothing was shown")
