"""One optimizer step of the DeepSpeed engine against plain torch: every gradient, the norm, every updated weight.

Contract: the engine is the trainer's own (build_engine, take_step); the reference is torch alone, with all experts in
one process, no ZeRO and no ranks. In fp32 it sees the whole global batch in one forward pass. In bf16 it sees the same
micro-batches one after the other, adds their gradients up in fp32, and its routing is replayed in the engine: a token
whose two best experts are almost level may otherwise go either way, and one such token moves a gradient by tens of
percent without anything being wrong.

Orthogonalising enlarges a difference in small singular values up to 500 times, and sums in another order would show:
what enters the engine's momenta is compared with plain torch's gradients, and its update with the reference's update of
the same momenta.

Errors are relative to the largest entry of a parameter: max |engine - torch| / max |torch|; of an updated weight,
relative to the largest update, beyond one rounding of the weight itself.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from minillm.compat.deepspeed_api import link_optimizer_states
from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.models.capacity import Capacity
from minillm.models.moe import SparseMoE
from minillm.settings.architecture import Architecture
from minillm.settings.deepspeed_json import resolve_deepspeed_config
from minillm.settings.moe_backends import BACKENDS, backend_problems, resolve_moe_backend
from minillm.settings.run import RunConfig, raise_problems
from minillm.training.engine import build_engine
from minillm.training.muon import Muon
from minillm.training.optim import build_optimizer
from minillm.training.step import MicroBatch, move_to_device, take_step
from minillm.training.zero_state import read_full_state
from minillm.utils import distributed

# fp32: rounding alone, of sums in another order. bf16: eight roundings of 2^-8, since both sides round, the engine also
# what it sends and, at ZeRO-1, adds up; minillm/training/README.md has what was measured.
TOLERANCE = {"fp32": 1e-5, "bf16": 8 * 2**-8}
ROWS, LENGTH = 2, 24  # of one micro-batch
LEARNING_RATE, CLIPPING = 0.1, 0.05
MOMENTUM = 0.5  # Muon's: a power of 2, so that a first momentum gives its gradient back to the last bit

_SHARED = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
_SPARSE = {**_SHARED, "mlp_layer_types": ["sparse"] * 2, "num_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 24, "router_z_loss_coef": 1e-2}  # fmt: skip
MODELS: dict[str, dict[str, object]] = {
    "tied": _SHARED,
    "multi-token": {**_SHARED, "tie_word_embeddings": False, "num_nextn_predict_layers": 1},
    "softmax experts, tied": {**_SPARSE, "router_aux_loss_coef": 1e-2},
    "sigmoid experts, multi-token": {
        **_SPARSE, "tie_word_embeddings": False, "num_nextn_predict_layers": 1, "num_experts": 8,
        "router_type": "sigmoid", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
        "router_bias_update_speed": 1e-3, "router_sequence_loss_coef": 1e-2, "shared_expert_intermediate_size": 24,
    },
    "noisy experts with biases": {
        **_SPARSE, "mlp_type": "mlp", "mlp_bias": True, "router_type": "noisy_topk",
        "router_importance_loss_coef": 5e-2,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One combination; its text names it in the table."""

    model: str
    precision: str
    stage: int
    accumulation: int
    backend: str = "torch"
    expert_parallel: int = 1
    capacity_factor: float | None = None
    optimizer: str = "adamw"

    def __str__(self) -> str:
        backend = "" if "experts" not in self.model else f", {self.backend} x {self.expert_parallel}"
        backend += "" if self.capacity_factor is None else " dropping"
        optimizer = "" if self.optimizer == "adamw" else f", {self.optimizer}"
        return (
            f"{self.model}{backend}, ZeRO-{self.stage}, {self.precision}, accumulation {self.accumulation}{optimizer}"
        )


@dataclass(frozen=True)
class Result:
    """Largest relative errors of a case, and where they are.

    Attributes:
        gradient, weight: (error, parameter name), before and after the update; Muon's momenta count as weights.
        norm: relative error of the global gradient norm before clipping.
    """

    gradient: tuple[float, str]
    weight: tuple[float, str]
    norm: float

    def within(self, tolerance: float) -> bool:
        return all(error <= tolerance for error in (self.gradient[0], self.weight[0], self.norm))  # false for nan

    def worst(self) -> tuple[float, str]:
        """The largest error, nan above all, and where it is."""
        return _largest([self.gradient, self.weight, (self.norm, "the gradient norm")])


def legal_cases(world_size: int) -> Iterator[Case]:
    """Every combination that backend_problems and the precision rules allow."""
    for model, fields in MODELS.items():
        sparse = "experts" in model
        full = Architecture(**fields)
        for precision, stage, accumulation in itertools.product(("fp32", "bf16"), (0, 1, 2, 3), (1, 3)):
            if precision == "bf16" and stage == 0:
                continue  # DeepSpeed's optimizer there cannot be saved; the trainer refuses it
            for backend, size in itertools.product(BACKENDS if sparse else ("torch",), (1, 2)):
                values = {"zero_optimization": {"stage": stage}}
                if not backend_problems(full, backend, size, values, world_size):
                    yield Case(model, precision, stage, accumulation, backend, size)
                    if accumulation == 1:
                        yield Case(model, precision, stage, accumulation, backend, size, optimizer="muon")
                    if backend == "deepspeed" and precision == "fp32":  # which tokens drop is not replayed
                        yield Case(model, precision, stage, accumulation, backend, size, capacity_factor=0.8)


