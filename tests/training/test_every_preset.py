"""Every architecture through the whole trainer, at toy size on two ranks: it learns, equals plain torch, and resumes.

Two ranks train them (presets that repeat a mechanism are slow tests): each straight through, and then in new processes
a copy of what was left half-way goes on. Laws 1 and 2 of the project for each
mechanism: bitwise the same after the break (weights, moments, balancing biases, every loss), and the same losses as one
forward pass over the whole batch in plain torch, at ZeRO-2 and ZeRO-3. Balancing terms and multi-token losses are on:
their split over ranks is tested too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from minillm.data.loader import BatchLoader
from minillm.data.sequence_stream import build_stream
from minillm.data.sources import open_sources
from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.settings.presets import PRESETS
from minillm.settings.run import OptimSection
from minillm.training.expert_load import update_router_biases
from minillm.training.optim import build_parameter_groups
from tests.support.launching import checkpoint, losses, metrics, same_bits
from tests.support.ranks import Ranks
from tests.support.toy_presets import toy_fields

STEPS, HALF, COMPARED, BATCH, RATE, CLIP, DECAY = 20, 10, 4, 8, 3e-3, 1.0, 0.1
FP32 = {"zero_optimization": {"stage": 2}}
FP32_ZERO3 = {"zero_optimization": {"stage": 3}}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 2}}
NAMES = [name for name in PRESETS if name != "demo"]
KINDS = {"": (FP32, STEPS), "-zero3": (FP32_ZERO3, COMPARED), "-bf16": (BF16, COMPARED)}
# Each mechanism once: the others are made of the same modules.
OTHER_KINDS = ("gpt2-124m", "qwen3-mini", "moe-876m", "deepseek-v3-mini", "qwen3-next-mini")
# One of each mixer, router and norm; the rest are slow (mixtral-mini trains in test_expert_parallel.py too).
DEFAULT = ["gpt2-124m", "moe-876m", "deepseek-v3-mini", "qwen3-next-mini"]
EACH = [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
NOISY = [
    name
    for name in NAMES
    if PRESETS[name]["router_type"] == "noisy_topk" or PRESETS[name]["router_noise"] != "none"
]


def fields_of(name: str) -> dict[str, object]:
    """The toy, with every balancing term its router has."""
    fields = toy_fields(name, vocab_size=384, initializer_range=0.06)
    if fields["num_experts"]:
        fields["router_z_loss_coef"] = 1e-3
    if fields["router_bias_update_speed"]:
        fields["router_sequence_loss_coef"] = 1e-2  # 1e-4 would not show in four steps
    return fields


def settings_of(name: str, tiny_settings: dict, root: Path, run_name: str, steps: int) -> dict[str, object]:
    own = {key: value for key, value in tiny_settings.items() if not key.startswith("model.")}
    own |= {f"model.{field}": value for field, value in fields_of(name).items() if not field.endswith("token_id")}
    return own | {
        "model.preset": name, "run_root": str(root), "run_name": run_name, "train.max_steps": steps,
        "train.train_batch_size": BATCH, "train.train_micro_batch_size_per_gpu": 4, "optim.learning_rate": RATE,
        "optim.warmup_ratio": 0, "optim.lr_schedule": "constant", "optim.weight_decay": DECAY,
        "optim.gradient_clipping": CLIP, "validation.every": 0, "checkpoint.every": HALF, "validation.max_sequences": 8,
    }  # fmt: skip


def plain_torch(name: str, settings: dict) -> list[float]:
    """The whole global batch in one forward pass, torch's own AdamW and clipping; no engine, no ranks."""
    sources = open_sources(
        settings["data.train"],
        tokenizer_path=Path(settings["data.tokenizer"]),
        cache_dir=Path(settings["data.cache_dir"]),
    )
    stream = build_stream(sources, seq_len=settings["data.seq_len"], packing="concat", seed=42)
    loader = BatchLoader(stream, train_batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1)
    torch.manual_seed(42)
    model = MiniLLMForCausalLM(MiniLLMConfig(**fields_of(name))).train()
    defaults = OptimSection()
    optimizer = torch.optim.AdamW(
        build_parameter_groups(model, DECAY), lr=RATE, betas=(defaults.adam_beta1, defaults.adam_beta2), eps=1e-8
    )
    found = []
    for step in range(COMPARED):
        (batch,) = loader.batch_at(step).micro_batches
        output = model(**batch)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if output.routing is not None:
            update_router_biases(model, output.routing["counts"])
        found.append(output.losses["cross_entropy"].item())
    loader.close()
    return found


