"""Experts shared out among two ranks: the same losses as plain torch, bitwise resume, and resume with another backend.

Two ranks run every case straight through; copies of what was left half-way go on in new processes: on two ranks with
the same backend or another, on one rank, and on four, where ranks share experts as well as share them out. By default
six runs, one of each law (QUICK); all of them are slow.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from minillm.interop import native_family, to_transformers
from minillm.interop.convert import load_as_minillm
from minillm.settings.presets import PRESETS
from tests.support.launching import checkpoint, losses, metrics, same_bits
from tests.support.ranks import Ranks
from tests.support.toy_presets import toy_fields

STEPS, HALF = 6, 3
FP32 = {stage: {"zero_optimization": {"stage": stage}} for stage in (1, 2, 3)}
_BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
BF16 = {stage: {**_BF16, "zero_optimization": {"stage": stage}} for stage in (2, 3)}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
CHECKPOINTED = {"train.gradient_checkpointing": True}
GATED = ["mixtral-mini", "deepseek-v3-mini"]
# name -> (preset, DeepSpeed's JSON, backend, expert-parallel size, other settings)
Runs = dict[str, tuple[str, dict, str, int, dict]]
STRAIGHT: Runs = {
    **{f"{p}-torch": (p, FP32[2], "torch", 1, {}) for p in (*GATED, "moe-876m")},
    **{f"{p}-deepspeed": (p, FP32[2], "deepspeed", 2, {}) for p in (*GATED, "moe-876m")},
    **{f"{p}-autoep": (p, FP32[3], "autoep", 2, {}) for p in GATED},
    "mixtral-mini-deepspeed-one": ("mixtral-mini", FP32[1], "deepspeed", 1, {}),
    "mixtral-mini-autoep-two": ("mixtral-mini", FP32[2], "autoep", 2, {}),
    "mixtral-mini-bf16-torch": ("mixtral-mini", BF16[2], "torch", 1, {}),
    "mixtral-mini-bf16-deepspeed": ("mixtral-mini", BF16[2], "deepspeed", 2, {}),
    "mixtral-mini-bf16-autoep": ("mixtral-mini", BF16[3], "autoep", 2, {}),
    "mixtral-mini-dropping": (
        "mixtral-mini", FP32[2], "deepspeed", 2, {"model.moe_capacity_factor": 1.0, "model.moe_min_capacity": 1}
    ),
}  # fmt: skip
QUICK = ["mixtral-mini-torch", "mixtral-mini-deepspeed", "mixtral-mini-autoep", "mixtral-mini-dropping",
         "deepseek-v3-mini-torch", "deepseek-v3-mini-autoep"]  # one of each law; the others are slow
OTHERS = ["qwen3-moe-mini", "qwen3-next-mini"]
MORE: Runs = {  # slow
    **{f"{p}-torch": (p, FP32[2], "torch", 1, {}) for p in ("mixtral-mini", *OTHERS)},
    **{f"{p}-deepspeed": (p, FP32[2], "deepspeed", 2, {}) for p in OTHERS},
    **{f"{p}-autoep": (p, FP32[3], "autoep", 2, {}) for p in OTHERS},
    "mixtral-mini-deepspeed-recompute": ("mixtral-mini", FP32[2], "deepspeed", 2, CHECKPOINTED),
    "mixtral-mini-deepspeed-offload": ("mixtral-mini", OFFLOAD, "deepspeed", 2, {}),
    "mixtral-mini-autoep-recompute": ("mixtral-mini", FP32[3], "autoep", 2, CHECKPOINTED),
    "mixtral-mini-autoep-offload": ("mixtral-mini", OFFLOAD, "autoep", 2, {}),
}  # fmt: skip
# resumed in new processes to the same bits
SAME = ["mixtral-mini-deepspeed", "moe-876m-deepspeed", "deepseek-v3-mini-autoep", "mixtral-mini-bf16-deepspeed",
        "mixtral-mini-bf16-autoep", "mixtral-mini-dropping"]  # fmt: skip
# (saved by) -> (ZeRO, backend, size) it goes on with
OTHER = {
    "deepseek-v3-mini-deepspeed": [(FP32[3], "autoep", 2), (FP32[1], "torch", 1)],
    "deepseek-v3-mini-autoep": [(FP32[2], "deepspeed", 2), (FP32[1], "autoep", 1)],
    "mixtral-mini-torch": [(FP32[1], "deepspeed", 1), (FP32[3], "autoep", 2)],
}
ON_FOUR_RANKS = [("mixtral-mini-deepspeed", FP32[2], "deepspeed", 2), ("mixtral-mini-autoep", FP32[3], "autoep", 2),
                 ("deepseek-v3-mini-torch", FP32[3], "autoep", 4)]  # fmt: skip
ON_ONE_RANK = [("mixtral-mini-deepspeed", "torch"), ("mixtral-mini-autoep", "torch"), ("moe-876m-torch", "deepspeed")]


def case(name: str, settings: dict, root: Path, runs: Runs, **changes: object) -> dict:
    preset, deepspeed, backend, size, extra = runs[name]
    fields = toy_fields(preset, vocab_size=384, initializer_range=0.06)
    own = {key: value for key, value in settings.items() if not key.startswith("model.")}
    own |= {f"model.{field}": value for field, value in fields.items() if not field.endswith("token_id")}
    own |= {
        "model.preset": preset, "model.moe_backend": backend, "model.expert_parallel_size": size, **extra,
        "run_root": str(root), "run_name": name, "train.max_steps": STEPS, "train.train_batch_size": 8,
        "train.train_micro_batch_size_per_gpu": 2, "optim.warmup_ratio": 0, "optim.lr_schedule": "constant",
        "validation.every": HALF, "validation.max_sequences": 8, "checkpoint.every": HALF,
    }  # fmt: skip
    deepspeed = changes.pop("deepspeed", deepspeed)
    return {"settings": own | changes, "deepspeed": deepspeed}


def half_of(root: Path, name: str, copy: str) -> str:
    shutil.copytree(root / name, root / copy)
    shutil.rmtree(root / copy / "checkpoints" / f"step-{STEPS:06d}")
    return copy


def other_name(name: str, backend: str, size: int, stage: int) -> str:
    return f"{name}-then-{backend}-{size}-zero{stage}"


def each(names) -> list:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def train_all(names: list[str], settings: dict, root: Path, ranks: Ranks) -> Path:
    """Straight through, and then in new processes what SAME and OTHER say of these names."""
    ranks.train([case(name, settings, root, STRAIGHT) for name in names])
    second = []
    for name in names:
        if name in SAME:
            copy = half_of(root, name, f"{name}-broken")
            second.append(case(name, settings, root, STRAIGHT, run_name=copy))
        for deepspeed, backend, size in OTHER.get(name, ()):
            stage = deepspeed["zero_optimization"]["stage"]
            copy = half_of(root, name, other_name(name, backend, size, stage))
            changes = {"run_name": copy, "model.moe_backend": backend, "model.expert_parallel_size": size}
            second.append(case(name, settings, root, STRAIGHT, deepspeed=deepspeed, **changes))
    ranks.stop()
    ranks.train(second)
    return root


@pytest.fixture(scope="module")
def trained(tiny_settings, two_ranks, tmp_path_factory) -> Path:
    return train_all(QUICK, tiny_settings, tmp_path_factory.mktemp("experts"), two_ranks)


@pytest.fixture(scope="module")
def all_trained(trained, two_ranks, tiny_settings) -> Path:
    return train_all([name for name in STRAIGHT if name not in QUICK], tiny_settings, trained, two_ranks)


@pytest.fixture
def runs(name: str, request) -> Path:
    return request.getfixturevalue("trained" if name in QUICK else "all_trained")


@pytest.fixture(scope="module")
def elsewhere(all_trained, tiny_settings) -> Path:
    """What one rank and four make of what two left half-way; the fault campaign's elastic runs do it both ways."""
    root = all_trained
    third = []
    for name, backend in ON_ONE_RANK:
        copy = half_of(root, name, f"{name}-one-rank")
        changes = {"run_name": copy, "model.moe_backend": backend, "model.expert_parallel_size": 1}
        third.append(case(name, tiny_settings, root, STRAIGHT, **changes))
        third[-1]["deepspeed"] = FP32[1]
    with Ranks(1) as one:
        one.train(third)
    fourth = []
    for name, deepspeed, backend, size in ON_FOUR_RANKS:
        copy = half_of(root, name, f"{name}-four-ranks")
        changes = {"run_name": copy, "model.moe_backend": backend, "model.expert_parallel_size": size}
        fourth.append(case(name, tiny_settings, root, STRAIGHT, deepspeed=deepspeed, **changes))
    with Ranks(4) as four:
        four.train(fourth)
    return root


