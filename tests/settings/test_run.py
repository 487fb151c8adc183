"""Configuration: precedence, and one clear error for every kind of mistake, all of them at once."""

from __future__ import annotations

import pytest
import yaml

from minillm.settings.reading import load_run_config, read_yaml
from minillm.settings.run import dump_run_config, raise_problems, resolve_accumulation
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
    "override, expected",
    [
        ("optim.learning_rat=1", ["optim.learning_rat", "did you mean `learning_rate`", "command line"]),
        ("learning_rate=1", ["did you mean `optim.learning_rate`"]),
        ("optimizer.lr=1", ["optimizer: unknown key"]),
        ("model.hiden_size=64", ["model.hiden_size", "did you mean `hidden_size`"]),
        ("model.hidden_size=big", ["model.hidden_size is 'big'", "whole number"]),
        ("model.preset=dense-26", ["did you mean `dense-26m`"]),
        ("train.max_steps=0", ["train.max_steps = 0", "greater than or equal to 1"]),
        ("train.max_steps=many", ["train.max_steps = 'many'", "integer"]),
        ("train.num_epochs=2", ["train.max_steps / train.num_epochs", "both are given"]),
        ("train.max_steps=null", ["neither is given"]),
        ("data.stride=0", ["data.stride = 0", "greater than or equal to 1"]),
        ("data.stride=129", ["data.stride = 129", "above data.seq_len = 128", "choose 1 to 128"]),
        ("data={stride: 8, packing: none, seq_len: 128}", ["data.stride = 8", "only data.packing=concat has windows"]),
        ("model.attention_type=mha", ["model.attention_type is 'mha'", "gqa, mla"]),
        ("model.attention_type=mla", ["model.kv_lora_rank is null", "model.v_head_dim is null"]),
        ("model.num_key_value_heads=3", ["model.num_key_value_heads is 3", "must divide num_attention_heads (8)"]),
        ("model.sliding_window=64", ["model.sliding_window is 64", "sliding_attention layers"]),
        ("model.layer_types=[full_attention]", ["model.layer_types names 1 layers", "num_hidden_layers (4)"]),
        ("model.layer_types=[a,b,c,d]", ["layer_types holds 'a'", "full_attention, sliding_attention"]),
        ("model.rope_scaling={rope_type: ntk, factor: 2}", ["rope_type is 'ntk'", "linear, dynamic, yarn, llama3"]),
        ("model.rope_scaling={rope_type: yarn, factor: 2}", ["yarn needs original_max_position_embeddings"]),
        ("model.num_experts=4", ["model.num_experts", "only sparse layers"]),
        ("model.partial_rotary_factor=2.0", ["model.partial_rotary_factor is 2.0", "at most 1"]),
        ("model.rope_theta=1", ["model.rope_theta is 1.0", "above 1"]),
        ("model.rms_norm_eps=.inf", ["model.rms_norm_eps is inf", "a number above 0"]),
        ("model.hidden_size=.inf", ["model.hidden_size is inf", "a whole number"]),
        ("model.rope_scaling={rope_type: [yarn], factor: 2}", ["rope_type is ['yarn']", "valid names"]),
        ("model.rope_scaling={rope_type: linear, factor: 2, 1: 2, b: 3}", ["linear does not know 1", "not know b"]),
        ("model.eos_token_id=5", ["token ids are the tokenizer's"]),
        ("model.router_aux_loss_coef=0.5", ["only sparse layers", "leave it at 0.0"]),
        ("model.mtp_loss_coef=2", ["model.mtp_loss_coef is 2.0", "num_nextn_predict_layers above 0"]),
        (("model.preset=mistral-mini", "model.sliding_window=1"), ["it must be 2 or more"]),
        (("model.preset=deepseek-v3-mini", "model.partial_rotary_factor=0.5"), ["only attention_type gqa"]),
        (("model.preset=moe-876m", "model.norm_topk_prob=false"), ["model.norm_topk_prob is false", "softmax"]),
        (("model.preset=char-tiny", "model.partial_rotary_factor=0.5"), ["position_embedding_type rope"]),
        (("model.preset=deepseek-v3-mini", "model.num_key_value_heads=2"), ["num_key_value_heads is 2", "be equal"]),
        (("model.init_from=x", "model.rope_scaling=linear"), ["rope_scaling is 'linear'", "a mapping"]),
        ("model.hidden_dropout=1.5", ["model.hidden_dropout is 1.5", "a probability"]),
        ("model.hidden_act=relu", ["model.hidden_act is 'relu'", "silu, gelu, gelu_new"]),
        ("model.num_hidden_layers=2.5", ["model.num_hidden_layers is 2.5", "a whole number"]),
        ("data.seq_len=100000", ["data.seq_len = 100000", "512 positions"]),
        ("data.train=somewhere", ["data.tokenizer: needed"]),
        ("data.train=[]", ["data.train = []", "at least 1"]),
        ("samples.prompts=['']", ["samples.prompts.0", "at least 1"]),
        ("run_name=..", ["run_name = '..'"]),
        ("optim.lr_schedule=linear", ["optim.lr_schedule = 'linear'", "cosine", "wsd"]),
        ("optim.name=lion", ["optim.name = 'lion'", "'adamw' or 'muon'"]),
        ("optim.muon_momentum=0.9", ["optim.muon_momentum = 0.9", "only optim.name=muon reads it", "leave it out"]),
        ("optim.muon_learning_rate=0.02", ["optim.muon_learning_rate = 0.02", "only optim.name=muon reads it"]),
        (("optim.name=muon", "optim.muon_momentum=1"), ["optim.muon_momentum = 1", "less than 1"]),
        (("optim.name=muon", "optim.muon_learning_rate=0"), ["optim.muon_learning_rate = 0", "greater than 0"]),
        ("log.wandb=of", ["log.wandb = 'of'", "disabled"]),
        ("data.validation=somewhere", ["data.validation", "without data.train"]),
        ("run_name=a/b", ["run_name = 'a/b'"]),
        ("model.expert_parallel_size=0", ["model.expert_parallel_size"]),
        ("model.moe_backend=tutel", ["model.moe_backend = 'tutel'", "autoep"]),
        (
            ("model.preset=deepseek-v3-mini", "model.layer_types=" + str(["sliding_attention"] * 12)),
            ["mla has no sliding window"],
        ),
        (("model.init_from=x", "model.hidden_size=64"), ["its shape cannot change", "rope_scaling"]),
        ("samples.prompts=[]", ["samples.every", "prompts"]),
        ("seed", ["`seed`", "section.key=value"]),
    ],
)
def test_each_mistake_is_named_with_its_fix(override, expected):
    text = problems(*([override] if isinstance(override, str) else override))
    for part in expected:
        assert part in text, text


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


def test_all_mistakes_come_in_one_error():
    _, found = load("optim.learning_rat=1", "train.max_steps=-1", "model.hiden_size=3", "log.every=0", "x=1")
    assert len(found) == 5
    with pytest.raises(UserError, match="5 problems") as error:
        raise_problems(found, "somewhere")
    assert str(error.value).count("\n") == 5


def test_unknown_config_name_lists_the_shipped_ones():
    with pytest.raises(UserError, match="did you mean `demo`"):
        load(config="demmo")


def test_yaml_mistakes_name_the_file(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("train: {max_steps: 3")
    with pytest.raises(UserError, match="broken.yaml is not valid YAML"):
        load(config=str(path))
    path.write_text("- a\n")
    with pytest.raises(UserError, match="mapping of sections"):
        load(config=str(path))


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
