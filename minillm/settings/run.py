"""The run configuration: every key with its default, its meaning, and the rules between keys.

Contract: no torch, no transformers. DeepSpeed's JSON owns ZeRO, precision and offload (settings/deepspeed_json.py);
this file owns batch, schedule, data and model. settings/reading.py reads it from YAML and the command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from minillm.run_folder import RunFolder
from minillm.settings.architecture import DEFAULTS, Architecture, form_problems, problems_of
from minillm.settings.derived import coerce
from minillm.settings.presets import PRESETS, preset
from minillm.utils.errors import UserError, nearest
from minillm.utils.yaml_values import as_number, as_written

AUTO_MICRO_BATCH = 8  # the most that `auto` is where no GPU is known to hold more
# What may differ from the weights a run starts with: the way positions are turned, which has no parameters.
CONTEXT_FIELDS = ("max_position_embeddings", "rope_theta", "rope_scaling")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
RUN_NAME = r"^\w[\w.\-]*$"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_or_text(cls, values: object) -> object:
        """A name that looks like a number keeps its spelling; what stands in sections is theirs to read."""
        if not isinstance(values, dict):
            return values
        read = {}
        for key, value in values.items():
            field = cls.model_fields.get(key)
            if field is None:
                read[key] = as_number(value)
            else:
                read[key] = as_written(value) if _is_text(field.annotation) else value
        return read

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        annotation = cls.model_fields[info.field_name].annotation if info.field_name in cls.model_fields else None
        if isinstance(value, bool) and _is_numeric(annotation):
            raise PydanticCustomError("number", "must be a number, not true or false")
        return value


def _is_text(annotation: object) -> bool:
    """str, in a list or optional, and no number beside it."""
    return annotation is str or (not _is_numeric(annotation) and any(_is_text(part) for part in get_args(annotation)))


def _is_numeric(annotation: object) -> bool:
    return annotation in (int, float) or any(_is_numeric(part) for part in get_args(annotation))


class ModelSection(Section):
    """Which decoder. Every other key is an architecture field and overrides the preset's value."""

    model_config = ConfigDict(extra="allow")
    preset: str = Field("demo", description="a preset's name")
    init_from: str | None = Field(
        None, description="null, a run, a model folder, or `newest` (the newest pretraining run)"
    )
    moe_backend: Literal["auto", "torch", "deepspeed", "autoep"] = Field("auto", description="who runs the experts")
    expert_parallel_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1, description="ranks that share one set of experts; auto: the most that divide experts and ranks"
    )
    moe_capacity_factor: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="moe_backend deepspeed: routes an expert takes in training, over its even share (null: all)",
    )
    moe_min_capacity: int = Field(4, ge=1, description="routes an expert takes at least, with moe_capacity_factor")


class TrainSection(Section):
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; or give train.num_epochs")
    num_epochs: float | None = Field(None, gt=0, description="passes over data.train; or give train.max_steps")
    train_batch_size: int = Field(32, ge=1, description="sequences of one optimizer step over all ranks together")
    train_micro_batch_size_per_gpu: int | Literal["auto"] = Field(
        "auto",
        description=f"sequences of one forward pass; auto: the most that divide, up to {AUTO_MICRO_BATCH}, on a GPU up "
        "to 64, as many as it holds by plan",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    compile: bool = Field(False, description="torch.compile the layers and the loss (half a minute at the start)")
    deterministic: bool = Field(
        False, description="on CUDA take kernels that repeat to the last bit, slower ones; CPUs always do"
    )


class DataSource(Section):
    name: str = Field(description="a short name, used in metrics")
    path: str = Field(description="a path, glob, brace pattern or URL of shards")
    weight: float | None = Field(None, gt=0, description="share of the batches against the other sources (null: 1)")


Sources = str | Annotated[list[DataSource], Field(min_length=1)] | None


class DataSection(Section):
    train: Sources = Field(None, description="null (the built-in corpus), a path, glob, braces or URL, or a list")
    validation: Sources = Field(None, description="as data.train")
    tokenizer: str | None = Field(
        None, description="a tokenizer folder or tiktoken:NAME (null: the built-in corpus's, or init_from's)"
    )
    seq_len: int = Field(512, ge=2, description="tokens of one sequence")
    packing: Literal["concat", "none"] | None = Field(
        None, description="concat: documents joined and cut every seq_len; none: one a row (null: by stage)"
    )
    stride: int | None = Field(
        None, ge=1, description="tokens between the windows of concat; below seq_len they overlap (null: seq_len)"
    )
    cache_dir: str | None = Field(None, description="where compiled and downloaded shards go (null: data/cache)")
    max_bad_samples: int = Field(0, ge=0, description="unreadable samples to skip before the run stops")


class OptimSection(Section):
    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for the matrices of the decoder layers, AdamW for the rest"
    )
    learning_rate: float = Field(1e-3, gt=0, description="the peak, typically 1e-4 to 1e-3")
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1, description="the end, as a part of the peak")
    lr_schedule: Literal["cosine", "wsd", "constant"] = Field("cosine", description="the shape after warm-up")
    warmup_ratio: float = Field(0.02, ge=0, lt=1, description="part of max_steps that warms up linearly")
    decay_ratio: float = Field(0.2, gt=0, le=1, description="part of max_steps in which wsd decays at the end")
    weight_decay: float = Field(0.1, ge=0, description="decoupled, on matrices only")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's denominator")
    muon_learning_rate: float | None = Field(
        None, gt=0, description="Muon's peak; it follows the same schedule (null: learning_rate)"
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon's average of gradients")
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm; 0 switches it off")


class ValidationSection(Section):
    every: int = Field(100, ge=0, description="steps between validations; 0: only at the end")
    max_sequences: int | None = Field(None, ge=1, description="sequences of each source (null: all)")


class SamplesSection(Section):
    every: int = Field(0, ge=0, description="steps between samples; 0: none")
    prompts: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="texts to continue (questions, after fine-tuning)"
    )
    max_new_tokens: int = Field(48, ge=1, description="length of a sample")