DROPLESS = [n for n in STRAIGHT if not n.endswith(("torch", "dropping")) and "moe-876m" not in n]


@pytest.mark.parametrize("name", each(DROPLESS))
def test_losses_equal_those_of_experts_in_plain_torch(runs, name):
    base = "mixtral-mini-bf16-torch" if "bf16" in name else f"{STRAIGHT[name][0]}-torch"
    assert len(losses(runs / name)) == STEPS
    tolerance = 5e-3 if "bf16" in name else 1e-5
    assert losses(runs / name) == pytest.approx(losses(runs / base), rel=tolerance)
    if "bf16" not in name:  # where single tokens take another way from step to step
        norms, expected = ([r["grad_norm"] for r in metrics(runs / n) if "loss" in r] for n in (name, base))
        assert norms == pytest.approx(expected, rel=1e-4)  # one global norm, every expert in it once
    one, other = ([r["val_loss"] for r in metrics(runs / n) if "val_loss" in r] for n in (name, base))
    assert one == pytest.approx(other, rel=tolerance)


@pytest.mark.slow
def test_noisy_routers_train_with_shared_out_experts(all_trained):
    """Each rank draws its own noise, the same with either backend."""
    found, expected = (losses(all_trained / f"moe-876m-{backend}") for backend in ("deepspeed", "torch"))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", each(SAME))
