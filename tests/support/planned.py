"""What an engine really holds, measured in a group of ranks for tests/test_plan.py."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from minillm.training.engine import build_engine
from minillm.training.gradient_parity import Case, build_batches, build_toy, run_config
from minillm.training.step import take_step
from minillm.training.zero_state import base_optimizer
from minillm.utils import distributed

ACCUMULATION = 2


def storages(tensors: Iterable[torch.Tensor | None]) -> dict[int, int]:
    """Bytes by address, a storage once however many views there are."""
    held = [t.untyped_storage() for t in tensors if t is not None]
    return {s.data_ptr(): s.nbytes() for s in held if s.nbytes()}


def gradients(engine, stage: int) -> Iterable[torch.Tensor | None]:
    """What has added up so far."""
    optimizer = engine.optimizer
    if stage < 2:
        return [p.grad for p in engine.module.parameters()]
    if stage == 3:
        return [optimizer.grad_partitions_flat_buffer]
    flat = [g.flat_partition for g in optimizer.averaged_gradients.values() if hasattr(g, "flat_partition")]
    return flat or [g for group in optimizer.all_grad_tensors.values() for g in group or ()]


def measure(case: Case, zero: dict) -> dict[str, int]:
    """Bytes of this rank after the first micro-step of the second step; `gathered`: elements that stage 3 had whole in
    it, between forward and backward."""
    run, values = run_config(case, distributed.world_size())
    values["zero_optimization"] = {**values["zero_optimization"], **zero}
    engine = build_engine(build_toy(case), run, values)
    batches = build_batches(case.accumulation)
    take_step(engine, batches, num_target_tokens=100, learning_rate=1e-3)
    output = engine(**batches[0], num_items_in_batch=100)
    whole = [p for p in engine.module.parameters() if case.stage == 3 and p.ds_status == ZeroParamStatus.AVAILABLE]
    own = storages(p.ds_tensor for p in whole)  # a rank that shares with nobody gathers nothing
    gathered = sum(p.ds_numel for p in whole if not p.ds_persist and p.untyped_storage().data_ptr() not in own)
    engine.backward(output.loss, scale_wrt_gas=False)
    engine.step()
    parameters = list(engine.module.parameters())
    weights = storages([getattr(p, "ds_tensor", None) for p in parameters]) | storages(parameters)
    masters = getattr(engine.optimizer, "single_partition_of_fp32_groups", None)
    masters = masters or getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])
    moments = [v for state in base_optimizer(engine).state.values() for v in state.values() if torch.is_tensor(v)]
    kept = storages([*masters, *moments])
    assert not kept.keys() & weights.keys()
    summed = storages(gradients(engine, case.stage))
    if "offload_optimizer" in zero:
        found = offloaded(engine, case.stage, weights, summed, kept, masters)
    else:
        found = {"parameters": weights, "gradients": summed, "optimizer": kept, "host": {}}
    engine.destroy()
    return {**{part: sum(held.values()) for part, held in found.items()}, "gathered": gathered}


def offloaded(engine, stage: int, weights, summed, kept, masters) -> dict[str, dict[int, int]]:
    """The same where DeepSpeed keeps the optimizer, and at stage 3 the gathered weights' parts, in main memory."""
    optimizer = engine.optimizer
    host = {**kept, **storages(master.grad for master in masters)}
    if stage == 3:
        parts = storages(optimizer.param_groups_fp16_flat_cpu_memory)
        assert parts.keys() <= weights.keys()
        on_card = {address: size for address, size in weights.items() if address not in parts}
        return {"parameters": on_card, "gradients": {}, "optimizer": {}, "host": {**host, **summed, **parts}}
    passing = [optimizer.temp_grad_buffer_for_cpu_offload, *optimizer.param_buffer_of_bit16_for_cpu_offload_groups]
    return {"parameters": weights, "gradients": summed, "optimizer": {}, "host": {**host, **storages(passing)}}


def measure_everywhere(words: list, zero: dict) -> list[dict[str, int]]:
    """`measure` of Case(*words) on every rank."""
    everyone: list = [None] * distributed.world_size()
    dist.all_gather_object(everyone, measure(Case(*words), zero))
    return everyone