def build_batches(num: int) -> list[MicroBatch]:
    """`num` micro-batches with uneven numbers of targets, the second with none, packed documents in the first."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for i in range(num):
        tokens = torch.randint(0, _SHARED["vocab_size"], (ROWS, LENGTH + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[:, : 3 * i] = -100
        targets[0, LENGTH - 5 * (i % 4) :] = -100
        if i == 1:
            targets[:] = -100
        documents = (torch.arange(LENGTH) >= (9 if i == 0 else LENGTH)).long().expand(ROWS, -1)
        positions = torch.arange(LENGTH).expand(ROWS, -1) - (9 * documents if i == 0 else 0)
        batches.append({
            "input_ids": tokens[:, :-1], "shift_labels": targets, "document_ids": documents, "position_ids": positions
        })  # fmt: skip
    return batches


def build_toy(case: Case) -> MiniLLMForCausalLM:
    torch.manual_seed(11)
    model = MiniLLMForCausalLM(MiniLLMConfig(**MODELS[case.model]))
    if case.precision == "bf16":  # the engine's fp32 weights are made from rounded ones
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16().float())
    return model.train()


def run_config(case: Case, world_size: int) -> tuple[RunConfig, dict]:
    """The trainer's own configuration of a case, and DeepSpeed's."""
    run = RunConfig.model_validate({
        "model": {
            "moe_backend": case.backend, "expert_parallel_size": case.expert_parallel,
            "moe_capacity_factor": case.capacity_factor,
        },
        "train": {
            "max_steps": 1, "train_batch_size": ROWS * case.accumulation * world_size,
            "train_micro_batch_size_per_gpu": ROWS,
        },
        # The wide epsilon makes an update follow the size of its gradient, so that clipping by a wrong norm shows.
        "optim": {
            "name": case.optimizer, "learning_rate": LEARNING_RATE, "gradient_clipping": CLIPPING, "adam_epsilon": 1e-2,
            **({"muon_momentum": MOMENTUM} if case.optimizer == "muon" else {}),
        },
    })  # fmt: skip
    values: dict = {"zero_optimization": {"stage": case.stage}}
    if case.stage in (1, 2):
        values["zero_optimization"]["overlap_comm"] = True  # as in ds_configs; at stage 3 DeepSpeed's default
    if case.precision == "bf16":
        values["bf16"] = {"enabled": True}
        if case.stage > 1:
            values["data_types"] = {"grad_accum_dtype": "fp32"}
    resolved, problems = resolve_deepspeed_config(values, run, world_size, "parity")
    arch = Architecture(**MODELS[case.model])
    raise_problems(problems or resolve_moe_backend(run, arch, resolved, world_size), str(case))
    return run, resolved


Tensors = dict[str, torch.Tensor]  # by parameter name


@dataclass(frozen=True)
class Reference:
    """What plain torch makes of a batch: gradients before clipping, on the CPU; and each router's choice for each
    micro-batch (for all of them at once, in fp32)."""

    gradients: Tensors
    norm: float
    routing: list[Tensors]


@dataclass(frozen=True)
class Update:
    """What an optimizer makes of them: weights afterwards, how far they moved, and Muon's momenta; on the CPU."""

    weights: Tensors
    updates: Tensors
    momenta: Tensors


def plain_torch(case: Case, batches: list[MicroBatch], num_targets: int, run: RunConfig) -> Reference:
    """Forward and backward passes of one step by torch alone."""
    device = distributed.default_device()
    master = build_toy(case).to(device)
    model = master
    if case.precision == "bf16":
        model = copy.deepcopy(master).bfloat16()
    routing: list[Tensors] = [{} for _ in batches]
    gradients = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in master.named_parameters()}
    for module in model.modules():
        if isinstance(module, SparseMoE) and case.capacity_factor is not None:
            module.capacity = Capacity(case.capacity_factor, run.model.moe_min_capacity)
    # Noise is drawn, and tokens are dropped, micro-batch by micro-batch.
    whole = case.precision == "fp32" and "noisy" not in case.model and case.capacity_factor is None
    parts = [{key: torch.cat([b[key] for b in batches]) for key in batches[0]}] if whole else batches
    for number, batch in enumerate(parts):
        with recorded_routing(model, routing[number]):
            torch.manual_seed(100 + number)
            model(**move_to_device(batch, device), num_items_in_batch=num_targets).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] += parameter.grad
        model.zero_grad()
    norm = float(torch.nn.utils.get_total_norm(list(gradients.values())))
    return Reference({name: g.cpu() for name, g in gradients.items()}, norm, routing)


