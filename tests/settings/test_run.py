"""Configuration: precedence, types, reading back, and how a batch is split (mistakes: test_mistakes.py)."""

from __future__ import annotations

import pytest
import yaml

from minillm.settings.reading import load_run_config, read_yaml
from minillm.settings.run import dump_run_config, resolve_accumulation
from minillm.utils.errors import UserError
from minillm.utils.yaml_values import as_number, load_yaml
from tests.support.launching import ROOT

CONFIGS = ROOT / "launch" / "configs"


def load(*overrides: str, config: str = "demo", stage: str = "pretrain"):
    return load_run_config(config, list(overrides), stage=stage, configs_dir=CONFIGS)


def problems(*overrides: str, **options) -> str:
    return "\n".join(load(*overrides, **options)[1])


def test_command_line_over_yaml_over_default(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {max_steps: 7}\noptim: {learning_rate: 0.5}\n")
    run, found = load("optim.learning_rate=3e-4", config=str(path))
    assert not found
    assert (run.train.max_steps, run.optim.learning_rate, run.optim.weight_decay) == (7, 3e-4, 0.1)
    assert run.run_name == "mine"  # the file's name


def test_values_take_the_type_they_need():
    run, found = load("model.rope_theta=1e6", "optim.learning_rate=3e-4", "run_name=2024")
    assert not found and run.model.model_extra["rope_theta"] == 1e6 and run.run_name == "2024"


@pytest.mark.parametrize("name", ["0123", "1_000", "2024", "2024-11-27", "1e3", "1.50", "no", "on", "007"])
def test_a_name_keeps_its_spelling(name, tmp_path):
    run, found = load(f"run_name={name}", f"data.tokenizer={name}", f"samples.prompts=[{name}]")
    assert not found and (run.run_name, run.data.tokenizer, run.samples.prompts) == (name, name, [name])
    path = tmp_path / "mine.yaml"
    path.write_text(f"run_name: {name}\ntrain: {{max_steps: 1}}\n")
    run, found = load(config=str(path))
    assert not found and run.run_name == name
    path.write_text(dump_run_config(run), encoding="utf-8")
    assert load(config=str(path))[0].run_name == name


def test_words_that_yaml_1_1_takes_for_truths_are_words():
    assert "model.preset = 'no': unknown preset" in problems("model.preset=no")
    assert problems("run_name=1:30") == "run_name = '1:30': string should match pattern '^\\w[\\w.\\-]*$' " \
        "(a folder's name; default: the config's) (from command line)"  # fmt: skip


def test_the_settings_of_an_older_version_are_read_as_they_were():
    """Written by PyYAML, whose strings that look like numbers are quoted."""
    path = ROOT / "tests" / "golden" / "old_run" / "runs" / "old" / "run.yaml"
    recorded = yaml.safe_load(path.read_text())
    assert as_number(read_yaml(path)) == recorded
    for text in ("a: '0123'", "a: 1.0e-08", "a: 'no'", "a: true", "a: '2024-11-27'", "a: 1.0e-05", "a: null", "a: -3"):
        assert as_number(load_yaml(text)) == yaml.safe_load(text)


def test_resolved_config_reads_back(tmp_path):
    run, _ = load("model.hidden_size=96", "run_name=试验")
    path = tmp_path / "run.yaml"
    path.write_text(dump_run_config(run), encoding="utf-8")
    assert as_number(read_yaml(path)) == run.model_dump()
    again, found = load(config=str(path))
    assert not found and again == run


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.preset=deepseek-v3-mini", "model.q_lora_rank=null"),
        ("model.preset=mistral-mini", "model.sliding_window=null", "model.layer_types=null"),
        ("model.preset=gpt2-124m", "model.vocab_size=300"),
        ("model.preset=qwen3-mini", "model.rope_scaling={rope_type: linear, factor: 4}"),
    ],
)
def test_a_preset_can_be_changed_into_what_it_was_not(overrides):
    assert problems(*overrides) == ""


def test_unknown_config_name_lists_the_shipped_ones():
    with pytest.raises(UserError, match="did you mean `demo`"):
        load(config="demmo")


@pytest.mark.parametrize("ranks, micro", [(1, 8), (2, 8), (4, 4), (8, 2), (16, 1)])
def test_an_auto_micro_batch_is_the_most_that_divides(ranks, micro):
    run, _ = load("train.train_batch_size=16")
    assert resolve_accumulation(run, ranks) * micro * ranks == 16
    assert run.train.train_micro_batch_size_per_gpu == micro


@pytest.mark.parametrize("batch, micro, ranks, expected", [(16, 8, 1, 2), (16, 2, 8, 1), (24, 1, 3, 8)])
def test_accumulation_is_batch_over_micro_batch_and_ranks(batch, micro, ranks, expected):
    run, _ = load(f"train.train_batch_size={batch}", f"train.train_micro_batch_size_per_gpu={micro}")
    assert resolve_accumulation(run, ranks) == expected


def test_a_batch_that_does_not_divide_says_what_would():
    run, _ = load("train.train_batch_size=16", "train.train_micro_batch_size_per_gpu=8")
    with pytest.raises(UserError, match=r"use train.train_micro_batch_size_per_gpu=4"):
        resolve_accumulation(run, 4)
    with pytest.raises(UserError, match=r"use train.train_batch_size=24, or fewer ranks"):
        resolve_accumulation(run, 3)
