"""What a save and the data cost, by hand: bytes over bandwidths, and latency a hop."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minillm.data.token_shards import CHUNK_TOKENS, chunk_stride
from minillm.planning.devices import DEVICES
from minillm.planning.growth import HASHING, one_gpu, save, token_bytes
from minillm.planning.network import HOP_BETWEEN, HOP_INSIDE
from minillm.planning.step import HOST_LINK, Setup, speed
from minillm.settings.accounting import num_parameters
from minillm.settings.deepspeed_json import read_deepspeed_json
from minillm.settings.presets import PRESETS
from tests.support.launching import ROOT

DEVICE = DEVICES["a100"]._replace(bus=100e9, network=20e9)


def setup(stage: int, gpus: int, **changes) -> Setup:
    values = read_deepspeed_json(ROOT / "ds_configs" / f"zero{stage}.json")
    made = Setup(PRESETS["dense-26m"], values, gpus, "torch", 1, 256, 512, 4, False, gpus_per_node=8)
    return replace(made, **changes)


@pytest.mark.parametrize("vocabulary, width", [(6_400, 2), (65_536, 2), (65_537, 4)])
def test_the_bytes_of_a_token_are_those_of_the_shards(vocabulary, width):
    assert token_bytes(vocabulary) == chunk_stride(CHUNK_TOKENS, width, False) / CHUNK_TOKENS


def test_a_save_is_12_bytes_a_parameter():
    """Weights and two moments in fp32. One rank copies them to main memory; writing and hashing go on beside training,
    unless saves are not asynchronous."""
    size = 12 * num_parameters(PRESETS["dense-26m"])["total"]
    found = save(setup(1, 1), DEVICE, asynchronous=True, disk=2e9)
    assert found.size == size
    assert found.stall == found.gathered == pytest.approx(size / HOST_LINK)
    assert found.written == pytest.approx(size / 2e9 + size / HASHING)
    assert save(setup(1, 1), DEVICE, asynchronous=False, disk=2e9).stall == found.stall + found.written


def test_every_tensor_is_gathered_from_all_ranks():
    """4 nodes of 8: ZeRO-1 all-reduces each fp32 tensor, ZeRO-3 gathers it, half the traffic."""
    size = 12 * num_parameters(PRESETS["dense-26m"])["total"]
    tensors = 3 * (1 + 8 * 9 + 1)  # embedding, 8 layers of 7 matrices and 2 norms, the last norm
    copied = size / (60e9 / 8)  # 60 GB/s of main memory for the 8 cards of a node
    once = size * 7 / 8 / 100e9 + tensors * 7 * HOP_INSIDE + size * 3 / 4 / 160e9 + tensors * 3 * HOP_BETWEEN
    assert save(setup(1, 32), DEVICE, True).gathered == pytest.approx(2 * once + copied)
    assert save(setup(3, 32), DEVICE, True).gathered == pytest.approx(once + copied)


def test_one_gpu_is_arithmetic_and_the_update():
    many = setup(1, 32)
    found = speed(replace(many, world_size=1), DEVICE, 0.4)
    assert found.inside == found.between == 0
    assert one_gpu(many, DEVICE, 0.4) == pytest.approx(256 * 512 / (found.compute + found.update))
