"""Who runs the experts of a model: what is legal with which ZeRO stage and number of ranks, and what `auto` means.

Contract: stdlib only, so that a dry run refuses an illegal pair in a second; every refusal names the choices that are
legal. The rules are what DeepSpeed 0.19.8 was seen to do (minillm/training/README.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minillm.settings.architecture import Architecture
from minillm.settings.deepspeed_json import section, zero_stage
from minillm.settings.run import ModelSection, RunConfig

BACKENDS = ("torch", "deepspeed", "autoep")


def has_experts(arch: Architecture) -> bool:
    return "sparse" in arch.mlp_layer_types


def backend_problems(arch: Architecture, backend: str, size: int, values: dict[str, Any], world_size: int) -> list[str]:
    """Why this backend cannot run these experts so; nothing where it can.

    Args:
        arch: the architecture.
        size: expert_parallel_size, ranks that share one set of experts.
        values: DeepSpeed's configuration.
    """
    if not has_experts(arch):
        return [] if backend == "torch" and size == 1 else ["the model has no experts"]
    if backend == "torch":
        return [] if size == 1 else ["torch keeps every expert on every rank"]
    stage, zero = zero_stage(values), section(values, "zero_optimization")
    problems = []
    if stage == 0:
        problems.append("ZeRO-0 counts the experts of one rank alone in the gradient norm (DeepSpeed issue 8475)")
    if backend == "deepspeed" and stage == 3:
        problems.append("DeepSpeed's MoE layer cannot run under ZeRO-3")
    if backend == "autoep" and arch.mlp_type != "swiglu":
        problems.append("AutoEP computes gated experts without biases (mlp_type swiglu) only")
    for what, count in (("num_experts", arch.num_experts), ("the ranks", world_size)):
        if count % size:
            problems.append(f"expert_parallel_size {size} does not divide {what} ({count})")
    for key, needed in (("contiguous_gradients", stage == 2), ("reduce_scatter", stage in (1, 2))):
        if needed and zero.get(key) is False:
            problems.append(f"ZeRO-{stage} with shared-out experts needs zero_optimization.{key}")
    for key, on in (("zero_hpz_partition_size", zero.get("zero_hpz_partition_size", 1) not in (0, 1)),
                    ("zero_quantized_gradients", zero.get("zero_quantized_gradients") is True)):  # fmt: skip
        if stage == 3 and on:
            problems.append(f"AutoEP under ZeRO-3 does not work with zero_optimization.{key}")
    return problems


def largest_size(arch: Architecture, world_size: int) -> int:
    """The most ranks one set of experts can be shared out among."""
    return math.gcd(arch.num_experts, world_size)


def legal_choices(arch: Architecture, world_size: int) -> dict[str, str]:
    """Backend -> the ZeRO stages it may have and the expert-parallel sizes, as text; `-` for none."""
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    choices = {}
    for backend in BACKENDS:
        legal = [
            (stage, size)
            for stage in range(4)
            for size in sizes
            if not backend_problems(arch, backend, size, {"zero_optimization": {"stage": stage}}, world_size)
        ]
        columns = [", ".join(map(str, sorted(set(column)))) for column in zip(*legal)]
        choices[backend] = "ZeRO {}; size {}".format(*columns) if legal else "-"
    return choices


def describe_legal(presets: Mapping[str, Architecture], world_size: int) -> list[str]:
    """A Markdown table: what each backend may be asked for with each preset that has experts."""
    rows = [f"| preset (experts) | {' | '.join(BACKENDS)} |", "|---" * (1 + len(BACKENDS)) + "|"]
    for name, arch in presets.items():
        if has_experts(arch):
            cells = " | ".join(legal_choices(arch, world_size).values())
            rows.append(f"| {name} ({arch.num_experts}) | {cells} |")
    return rows


def resolve_moe_backend(run: RunConfig, arch: Architecture, values: dict[str, Any], world_size: int) -> list[str]:
    """Settle model.moe_backend, model.expert_parallel_size and DeepSpeed's expert_parallel, in place.

    auto: AutoEP where the JSON enables expert_parallel, torch where one rank holds all experts, else the first of
    deepspeed, autoep and torch that these experts and the ZeRO stage let run. An `auto` size is the largest that
    divides experts and ranks, 1 for torch. Settling what is settled changes nothing.

    Args:
        arch: the architecture.
        values: the configuration for `deepspeed.initialize`.

    Returns:
        The problems found, one sentence each.
    """
    problems = _resolve(run.model, arch, values, world_size)
    given = section(values, "expert_parallel")
    if not problems and run.model.moe_backend != "autoep" and set(given) - {"enabled"}:
        problems.append(
            f"expert_parallel: {', '.join(sorted(set(given) - {'enabled'}))} are AutoEP's, and this run's experts are "
            f"run by {run.model.moe_backend}; remove them, or set model.moe_backend=autoep"
        )
    if not problems and run.model.moe_backend == "autoep":
        size = run.model.expert_parallel_size
        if given.get("autoep_size", "auto") not in ("auto", size):
            problems.append(
                f"expert_parallel.autoep_size = {given['autoep_size']}, but model.expert_parallel_size = {size}; set "
                f'it to "auto" in the JSON'
            )
        values["expert_parallel"] = {**given, "enabled": True, "autoep_size": size}
    return problems


def _resolve(model: ModelSection, arch: Architecture, values: dict[str, Any], world_size: int) -> list[str]:
    if not has_experts(arch):
        return _resolve_dense(model, values)
    enabled = bool(section(values, "expert_parallel").get("enabled"))
    if enabled and model.moe_backend in ("torch", "deepspeed"):
        return [
            f"model.moe_backend = {model.moe_backend}, but the JSON's expert_parallel.enabled asks for autoep; use "
            f"moe_backend auto, or a JSON without it"
        ]
    if model.moe_backend != "auto":
        candidates = [model.moe_backend]
    elif enabled:
        candidates = ["autoep"]
    else:
        candidates = ["torch"] if model.expert_parallel_size == 1 else ["deepspeed", "autoep", "torch"]
    tried = {}
    for backend in candidates:
        size = model.expert_parallel_size
        if size == "auto":
            size = 1 if backend == "torch" else largest_size(arch, world_size)
        tried[backend] = size, backend_problems(arch, backend, size, values, world_size)
        if not tried[backend][1]:
            model.moe_backend, model.expert_parallel_size = backend, size
            return _capacity_problems(model)
    backend, (size, problems) = next(iter(tried.items()))
    choices = legal_choices(arch, world_size).items()
    legal = ", ".join(f"{name} ({text})" for name, text in choices if text != "-")
    model.moe_backend, model.expert_parallel_size = backend, size
    return [
        f"model.moe_backend = {backend}, model.expert_parallel_size = {size}: {', and '.join(problems)}. Legal for "
        f"these experts on {world_size} rank(s): {legal}"
    ]


def _resolve_dense(model: ModelSection, values: dict[str, Any]) -> list[str]:
    problems = []
    if model.moe_backend in ("deepspeed", "autoep") or model.expert_parallel_size not in (1, "auto"):
        problems.append(
            f"model.moe_backend = {model.moe_backend}, model.expert_parallel_size = {model.expert_parallel_size}: the "
            f"model has no experts; leave them at auto and 1"
        )
    if section(values, "expert_parallel").get("enabled"):
        problems.append("expert_parallel.enabled: the model has no experts; use a JSON without it, as zero3.json")
    model.moe_backend, model.expert_parallel_size = "torch", 1
    return problems + _capacity_problems(model)


def _capacity_problems(model: ModelSection) -> list[str]:
    if model.moe_capacity_factor is None and model.moe_min_capacity != ModelSection().moe_min_capacity:
        return [f"model.moe_min_capacity = {model.moe_min_capacity}: only moe_capacity_factor reads it; give that too"]
    if model.moe_capacity_factor is None or model.moe_backend == "deepspeed":
        return []
    return [
        f"model.moe_capacity_factor = {model.moe_capacity_factor}: only moe_backend deepspeed drops tokens, this run "
        f"uses {model.moe_backend}; leave it out, or set model.moe_backend=deepspeed"
    ]