def test_a_break_changes_no_bit(runs, name):
    assert losses(runs / f"{name}-broken") == losses(runs / name)
    assert same_bits(checkpoint(runs / f"{name}-broken", STEPS), checkpoint(runs / name, STEPS))


@pytest.mark.parametrize("name", each(OTHER))
def test_another_backend_and_zero_stage_go_on(runs, name):
    for deepspeed, backend, size in OTHER[name]:
        copy = other_name(name, backend, size, deepspeed["zero_optimization"]["stage"])
        assert losses(runs / copy) == pytest.approx(losses(runs / name), rel=1e-5), copy
        straight, other = checkpoint(runs / name, STEPS), checkpoint(runs / copy, STEPS)
        assert straight.keys() == other.keys()
        for key, tensor in straight.items():
            assert (tensor - other[key]).norm() <= 1e-3 * tensor.norm(), (copy, key)
            if key.endswith("e_score_correction_bias"):  # moved by global counts, once a step
                assert torch.equal(tensor, other[key]) and tensor.any()


@pytest.mark.slow
@pytest.mark.parametrize("name,backend", ON_ONE_RANK)
def test_one_rank_goes_on(elsewhere, trained, name, backend):
    # With router noise a rank's draws depend on how many ranks there are.
    tolerance = 2e-2 if name.startswith("moe-876m") else 1e-5
    assert losses(trained / f"{name}-one-rank") == pytest.approx(losses(trained / name), rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, *_ in ON_FOUR_RANKS])
def test_four_ranks_go_on(elsewhere, trained, name):
    assert losses(trained / f"{name}-four-ranks") == pytest.approx(losses(trained / name), rel=1e-5)
    four, two = ([r["grad_norm"] for r in metrics(trained / n)] for n in (f"{name}-four-ranks", name))
    assert four == pytest.approx(two, rel=1e-4)