def update_by_torch(case: Case, reference: Reference, run: RunConfig, momenta: Tensors) -> Update:
    """Clipping and the first update by an optimizer that no engine holds.

    Args:
        momenta: what the engine's Muon has to orthogonalise; nothing with another optimizer.
    """
    master = build_toy(case).to(distributed.default_device())
    named = dict(master.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = build_optimizer(master, run.optim)
    if isinstance(optimizer, Muon) and case.precision == "bf16":  # what the engine orthogonalises in
        optimizer.bind((), distributed.default_device(), torch.bfloat16)
    for name, parameter in named.items():
        parameter.grad = reference.gradients[name].to(parameter, copy=True)
    torch.nn.utils.clip_grad_norm_(master.parameters(), run.optim.gradient_clipping)
    expected = {name: (1 - MOMENTUM) * named[name].grad.cpu() for name in momenta}
    for name, momentum in momenta.items():
        named[name].grad = (momentum / (1 - MOMENTUM)).to(named[name])
    optimizer.step()
    weights = {name: p.detach().cpu() for name, p in named.items()}
    return Update(weights, {name: weight - before[name].cpu() for name, weight in weights.items()}, expected)


@contextlib.contextmanager
def recorded_routing(model: nn.Module, into: Tensors) -> Iterator[None]:
    """Inside: every router's chosen experts go into `into`, by the router's name."""

    def record(name: str):
        return lambda module, inputs, choice: into.__setitem__(name, choice.indices)

    handles = [router.register_forward_hook(record(name)) for name, router in named_routers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def named_routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, SparseMoE):
            yield f"{name}.gate", module.gate


def prepare_forwards(engine, own: list[Tensors], first: int, replay: bool) -> None:
    """From now on, before each forward: the generator of its micro-batch, and with `replay` its recorded routing."""
    numbers = itertools.count()
    current: Tensors = {}

    def begin(module: nn.Module, inputs: tuple) -> None:
        number = next(numbers)
        torch.manual_seed(100 + first + number)
        current.update(own[number])

    def replayed(name: str):
        return lambda module, inputs, options: (inputs, {**options, "indices": current[name]})

    engine.module.register_forward_pre_hook(begin)
    for name, router in named_routers(engine.module) if replay else ():
        router.register_forward_pre_hook(replayed(name), with_kwargs=True)


def run_case(case: Case, disturb: Callable[[nn.Module], None] | None = None) -> Result:
    """Compare one step. Every rank calls this and gets the same result.

    Args:
        disturb: called with the engine's module before the step; a test plants a wrong gradient with it.
    """
    world, rank = distributed.world_size(), distributed.rank()
    batches = build_batches(world * case.accumulation)
    num_targets = sum(int((b["shift_labels"] != -100).sum()) for b in batches)
    run, values = run_config(case, world)
    reference = plain_torch(case, batches, num_targets, run)
    engine = build_engine(build_toy(case), run, values)
    if disturb is not None:
        disturb(engine.module)
    first = rank * case.accumulation
    own = slice(first, first + case.accumulation)
    prepare_forwards(engine, reference.routing[own], first, replay=case.precision == "bf16")
    gradients: Tensors = {}
    result = take_step(
        engine,
        [move_to_device(b, engine.device) for b in batches[own]],
        num_targets,
        LEARNING_RATE,
        before_update=lambda: gradients.update(read_tensors(engine, "gradient")),
    )
    link_optimizer_states(engine)
    weights, momenta = read_tensors(engine, "weight"), read_tensors(engine, "momentum_buffer")
    engine.destroy()
    expected = update_by_torch(case, reference, run, momenta)
    weight_errors = [worst_error(weights, expected.weights, expected.updates, rounding=torch.finfo(torch.float32).eps)]
    if momenta:
        error, name = worst_error(momenta, expected.momenta, expected.momenta)
        weight_errors.append((error, f"the momentum of {name}"))
    return Result(
        worst_error(gradients, reference.gradients, reference.gradients),
        _largest(weight_errors),
        abs(result.grad_norm - reference.norm) / reference.norm,
    )


def read_tensors(engine, kind: str) -> Tensors:
    return {name: tensor.clone() for name, _, tensor in read_full_state(engine, (kind,))}


def worst_error(found: Tensors, expected: Tensors, scales: Tensors, rounding: float = 0.0) -> tuple[float, str]:
    """The largest error over parameters, and whose it is; infinite where a parameter is missing or extra.

    Args:
        scales: whose largest entry an error is divided by.
        rounding: part of the expected value that is not an error.
    """
    if found.keys() != expected.keys():
        return float("inf"), sorted(found.keys() ^ expected.keys())[0]
    errors = []
    for name, tensor in expected.items():
        error = float(((found[name] - tensor).abs() - rounding * tensor.abs()).clamp(min=0).max())
        errors.append((0.0 if error == 0 else error / max(float(scales[name].abs().max()), 1e-12), name))
    return _largest(errors)


def _largest(errors: list[tuple[float, str]]) -> tuple[float, str]:
    return max(errors, key=lambda item: (math.isnan(item[0]), item[0]))
