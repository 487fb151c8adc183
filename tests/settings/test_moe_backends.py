"""Which backend may run whose experts: what `auto` chooses, what is refused with the legal choices, and that every
preset with experts can be shared out over the 8 cards of a node."""

from __future__ import annotations

import pytest

from minillm import describe
from minillm.settings.deepspeed_json import read_deepspeed_json, resolve_deepspeed_config
from minillm.settings.moe_backends import backend_problems, has_experts, resolve_moe_backend
from minillm.settings.presets import PRESETS
from minillm.settings.reading import load_run_config
from tests.support.launching import ROOT

SPARSE = [name for name, fields in PRESETS.items() if has_experts(fields)]


def settle(json_name: str, preset: str, *words: str, ranks: int = 8, **zero: object):
    """(backend, size, DeepSpeed's expert_parallel, problems) of a run with a shipped JSON."""
    words = (f"model.preset={preset}", "train.train_batch_size=48", *words)
    run, problems = load_run_config("demo", list(words), stage="pretrain", configs_dir=ROOT / "launch" / "configs")
    values = read_deepspeed_json(ROOT / "ds_configs" / json_name)
    values["zero_optimization"] |= zero
    resolved, more = resolve_deepspeed_config(values, run, ranks, json_name)
    assert not problems + more, problems + more
    found = resolve_moe_backend(run, PRESETS[preset], resolved, ranks)
    return run.model.moe_backend, run.model.expert_parallel_size, resolved.get("expert_parallel"), "\n".join(found)


@pytest.mark.parametrize(
    "json_name, words, expected",
    [
        ("zero2.json", [], ("torch", 1)),
        ("zero3.json", [], ("torch", 1)),
        ("zero2.json", ["model.expert_parallel_size=auto"], ("deepspeed", 8)),
        ("moe_zero2.json", ["model.expert_parallel_size=4"], ("deepspeed", 4)),
        ("zero3.json", ["model.expert_parallel_size=2"], ("autoep", 2)),
        ("moe_zero3.json", [], ("autoep", 1)),
        ("moe_zero3.json", ["model.expert_parallel_size=auto"], ("autoep", 8)),
        ("moe_zero2.json", ["model.moe_backend=autoep", "model.expert_parallel_size=2"], ("autoep", 2)),
        ("moe_zero2.json", ["model.moe_backend=torch", "model.expert_parallel_size=auto"], ("torch", 1)),
    ],
)
def test_what_auto_means(json_name, words, expected):
    backend, size, section, problems = settle(json_name, "mixtral-mini", *words)
    assert not problems and (backend, size) == expected
    if backend == "autoep":
        assert section["enabled"] is True and section["autoep_size"] == size


def test_auto_takes_what_the_experts_allow():
    assert settle("zero3.json", "moe-876m", "model.expert_parallel_size=auto")[:2] == ("torch", 1)  # biases, ZeRO-3
    assert settle("zero2.json", "qwen3-moe-mini", "model.expert_parallel_size=auto")[:2] == ("deepspeed", 4)
    assert settle("zero2.json", "mixtral-mini", "model.expert_parallel_size=auto", ranks=6)[:2] == ("deepspeed", 2)


def test_settling_twice_changes_nothing():
    words = ["model.moe_backend=autoep", "model.expert_parallel_size=4"]
    once = settle("moe_zero3.json", "mixtral-mini", "model.expert_parallel_size=4")
    assert settle("moe_zero3.json", "mixtral-mini", *words)[:3] == once[:3]


LEGAL = "torch (ZeRO 0, 1, 2, 3; size 1), deepspeed (ZeRO 1, 2; size 1, 2, 4, 8)"


@pytest.mark.parametrize(
    "json_name, preset, words, expected",
    [
        ("moe_zero3.json", "moe-876m", [], ["gated experts without biases", LEGAL]),
        ("zero3.json", "mixtral-mini", ["model.moe_backend=deepspeed"], ["cannot run under ZeRO-3", LEGAL]),
        ("zero2.json", "mixtral-mini", ["model.expert_parallel_size=3"], ["does not divide num_experts (8)", LEGAL]),
        ("zero2.json", "qwen3-moe-mini", ["model.expert_parallel_size=8"], ["does not divide num_experts (4)"]),
        ("zero2.json", "mixtral-mini", ["model.moe_backend=torch", "model.expert_parallel_size=2"], ["every expert"]),
        ("moe_zero3.json", "mixtral-mini", ["model.moe_backend=deepspeed"], ["expert_parallel.enabled", "auto"]),
        ("moe_zero3.json", "llama3-mini", [], ["has no experts", "zero3.json"]),
        ("zero2.json", "llama3-mini", ["model.expert_parallel_size=2"], ["has no experts", "auto and 1"]),
        ("zero2.json", "mixtral-mini", ["model.moe_capacity_factor=1.25"], ["only moe_backend deepspeed drops"]),
        ("zero2.json", "mixtral-mini", ["model.moe_min_capacity=16"], ["only moe_capacity_factor reads it"]),
    ],
)
def test_the_illegal_is_refused_with_the_legal_choices(json_name, preset, words, expected):
    text = settle(json_name, preset, *words)[3]
    for part in expected:
        assert part in text, text


def test_zero_options_that_deepspeed_refuses_with_experts_are_named():
    words = ["model.expert_parallel_size=2"]
    assert "zero_optimization.contiguous_gradients" in settle(
        "zero2.json", "mixtral-mini", *words, contiguous_gradients=False
    )[3]  # fmt: skip
    assert "zero_optimization.reduce_scatter" in settle("zero1.json", "mixtral-mini", *words, reduce_scatter=False)[3]
    quantised = settle("moe_zero3.json", "mixtral-mini", *words, zero_quantized_gradients=True)[3]
    assert "zero_quantized_gradients" in quantised
    assert "zero_hpz_partition_size" in settle("moe_zero3.json", "mixtral-mini", *words, zero_hpz_partition_size=2)[3]
    zero0 = {"zero_optimization": {"stage": 0}}
    assert "gradient norm" in backend_problems(PRESETS["mixtral-mini"], "deepspeed", 2, zero0, 8)[0]


def test_the_two_places_that_say_the_size_must_agree():
    configs = ROOT / "launch" / "configs"
    run, _ = load_run_config("demo", ["model.preset=mixtral-mini"], stage="pretrain", configs_dir=configs)
    values = {"expert_parallel": {"enabled": True, "autoep_size": 4}, "zero_optimization": {"stage": 3}}
    found = resolve_moe_backend(run, PRESETS["mixtral-mini"], values, 8)
    assert "autoep_size = 4, but model.expert_parallel_size = 1" in found[0]


@pytest.mark.parametrize("preset", SPARSE)
def test_every_preset_with_experts_can_be_shared_out_on_a_node(preset):
    values = {"zero_optimization": {"stage": 2}}
    sizes = [s for s in (2, 4, 8) if not backend_problems(PRESETS[preset], "deepspeed", s, values, 8)]
    assert sizes, preset


def test_the_table_is_the_readmes(capsys):
    assert describe.main(["--backends", "8"]) == 0
    table = capsys.readouterr().out.strip()
    assert len(table.splitlines()) == 2 + len(SPARSE)
    assert table in (ROOT / "minillm" / "training" / "README.md").read_text(encoding="utf-8")
