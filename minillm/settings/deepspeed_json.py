"""DeepSpeed's JSON: read, checked, and its "auto" values resolved from the run configuration.

Contract: the JSON owns ZeRO, precision, offload and buckets; the YAML owns batch, accumulation and clipping. A value
both state must agree. Stdlib only, so that `--dry-run` needs neither torch nor DeepSpeed. Problems are returned, not
raised. Checked against DeepSpeed 0.19.8 (which ignores unknown top-level keys in silence; here they are errors).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from minillm.settings.run import RunConfig, resolve_accumulation
from minillm.utils.errors import UserError, nearest
from minillm.utils.places import deepspeed_dir, find_named

TOP_LEVEL_KEYS = [
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "bf16", "fp16", "zero_optimization", "data_types", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state",
    "disable_allgather", "comms_logger", "flops_profiler", "activation_checkpointing", "aio", "compile", "timers",
    "expert_parallel",
]  # fmt: skip
OWNED_ELSEWHERE = {
    "optimizer": "the `optim` section of the YAML",
    "scheduler": "optim.lr_schedule in the YAML",
    "wandb": "log.wandb in the YAML",
    "tensorboard": "log.tensorboard in the YAML",
    "csv_monitor": "runs/NAME/metrics.jsonl, which is always written",
    "checkpoint": "the `checkpoint` section of the YAML",
    "zero_allow_untested_optimizer": "the trainer, which always uses torch's AdamW",
    "zero_force_ds_cpu_optimizer": "the trainer, which always uses torch's AdamW",
}
REMOVED = [
    "elasticity", "nebula", "curriculum_learning", "progressive_layer_drop", "amp", "compression_training",
    "sparse_gradients", "sparse_attention",
]  # fmt: skip
ZERO_KEYS = [
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "overlap_comm", "offload_param", "offload_optimizer",
    "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save", "ignore_unused_parameters", "round_robin_gradients",
    "parameter_alignment", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients",
    "memory_efficient_linear", "log_trace_cache_warnings", "leaf_module",
]  # fmt: skip
OBJECTS = ("offload_param", "offload_optimizer", "leaf_module")
NUMBERS = (
    "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_module_granularity_threshold", "zero_hpz_partition_size",
    "parameter_alignment", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale",
)  # fmt: skip
# AutoEP's own, with their values; what it knows of routing is the model's here, and DeepEP is not supported.
EXPERT_PARALLEL = {
    "enabled": (True, False),
    "autoep_size": ("auto", *range(1, 1025)),
    "use_grouped_mm": (True, False),
    "disable_triton_grouped_mm": (True, False),
    "combine_impl": ("auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm"),
    "gate_up_impl": ("separate", "fused"),
    "async_split_plan": (True, False),
}
PRECISION_KEYS = {
    "bf16": ["enabled", "immediate_grad_update", "check_grad_overflow"],
    "fp16": ["enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
             "consecutive_hysteresis", "min_loss_scale"],
}  # fmt: skip


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """Read what is given to --deepspeed: a path, or a name in ds_configs.

    Raises:
        UserError: missing, not JSON, a key given twice, or not an object.
    """
    given, path = path, find_named(path, deepspeed_dir(), ".json")
    if path is None:
        shipped = sorted(p.name for p in deepspeed_dir().glob("*.json"))
        raise UserError(
            f"--deepspeed {given}: no such file; shipped configurations: {', '.join(shipped)} in {deepspeed_dir()}"
        )

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"{path}: {', '.join(twice)} given twice; keep one")
        return dict(pairs)

    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=refuse_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object")
    return values


def resolve_deepspeed_config(
    values: dict[str, Any], run: RunConfig, world_size: int, where: str
) -> tuple[dict[str, Any], list[str]]:
    """Replace "auto" by the run's values and check the rest.

    Args:
        values: the parsed JSON.
        world_size: data-parallel ranks.
        where: the JSON's path, for the messages.

    Returns:
        The dictionary for `deepspeed.initialize`, and the problems found (sentences).
    """
    problems = check_keys(values, where) + check_precision(values, where)
    resolved = json.loads(json.dumps(values))
    accumulation: int | str = "auto"
    try:
        accumulation = resolve_accumulation(run, world_size)
    except UserError as error:
        problems.append(str(error))
    shared = {
        "train_batch_size": (run.train.train_batch_size, "train.train_batch_size"),
        "train_micro_batch_size_per_gpu": (
            run.train.train_micro_batch_size_per_gpu,
            "train.train_micro_batch_size_per_gpu",
        ),
        "gradient_accumulation_steps": (accumulation, "train_batch_size / (micro-batch x ranks)"),
        "gradient_clipping": (run.optim.gradient_clipping, "optim.gradient_clipping"),
    }
    for key, (value, owner) in shared.items():
        given = values.get(key, "auto")
        if given not in ("auto", value) and value != "auto":
            problems.append(
                f"{where}: {key} = {given!r}, but the run's {owner} = {value!r}; set it to \"auto\" in the JSON"
            )
        # DeepSpeed clips at 1.0 where the key is absent, so it is always written out.
        resolved[key] = value
    resolved["steps_per_print"] = values.get("steps_per_print", 2**31 - 1)
    # Its timer waits for the GPU twice a micro-step, and cannot be compiled (torch 2.12 and 2.13: torch.device(None) in
    # a graph). Speed is the trainer's to measure.
    resolved["timers"] = values.get("timers", {"throughput": {"enabled": False}})
    if run.optim.name == "muon":
        problems += check_muon(values, where)
    # torch's fused AdamW takes the place of DeepSpeed's own: no compiler is needed at the first start.
    resolved["zero_allow_untested_optimizer"] = True
    resolved["zero_force_ds_cpu_optimizer"] = False
    return resolved, problems


def check_muon(values: dict[str, Any], where: str) -> list[str]:
    """What goes with AdamW alone."""
    zero = section(values, "zero_optimization")
    offload = section(zero, "offload_optimizer") if isinstance(zero, dict) else {}
    ratio = offload.get("ratio", 1.0) if isinstance(offload, dict) else 1.0
    if ratio == 1.0:
        return []
    return [
        f"{where}: zero_optimization.offload_optimizer.ratio = {ratio!r}: DeepSpeed updates what stays on the GPU by "
        f"an AdamW of its own, and optim.name is muon; remove it, or use optim.name=adamw"
    ]


def zero_stage(values: dict[str, Any]) -> int:
    return int(section(values, "zero_optimization").get("stage", 0))


def section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A nested object; DeepSpeed reads null as absent."""
    return values.get(name) or {}