def test_checkpoints_hold_every_expert_under_one_name(trained):
    """Whoever ran them, and however they were shared out: the names and shapes of the model in one process."""
    names = {n: checkpoint(trained / f"mixtral-mini-{n}", STEPS) for n in ("torch", "deepspeed", "autoep")}
    shapes = {n: {key: tensor.shape for key, tensor in tensors.items()} for n, tensors in names.items()}
    assert shapes["torch"] == shapes["deepspeed"] == shapes["autoep"]
    for tensors in names.values():
        experts = tensors["model.layers.1.mlp.experts.gate_up_proj"]
        assert experts.shape[0] == PRESETS["mixtral-mini"]["num_experts"]
        for one in range(len(experts)):
            for other in range(one):
                assert not torch.equal(experts[one], experts[other])


def test_experts_differ_from_the_first_step_on(trained, tiny_settings):
    """DeepSpeed's MoE layer copies one expert; ours bring their own weights. Half-way they are far apart."""
    for backend in ("deepspeed", "autoep"):
        experts = checkpoint(trained / f"mixtral-mini-{backend}", HALF)["model.layers.0.mlp.experts.down_proj"]
        distances = torch.pdist(experts.flatten(1))
        assert distances.min() > 0.5 * experts.flatten(1).norm(dim=1).min()


def test_dropping_is_counted_and_changes_the_losses(trained):
    records = [json.loads(line) for line in (trained / "mixtral-mini-dropping" / "experts.jsonl").open()]
    assert len(records) == STEPS and all(0 < share < 0.5 for share in records[0]["dropped"])
    dropless = [json.loads(line) for line in (trained / "mixtral-mini-deepspeed" / "experts.jsonl").open()]
    assert all(share == 0 for record in dropless for share in record["dropped"])
    assert losses(trained / "mixtral-mini-dropping") != pytest.approx(losses(trained / "mixtral-mini-torch"), rel=1e-4)


@pytest.mark.parametrize("preset", GATED)
def test_what_shared_out_experts_learned_exports_to_transformers(trained, preset):
    check_export(trained / f"{preset}-autoep")


@torch.no_grad()
def check_export(run_dir: Path) -> None:
    """Native class, the same logits, from a checkpoint that AutoEP's ranks wrote; no DeepSpeed on the way."""
    ours = load_as_minillm(run_dir / "checkpoints" / f"step-{STEPS:06d}").eval()
    assert native_family(ours.config)
    theirs = to_transformers(ours).eval()
    ids = torch.randint(0, 384, (2, 17), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=1e-4)


@pytest.mark.slow
def test_other_presets_recomputation_and_offload(tiny_settings, two_ranks, tmp_path):
    two_ranks.train([case(name, tiny_settings, tmp_path, MORE) for name in MORE])
    for name, (preset, *_) in MORE.items():
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / f"{preset}-torch"), rel=1e-5), name
    for preset in OTHERS:
        check_export(tmp_path / f"{preset}-autoep")


@pytest.mark.slow
def test_the_rest_of_the_model_may_be_compiled(tiny_settings, two_ranks, tmp_path):
    """torch.compile leaves the experts alone; training and validation, fp32 and bf16."""
    runs = {name: STRAIGHT[name] for name in ("mixtral-mini-torch", "mixtral-mini-deepspeed", "mixtral-mini-autoep",
                                              "mixtral-mini-bf16-autoep")}  # fmt: skip
    compiled = {"train.compile": True, "train.max_steps": 2}
    two_ranks.train([case(name, tiny_settings, tmp_path, runs, **compiled) for name in runs])
    expected = losses(tmp_path / "mixtral-mini-torch")
    for name in runs:
        assert losses(tmp_path / name) == pytest.approx(expected, rel=5e-3 if "bf16" in name else 1e-5), name
        assert metrics(tmp_path / name)[-1]["val_loss"] < 7
