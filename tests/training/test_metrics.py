"""The meter on a clock that the test moves: what is left and how fast it goes, of the last minute of steps."""

from __future__ import annotations

import pytest

from minillm.training.metrics import Meter, progress_line
from minillm.training.state import TrainState

STEPS = 2000


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock) -> Meter:
    return Meter(flops_per_token=2e9, peak=1e12, max_steps=STEPS, clock=clock)


def take(meter: Meter, clock: Clock, steps: int, seconds: float, tokens: int = 1000, between: float = 0.0) -> None:
    for _ in range(steps):
        meter.start_step()
        clock.now += seconds
        assert meter.end_step(tokens) == pytest.approx(seconds)
        clock.now += between


def test_left_is_right_a_minute_after_steps_became_slow(meter, clock):
    take(meter, clock, 400, 0.25)
    assert meter.seconds_left(400) == pytest.approx(1600 * 0.25)
    take(meter, clock, 20, 3.0)
    assert meter.seconds_left(420) == pytest.approx(1580 * 3.0)
    take(meter, clock, 241, 0.25)
    assert meter.seconds_left(661) == pytest.approx(1339 * 0.25)


def test_left_moves_at_once(meter, clock):
    """Half a minute of slow steps weighs as much as half a minute of quick ones: 10 and 120 steps."""
    take(meter, clock, 400, 0.25)
    take(meter, clock, 10, 3.0)
    assert meter.seconds_left(410) == pytest.approx(1590 * 60 / 130, rel=0.02)


def test_a_step_longer_than_the_minute_counts_alone(meter, clock):
    take(meter, clock, 50, 0.25)
    take(meter, clock, 1, 90.0)
    assert meter.seconds_left(51) == pytest.approx(1949 * 90.0)
    assert list(meter.recent_seconds) == pytest.approx([90.0])


def test_time_between_steps_counts_nowhere(meter, clock):
    """Validation, samples and saves of half a minute after each step."""
    take(meter, clock, 10, 2.0, between=30.0)
    assert meter.seconds_left(10) == pytest.approx(1990 * 2.0)
    assert meter.recent() == {"tokens_per_s": 500.0, "mfu": 1.0}


def test_a_step_that_was_left_out_counts_nowhere(meter, clock):
    meter.start_step()
    clock.now += 100
    take(meter, clock, 4, 2.0)
    assert meter.seconds_left(4) == pytest.approx(1996 * 2.0)


def test_nothing_is_known_before_the_first_step(meter):
    assert meter.seconds_left(0) == 0.0


def test_the_record_is_of_the_steps_since_the_last_one_and_the_line_of_the_last_minute(meter, clock):
    take(meter, clock, 30, 1.0)
    assert meter.read() == {"tokens_per_s": 1000.0, "mfu": 2.0}
    take(meter, clock, 1, 10.0)
    record = {"loss": 2.0, "lr": 1e-3, "grad_norm": 0.5, **meter.read()}
    assert record["tokens_per_s"] == 100.0
    line = progress_line(record, TrainState(step=31), meter)
    assert "775 tok/s" in line and "mfu 155%" in line, line  # 31,000 tokens in 40 seconds
    assert line.endswith("left 0:42:21")  # 1,969 steps of 40/31 seconds


def test_the_sums_stay_those_of_the_window(meter, clock):
    for number in range(5000):
        take(meter, clock, 1, 0.01 + (number * 7 % 13) / 10, tokens=number)
    seconds, tokens = sum(meter.recent_seconds), sum(range(5000 - len(meter.recent_seconds), 5000))
    assert 60.0 <= seconds < 62.0
    assert meter.recent()["tokens_per_s"] == pytest.approx(tokens / seconds, abs=0.1)