def precision(values: dict[str, Any]) -> str:
    """bf16, fp16 or fp32."""
    return next((name for name in ("bf16", "fp16") if section(values, name).get("enabled")), "fp32")


def check_keys(values: dict[str, Any], where: str) -> list[str]:
    problems = []
    for key in values:
        if key in OWNED_ELSEWHERE:
            problems.append(f"{where}: {key} belongs to {OWNED_ELSEWHERE[key]}; remove it here")
        elif key in REMOVED:
            problems.append(f"{where}: {key} was removed from DeepSpeed (0.19); remove it here")
        elif key not in TOP_LEVEL_KEYS:
            problems.append(f"{where}: {key} is not a DeepSpeed key{nearest(key, TOP_LEVEL_KEYS)}")
    sections = {"zero_optimization": ZERO_KEYS, "expert_parallel": EXPERT_PARALLEL, **PRECISION_KEYS}
    for name, keys in sections.items():
        inner = section(values, name)
        if not isinstance(inner, dict):
            problems.append(f"{where}: {name} must be an object, not {inner!r}")
            continue
        for key, value in inner.items():
            if key not in keys and name == "expert_parallel":
                problems.append(
                    f"{where}: expert_parallel.{key}: routing and weights are the model's own, so AutoEP takes "
                    f"{', '.join(keys)} only; remove it"
                )
            elif key not in keys:
                problems.append(f"{where}: {name}.{key} is not a DeepSpeed key{nearest(key, keys)}")
            elif name == "expert_parallel":
                valid = EXPERT_PARALLEL[key]
                if not any(value == one and type(value) is type(one) for one in valid):
                    names = json.dumps(valid)[1:-1]
                    rule = '"auto" or a number of ranks' if key == "autoep_size" else f"one of {names}"
                    problems.append(f"{where}: expert_parallel.{key} = {json.dumps(value)}: must be {rule}")
            elif value == "auto":
                problems.append(f"{where}: {name}.{key}: only batch sizes, accumulation and clipping may be \"auto\"")
            elif rule := _wrong_type(key, value):
                problems.append(f"{where}: {name}.{key} = {json.dumps(value)}: must be {rule}")
    return problems


def _wrong_type(key: str, value: object) -> str | None:
    """What the value of a key of ZeRO or a precision has to be, where it is not; null is an absent one."""
    if value is None or key == "stage":  # check_precision's
        return None
    if key in OBJECTS:
        return None if isinstance(value, dict) else "an object"
    if key in NUMBERS:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        return None if number else "a number, 0 or more"
    return None if isinstance(value, bool) else "true or false"


def check_precision(values: dict[str, Any], where: str) -> list[str]:
    zero = section(values, "zero_optimization")
    sections = [section(values, k) for k in ("zero_optimization", "bf16", "fp16", "data_types")]
    if not all(isinstance(inner, dict) for inner in sections):
        return []  # check_keys has named it
    if not all(isinstance(section(zero, k), dict) for k in ("offload_param", "offload_optimizer")):
        return []
    problems = []
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        return [f"{where}: zero_optimization.stage = {stage!r}: must be 0, 1, 2 or 3"]
    if section(values, "bf16").get("enabled") and section(values, "fp16").get("enabled"):
        problems.append(f"{where}: bf16 and fp16 are both enabled; keep one")
    if section(values, "fp16").get("enabled") and stage not in (1, 2, 3):
        problems.append(f"{where}: fp16 at ZeRO stage 0 keeps no fp32 weights that could be saved; use stage 1, 2 or 3")
    if stage == 0 and precision(values) == "bf16":
        problems.append(
            f"{where}: bf16 at ZeRO stage 0 uses a DeepSpeed optimizer whose state cannot be saved; use stage 1"
        )
    if stage == 1 and precision(values) == "bf16" and section(values, "data_types").get("grad_accum_dtype") == "fp32":
        problems.append(
            f"{where}: bf16 at ZeRO stage 1 with grad_accum_dtype fp32 uses another DeepSpeed optimizer, which is not "
            f"supported; remove data_types.grad_accum_dtype, or use stage 2"
        )
    if section(values, "bf16").get("check_grad_overflow") is False:
        problems.append(f"{where}: bf16.check_grad_overflow = false would apply non-finite gradients; remove it")
    for key in ("offload_param", "offload_optimizer"):
        device = section(zero, key).get("device", "none")
        if device not in ("none", "cpu"):
            problems.append(f"{where}: zero_optimization.{key}.device = {device!r}: must be cpu or none")
    if section(zero, "offload_param").get("device", "none") != "none" and stage != 3:
        problems.append(f"{where}: zero_optimization.offload_param needs stage 3")
    return problems