class CheckpointSection(Section):
    every: int = Field(100, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints kept; the best by val_loss is kept besides")
    asynchronous: bool = Field(
        True, description="train on while files are written; rank 0 then holds 12 bytes a parameter in host memory"
    )


class LogSection(Section):
    every: int = Field(1, ge=1, description="steps between lines of metrics.jsonl")
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online with a key (WANDB_API_KEY or netrc), offline without"
    )
    wandb_project: str = Field("minillm", description="project name in W&B")
    tensorboard: bool = Field(False, description="event files in the run folder (needs the tensorboard package)")
    idle_expert_steps: int = Field(
        100, ge=0, description="steps without a token after which an expert is warned of; 0: never"
    )


Policy = Literal["stop", "skip", "rollback"]


class FaultsSection(Section):
    on_non_finite: Policy = Field(
        "stop", description="a loss or gradient that is not finite: stop, skip the update, or roll back and go past it"
    )
    on_loss_spike: Literal["ignore", "log"] | Policy = Field(
        "log", description="a loss far above the last ones: nothing, an event, or as on_non_finite"
    )
    spike_window: int = Field(64, ge=8, description="steps a spike is measured against; none is seen before as many")
    spike_deviations: float = Field(10.0, gt=0, description="robust deviations above the window's median")
    max_recoveries: int = Field(20, ge=0, description="updates skipped and roll-backs before the run stops")
    timeout: float = Field(1800, gt=0, description="seconds a rank may stand in one place before all stop")


