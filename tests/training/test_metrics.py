"""The meter on a clock that the test moves: what is left and how fast it goes, of the last minute of steps; and the
peak that MFU is a part of, by card and precision (values from NVIDIA's datasheets, dense, without TF32)."""

from __future__ import annotations

import pytest
import torch

from minillm.planning.devices import datasheet_flops
from minillm.training import metrics
from minillm.training.metrics import Meter, peak_flops, progress_line
from minillm.training.state import TrainState
from minillm.utils import distributed

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
        assert meter.end_step(tokens, tokens) == pytest.approx(seconds)
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


@pytest.mark.parametrize(
    "card, precision, peak",
    [
        ("NVIDIA GeForce RTX 3090", "bf16", 71e12),
        ("NVIDIA GeForce RTX 3090", "fp32", 35.6e12),
        ("NVIDIA GeForce RTX 3090 Ti", "fp16", 80e12),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),  # not 156e12: PyTorch multiplies fp32 without TF32
        ("NVIDIA A10G", "bf16", 70e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA RTX A6000", "bf16", 154.8e12),
        ("NVIDIA RTX 6000 Ada Generation", "bf16", 364.2e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 67e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA GH200 480GB", "bf16", 989e12),
        ("Tesla T4", "fp16", 65e12),
        ("Tesla T4", "bf16", None),  # no units for it
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-PCIE-16GB", "fp16", 112e12),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", "bf16", None),  # other chips under the name of a listed one
        ("NVIDIA GeForce RTX 4080 SUPER", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GeForce GTX 1080", "fp32", None),
    ],
)
def test_a_cards_peak_is_its_datasheets_in_the_precision_of_the_run(card, precision, peak):
    assert datasheet_flops(card, precision) == peak


@pytest.mark.parametrize("dtype, peak", [(torch.bfloat16, 312e12), (torch.float16, 312e12), (torch.float32, 19.5e12)])
def test_the_peak_of_a_known_gpu_follows_the_precision(dtype, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    flops, origin = peak_flops(dtype)
    assert flops == peak * distributed.world_size() and "NVIDIA A100-SXM4-40GB datasheet" in origin


@pytest.mark.parametrize("card, dtype", [("Tesla T4", torch.bfloat16), ("Some GPU", torch.float16)])
def test_the_peak_of_other_gpus_is_a_product_in_the_runs_own_type(card, dtype, monkeypatch):
    """The product itself needs the GPU that this test has not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    monkeypatch.setattr(metrics, "measure_matmul_flops", lambda asked: {dtype: 5e12}[asked])
    monkeypatch.setattr(distributed, "reduce_sum", lambda values: values)
    flops, origin = peak_flops(dtype)
    assert flops == 5e12 and origin.startswith("measured matrix product")


def test_the_peak_of_a_cpu_is_measured(group):
    flops, origin = peak_flops(torch.float32)
    assert 1e9 < flops < 1e14 and origin == "measured matrix product, fp32"
