"""DeepSpeed's JSON: "auto" resolved from the run, what the shipped files hold (mistakes: test_mistakes.py)."""

from __future__ import annotations

import json

import pytest

from minillm.planning.states import Zero, buffers, parameter_groups
from minillm.settings.deepspeed_json import read_deepspeed_json, resolve_deepspeed_config
from minillm.settings.presets import PRESETS
from minillm.settings.reading import load_run_config
from minillm.utils.errors import UserError
from tests.settings.mistakes import ZERO2
from tests.support.launching import ROOT


@pytest.fixture
def demo_run():
    words = ["train.train_batch_size=16", "train.train_micro_batch_size_per_gpu=8"]
    return load_run_config("demo", words, stage="pretrain", configs_dir=ROOT / "launch" / "configs")[0]


def problems(values: dict, run, world_size: int = 1) -> str:
    return "\n".join(resolve_deepspeed_config(values, run, world_size, "some.json")[1])


def test_auto_takes_the_runs_values(demo_run):
    values = read_deepspeed_json(ROOT / "ds_configs" / "zero2.json")
    resolved, found = resolve_deepspeed_config(values, demo_run, 2, "zero2.json")
    assert not found
    assert resolved["train_batch_size"] == 16 and resolved["train_micro_batch_size_per_gpu"] == 8
    assert resolved["gradient_accumulation_steps"] == 1 and resolved["gradient_clipping"] == 1.0
    assert values["train_batch_size"] == "auto"  # the caller's stays as it was


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("zero*.json")), ids=lambda path: path.stem)
def test_no_shipped_file_takes_a_gigabyte_of_buckets(path):
    """DeepSpeed's own bucket is of 5e8 elements: a GB in fp16, two with overlap_comm, of the 16 of a T4."""
    zero = Zero.of(read_deepspeed_json(path))
    assert zero.reduce_bucket <= 5e7
    held = buffers(parameter_groups(PRESETS["dense-26m"], "torch", 1, 2), zero, 0)
    assert held.always + max(held.backward, held.reduction, held.update) < 2**30


def test_gradients_are_sent_beside_the_backward_pass_where_cards_share_them():
    zeros = {name: Zero.of(read_deepspeed_json(name)) for name in ("zero1", "zero2", "zero2_fp16", "zero3")}
    assert [name for name, zero in zeros.items() if not zero.overlap] == []


def test_clipping_is_always_written_out(demo_run):
    demo_run.optim.gradient_clipping = 0.0  # DeepSpeed would clip at 1.0 where the key is missing
    assert resolve_deepspeed_config(ZERO2, demo_run, 1, "")[0]["gradient_clipping"] == 0.0
    assert "gradient_clipping = 5.0" in problems({**ZERO2, "gradient_clipping": 5.0}, demo_run)


def test_null_sections_are_absent_ones(demo_run):
    values = {**ZERO2, "data_types": None, "zero_optimization": {"stage": 2, "offload_optimizer": None}}
    assert not problems(values, demo_run)
    assert not Zero.of(values).offload_optimizer


def test_a_file_that_is_not_there_names_the_shipped_ones(tmp_path):
    with pytest.raises(UserError, match="no such file; shipped configurations: .*zero2.json"):
        read_deepspeed_json(tmp_path / "none.json")


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.name)
def test_known_keys_are_deepspeeds_own(path):
    """Every key of a shipped file is one that DeepSpeed's own models accept (they forbid others)."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    values = json.loads(path.read_text())
    DeepSpeedZeroConfig(**{k: v for k, v in values["zero_optimization"].items()})
    DeepSpeedBF16Config(**values.get("bf16", {}))
    DeepSpeedFP16Config(**values.get("fp16", {}))


def test_what_deepspeed_would_update_by_an_adamw_of_its_own_is_refused_with_muon(demo_run):
    offload = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}
    assert not problems({**ZERO2, **offload}, demo_run)
    demo_run.optim.name = "muon"
    text = problems({**ZERO2, **offload}, demo_run)
    for part in ("offload_optimizer.ratio = 0.5", "an AdamW of its own", "remove it, or use optim.name=adamw"):
        assert part in text
    del offload["zero_optimization"]["offload_optimizer"]["ratio"]
    assert not problems({**ZERO2, **offload}, demo_run)
