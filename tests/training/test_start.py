"""What a rank does before its first step: the warm-up step, and what the process group sets."""

from __future__ import annotations

import json

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from minillm.training import loop, start
from minillm.training.engine import process_group
from minillm.training.zero_state import loss_scale_state
from minillm.utils import determinism, distributed
from minillm.utils.errors import UserError
from tests.support.in_process import built_trainer, train
from tests.support.launching import ROOT

FP16 = json.loads((ROOT / "ds_configs" / "zero2_fp16.json").read_text())["fp16"]


@pytest.mark.usefixtures("group")
def test_the_warm_up_step_is_a_step_of_the_run_and_leaves_no_loss_scale_behind(settings, monkeypatch):
    # The real warm-up step, with fp16's scaler on the engine: DeepSpeed puts one there on GPUs only.
    before, after, results, batches = [], [], [], []

    def warm_up(engine, micro_batches, *count):
        engine.optimizer.loss_scaler = DynamicLossScaler(
            init_scale=2.0 ** FP16["initial_scale_power"], scale_window=FP16["loss_scale_window"],
            min_scale=FP16["min_loss_scale"], delayed_shift=FP16["hysteresis"], consecutive_hysteresis=False,
            dtype=torch.float32,
        )  # fmt: skip
        before.append(loss_scale_state(engine))
        batches.extend(micro_batches)
        results.append(real_warm_up(engine, micro_batches, *count))
        after.append(loss_scale_state(engine))

    real_warm_up = start.warm_up
    monkeypatch.setattr(start, "warm_up", warm_up)
    trainer = built_trainer({**settings, "model.hidden_dropout": 0})
    trainer.close(0)
    assert before[0]["cur_scale"] == 65536 and after == before
    # The mean over the batch's targets, by torch's own cross-entropy; fp32 sums of 8 rows differ in the last digits.
    with torch.no_grad():
        logits = [trainer.engine.module(**{k: v for k, v in b.items() if k != "shift_labels"}).logits for b in batches]
    targets = torch.cat([batch["shift_labels"].flatten() for batch in batches])
    expected = torch.nn.functional.cross_entropy(torch.cat([x.flatten(0, 1) for x in logits]), targets)
    assert results[0].loss == pytest.approx(float(expected), rel=1e-5)


class Gpu:
    """What the choice of kernels is told of the device; the run itself stays where it is."""

    @staticmethod
    def default_device() -> torch.device:
        return torch.device("cuda", 0)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wanted", [True, False])
def test_the_whole_run_has_the_kernels_it_asks_for(settings, monkeypatch, wanted):
    asked = []

    def looking(function):
        def call(*args, **kwargs):
            asked.append(torch.are_deterministic_algorithms_enabled())
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(determinism, "distributed", Gpu)
    for name in ("build_engine", "warm_up_and_restore", "take_step", "validate"):
        monkeypatch.setattr(loop, name, looking(getattr(loop, name)))
    assert train({**settings, "train.deterministic": wanted, "train.max_steps": 2}) == 0
    assert len(asked) >= 5 and set(asked) == {wanted}
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("group")
def test_an_operation_without_such_a_kernel_is_named_at_the_start(settings, monkeypatch):
    monkeypatch.setattr(determinism, "distributed", Gpu)
    # put_ is one of PyTorch's operations that do not repeat on any device.
    put = lambda *_: torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))  # noqa: E731
    monkeypatch.setattr(start, "warm_up", put)
    with pytest.raises(UserError, match="train.deterministic = true: put_ does not.*set train.deterministic=false"):
        train({**settings, "train.deterministic": True})


def test_a_gpu_rank_gives_nccl_its_device_and_probes_no_operation(monkeypatch):
    """As far as the group, on a machine whose GPUs torch is told of."""

    class Reached(Exception):
        pass

    class Table(dict):
        def __setitem__(self, name, value):
            raise AssertionError("DeepSpeed's table of operations was asked for")

    def init_process_group(backend, **options):
        raise Reached(backend, options["device_id"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", Table())
    for name, value in {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Reached) as reached, process_group():
        pass
    assert reached.value.args == ("nccl", torch.device("cuda", 2))


@pytest.mark.usefixtures("group")
def test_ranks_whose_gpus_hold_different_micro_batches_are_told(settings, tmp_path, monkeypatch):
    """What the other ranks chose is planted; one rank agrees with itself."""
    gather = distributed.gather_objects
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, 64] if own == 4 else gather(own))
    with pytest.raises(UserError, match=r"train_micro_batch_size_per_gpu = auto.*\[4, 64\]; set it to 4"):
        train(settings)
    assert not (tmp_path / "r").exists()
