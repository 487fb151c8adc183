"""Law 2: the same losses for any number of ranks, any accumulation, any ZeRO stage, and for plain torch.

fp32 within 1e-5, bf16 within 5e-3 relative. The reference is a loop of a dozen lines over torch alone, fed with the
same batches (their own law has its tests in tests/data); it uses no engine, no accumulation, no sharding. Conversations
give micro-batches with very uneven numbers of targets, so a mean of means would fail here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minillm.data.loader import BatchLoader
from minillm.data.sequence_stream import build_stream
from minillm.data.sources import open_sources
from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.settings.presets import preset
from minillm.settings.run import OptimSection
from tests.support.in_process import train
from tests.support.launching import losses
from tests.support.ranks import Ranks

STEPS, BATCH, RATE, CLIP, DECAY = 6, 8, 3e-3, 0.5, 0.1
FP32 = {"bf16": {"enabled": False}}
BF16 = {"bf16": {"enabled": True}}


def zero(stage: int, precision: dict, **extra) -> dict:
    accumulate = {"data_types": {"grad_accum_dtype": "fp32"}} if stage >= 2 else {}
    return {**precision, **accumulate, "zero_optimization": {"stage": stage, **extra}}


@pytest.fixture(scope="module")
def settings(tiny_settings, tiny_data) -> dict[str, dict]:
    common = {
        "train.max_steps": STEPS, "train.train_batch_size": BATCH, "optim.learning_rate": RATE, "optim.warmup_ratio": 0,
        "optim.lr_schedule": "constant", "optim.weight_decay": DECAY, "optim.gradient_clipping": CLIP,
        "validation.every": 0, "checkpoint.every": 0,
    }  # fmt: skip
    text = {**tiny_settings, **common}
    chat = {"data.train": tiny_data["chat.train"], "data.validation": tiny_data["chat.validation"]}
    return {"text": text, "chat": {**text, **chat, "data.packing": "none"}}


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    defaults = OptimSection()
    return torch.optim.AdamW(groups, lr=RATE, betas=(defaults.adam_beta1, defaults.adam_beta2), eps=1e-8)


def plain_torch(settings: dict, num_steps: int = STEPS, make_optimizer=adamw) -> list[float]:
    """The whole global batch in one forward pass on torch alone."""
    sources = open_sources(
        settings["data.train"],
        tokenizer_path=Path(settings["data.tokenizer"]),
        cache_dir=Path(settings["data.cache_dir"]),
    )
    packing = settings.get("data.packing", "concat")
    stream = build_stream(sources, seq_len=settings["data.seq_len"], packing=packing, seed=42)
    loader = BatchLoader(stream, train_batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1)
    fields = {key.removeprefix("model."): value for key, value in settings.items() if key.startswith("model.")}
    torch.manual_seed(42)
    model = MiniLLMForCausalLM(MiniLLMConfig(**preset("demo", **fields))).train()
    optimizer = make_optimizer(model)
    found = []
    for step in range(num_steps):
        (batch,) = loader.batch_at(step).micro_batches
        logits = model(**{k: v for k, v in batch.items() if k != "shift_labels"}, return_logits=True).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        found.append(loss.item())
    loader.close()
    return found


def cases_for(ranks: int, settings: dict[str, dict], root: Path) -> dict[str, dict]:
    """Run name -> case. All accumulation splits and stages on few ranks, a few on many."""
    cases = {}

    def add(kind: str, precision: dict, stage: int, micro: int, **extra) -> None:
        label = f"{kind}-{'bf16' if precision is BF16 else 'fp32'}-zero{stage}-micro{micro}{''.join(extra)}-{ranks}"
        own = {"train.train_micro_batch_size_per_gpu": micro, "run_name": label, "run_root": str(root)}
        cases[label] = {"settings": {**settings[kind], **own}, "deepspeed": zero(stage, precision, **extra)}

    for micro in [m for m in (8, 4, 2, 1) if m * ranks <= BATCH][: 4 if ranks < 4 else 1]:
        add("text", FP32, 2, micro)
    for stage in (0, 1, 3) if ranks < 4 else (3,):
        add("text", FP32, stage, 1)
    add("chat", FP32, 2, 1)
    if ranks < 4:
        for stage in (1, 2, 3):
            add("text", BF16, stage, 1)
        add("text", FP32, 2, 2, offload_optimizer={"device": "cpu"})
    return cases


@pytest.mark.parametrize("ranks", [1, 2, *(pytest.param(many, marks=pytest.mark.slow) for many in (4, 8))])
@pytest.mark.usefixtures("group")
def test_losses_equal_plain_torch(ranks, settings, two_ranks, tmp_path):
    cases = cases_for(ranks, settings, tmp_path)
    if ranks == 1:  # this process is a rank already
        for case in cases.values():
            train(**case)
    elif ranks == 2:
        two_ranks.train(list(cases.values()))
    else:
        with Ranks(ranks) as more:
            more.train(list(cases.values()))
    expected = {kind: plain_torch(settings[kind]) for kind in ("text", "chat")}
    for label in cases:
        found = losses(tmp_path / label)
        assert len(found) == STEPS
        tolerance = 5e-3 if "bf16" in label else 1e-5
        for step, (one, other) in enumerate(zip(found, expected[label.split("-")[0]]), 1):
            assert abs(one - other) <= tolerance * abs(other), f"{label} step {step}: {one}, plain torch {other}"