def train_all(names: list[str], tiny_settings: dict, root: Path, ranks: Ranks) -> Path:
    first, second = [], []
    for name in names:
        for kind, (deepspeed, steps) in KINDS.items():
            if kind and name not in OTHER_KINDS:
                continue
            settings = settings_of(name, tiny_settings, root, name + kind, steps)
            if deepspeed is FP32_ZERO3:
                settings["train.train_micro_batch_size_per_gpu"] = 2
            first.append({"settings": settings, "deepspeed": deepspeed})
        settings = settings_of(name, tiny_settings, root, f"{name}-broken", STEPS)
        second.append({"settings": settings, "deepspeed": FP32})
    ranks.train(first)
    for name in names:
        shutil.copytree(root / name, root / f"{name}-broken")
        shutil.rmtree(root / f"{name}-broken" / "checkpoints" / f"step-{STEPS:06d}")
    ranks.stop()  # what goes on does so in new processes
    ranks.train(second)
    return root


@pytest.fixture(scope="module")
def default_runs(tiny_settings, two_ranks, tmp_path_factory) -> Path:
    return train_all(DEFAULT, tiny_settings, tmp_path_factory.mktemp("presets"), two_ranks)


@pytest.fixture(scope="module")
def other_runs(tiny_settings, two_ranks, tmp_path_factory) -> Path:
    others = [name for name in NAMES if name not in DEFAULT]
    return train_all(others, tiny_settings, tmp_path_factory.mktemp("presets"), two_ranks)


@pytest.fixture
def trained(name: str, request) -> Path:
    return request.getfixturevalue("default_runs" if name in DEFAULT else "other_runs")


@pytest.mark.parametrize("name", EACH)
def test_it_learns_and_resumes_to_the_same_bits(trained, name):
    found = losses(trained / name)
    assert len(found) == STEPS
    assert sum(found[-3:]) / 3 < 0.85 * found[0], found
    assert losses(trained / f"{name}-broken") == found
    straight, broken = (checkpoint(trained / run_name, STEPS) for run_name in (name, f"{name}-broken"))
    assert same_bits(straight, broken)
    record = metrics(trained / name)[1]
    expected = {"load_balancing": "router_aux_loss_coef", "importance": "router_importance_loss_coef",
                "router_z": "router_z_loss_coef", "sequence_balancing": "router_sequence_loss_coef",
                "multi_token_1": "num_nextn_predict_layers"}  # fmt: skip
    assert {key for key, field in expected.items() if fields_of(name)[field]} == expected.keys() & record.keys()
    biases = [tensor for key, tensor in straight.items() if key.endswith("e_score_correction_bias")]
    assert all(b.abs().max() > 0 for b in biases) and bool(biases) == (PRESETS[name]["router_type"] == "sigmoid")


@pytest.mark.parametrize("name", [each for name, each in zip(NAMES, EACH, strict=True) if name not in NOISY])
def test_losses_equal_plain_torch(trained, tiny_settings, name):
    expected = plain_torch(name, settings_of(name, tiny_settings, trained, "none", COMPARED))
    assert losses(trained / name)[:COMPARED] == pytest.approx(expected, rel=1e-5)
    if name in OTHER_KINDS:
        assert losses(trained / f"{name}-zero3") == pytest.approx(expected, rel=1e-5)
        assert losses(trained / f"{name}-bf16") == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("name", [each for name, each in zip(NAMES, EACH, strict=True) if name in NOISY])
def test_with_router_noise_it_learns_at_every_stage_and_begins_like_plain_torch(trained, tiny_settings, name):
    for kind in ("zero3", "bf16") if name in OTHER_KINDS else ():
        assert losses(trained / f"{name}-{kind}")[-1] < losses(trained / f"{name}-{kind}")[0]
    # Each rank draws its own noise, so only what comes before the first draw's effect can be compared: the loss of an
    # untrained model hardly depends on which experts it chose.
    expected = plain_torch(name, settings_of(name, tiny_settings, trained, "none", COMPARED))
    assert losses(trained / name)[0] == pytest.approx(expected[0], rel=5e-3)