class RunConfig(Section):
    """One run. `stage` is set by the launch script; everything else by defaults, YAML and command line."""

    model_config = ConfigDict(coerce_numbers_to_str=True)
    run_name: str = Field("run", description="a folder's name; default: the config's", pattern=RUN_NAME)
    run_root: str = Field("runs", description="where run folders stand")
    seed: int = Field(42, ge=0, lt=2**63, description="of weights, data order and sampling")
    stage: Literal["pretrain", "sft"] = "pretrain"
    model: ModelSection = Field(default_factory=ModelSection)
    train: TrainSection = Field(default_factory=TrainSection)
    data: DataSection = Field(default_factory=DataSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    validation: ValidationSection = Field(default_factory=ValidationSection)
    samples: SamplesSection = Field(default_factory=SamplesSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    log: LogSection = Field(default_factory=LogSection)
    faults: FaultsSection = Field(default_factory=FaultsSection)

    @property
    def run_dir(self) -> Path:
        return Path(self.run_root) / self.run_name

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.run_dir)

    @property
    def packing(self) -> str:
        return self.data.packing or ("none" if self.stage == "sft" else "concat")


def raise_problems(problems: list[str], where: str) -> None:
    """Raise one UserError that lists `problems`; return if there are none."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{count} in the configuration {where}:\n" + "\n".join(f"  - {p}" for p in problems))


def check_run_config(run: RunConfig) -> list[str]:
    """Rules that span several keys and need nothing but the config."""
    problems = []
    if (run.train.max_steps is None) == (run.train.num_epochs is None):
        both = "both are given" if run.train.max_steps is not None else "neither is given"
        problems.append(f"train.max_steps / train.num_epochs: exactly one says how long the run is, {both}; set one")
    if run.optim.lr_schedule == "wsd" and run.optim.warmup_ratio + run.optim.decay_ratio > 1:
        problems.append("optim.warmup_ratio + optim.decay_ratio must not exceed 1")
    for name in ("muon_learning_rate", "muon_momentum"):
        value = getattr(run.optim, name)
        if run.optim.name != "muon" and value != OptimSection.model_fields[name].default:
            problems.append(f"optim.{name} = {value}: only optim.name=muon reads it; leave it out, or set that")
    if (run.data.train is None) != (run.data.validation is None) and run.data.train is None:
        problems.append("data.validation: given without data.train; give both, or neither for the built-in corpus")
    if run.data.train is not None and run.data.tokenizer is None and run.model.init_from is None:
        problems.append("data.tokenizer: needed with data.train; make one with `python -m data_tools.tokenizer train`")
    for name, sources in (("data.train", run.data.train), ("data.validation", run.data.validation)):
        names = [source.name for source in sources] if isinstance(sources, list) else []
        if twice := sorted({one for one in names if names.count(one) > 1}):
            problems.append(f"{name}: the name {twice[0]} is given twice; metrics are kept by name, so choose others")
    if run.data.stride is not None and run.packing != "concat":
        problems.append(f"data.stride = {run.data.stride}: only data.packing=concat has windows; leave it out")
    elif run.data.stride is not None and run.data.stride > run.data.seq_len:
        problems.append(
            f"data.stride = {run.data.stride}: above data.seq_len = {run.data.seq_len} tokens would be left out; "
            f"choose 1 to {run.data.seq_len}"
        )
    if run.samples.every and not run.samples.prompts:
        problems.append("samples.every: there is nothing to sample from; give samples.prompts, or samples.every=0")
    return problems + check_model(run)


def check_model(run: RunConfig) -> list[str]:
    """Preset and overrides: names, types, mechanisms, shapes. Values take their fields' types, in place."""
    section, problems = run.model, []
    if section.preset not in PRESETS:
        return [f"model.preset = {section.preset!r}: unknown preset{nearest(section.preset, sorted(PRESETS))}"]
    given = model_overrides(run)
    for name, value in list(given.items()):
        if name not in DEFAULTS:
            names = [*ModelSection.model_fields, *DEFAULTS]
            problems.append(f"model.{name}: unknown architecture field{nearest(name, names)}")
            del given[name]
        elif name in TOKEN_IDS:
            problems.append(f"model.{name} = {value!r}: token ids are the tokenizer's; leave it out")
            del given[name]
        elif section.init_from is not None and name not in CONTEXT_FIELDS:
            problems.append(
                f"model.{name} = {value!r}: the model comes from model.init_from; its shape cannot change (only "
                f"{', '.join(CONTEXT_FIELDS)} can, to lengthen the context)"
            )
        else:
            given[name] = section.model_extra[name] = coerce(name, value)
    if section.init_from is not None:
        context = {name: value for name, value in given.items() if name in CONTEXT_FIELDS}
        return problems + [f"model.{problem}" for problem in form_problems(Architecture(**context))]
    arch = preset(section.preset, **given)
    broken = problems_of(arch)
    if not form_problems(arch) and run.data.seq_len > arch.max_position_embeddings:
        problems.append(
            f"data.seq_len = {run.data.seq_len}: the model has {arch.max_position_embeddings} positions; "
            f"lower it, or raise model.max_position_embeddings"
        )
    return problems + [f"model.{problem}" for problem in broken]


def model_overrides(run: RunConfig) -> dict[str, Any]:
    """The architecture fields given in the model section, over the preset's."""
    return dict(run.model.model_extra or {})


def resolve_accumulation(run: RunConfig, world_size: int) -> int:
    """gradient_accumulation_steps = train_batch_size / (micro-batch x ranks); an `auto` micro-batch is set on the way.

    Raises:
        UserError: when it does not divide, with the nearest sizes that do.
    """
    batch, micro = run.train.train_batch_size, run.train.train_micro_batch_size_per_gpu
    fitting = [m for m in range(1, batch + 1) if batch % (m * world_size) == 0]
    if micro == "auto" and fitting:
        micro = run.train.train_micro_batch_size_per_gpu = max(m for m in fitting if m <= AUTO_MICRO_BATCH)
    if micro in fitting:
        return batch // (micro * world_size)
    whole = (1 if micro == "auto" else micro) * world_size
    fix = (
        f"train.train_micro_batch_size_per_gpu={max((m for m in fitting if m <= micro), default=fitting[0])}"
        if fitting
        else f"train.train_batch_size={-(-batch // whole) * whole}, or fewer ranks"
    )
    raise UserError(
        f"train.train_batch_size = {batch} does not divide into micro-batches of {micro} on {world_size} ranks; "
        f"use {fix}"
    )


def dump_run_config(run: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(run.model_dump(), sort_keys=False, allow_unicode=True)
