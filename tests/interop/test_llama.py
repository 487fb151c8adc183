"""Weights to and from transformers' LlamaForCausalLM: equal logits both ways, a clear refusal of what differs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from minillm.interop.llama import from_transformers, to_transformers
from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.utils.errors import UserError


def make_llama(**changes) -> LlamaForCausalLM:
    fields = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()


IDS = torch.arange(40).view(2, 20)


def same_logits(a: torch.nn.Module, b: torch.nn.Module) -> None:
    torch.testing.assert_close(a(IDS).logits, b(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_from_and_back_in_memory(tied):
    llama = make_llama(tie_word_embeddings=tied)
    ours = from_transformers(llama)
    same_logits(ours, llama)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    back = to_transformers(ours)
    same_logits(back, llama)
    for name, value in llama.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    for name in ("rope_parameters", "head_dim", "rms_norm_eps", "max_position_embeddings", "eos_token_id"):
        assert getattr(back.config, name) == getattr(llama.config, name), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_from_a_folder(tmp_path, tied, max_shard_size):
    llama = make_llama(tie_word_embeddings=tied)
    llama.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    same_logits(from_transformers(tmp_path), llama)


def test_export_loads_without_our_code(tmp_path):
    torch.manual_seed(1)
    ours = MiniLLMForCausalLM(
        MiniLLMConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
    ).eval()
    to_transformers(ours).save_pretrained(tmp_path)
    same_logits(LlamaForCausalLM.from_pretrained(tmp_path), ours)


def test_dtype_is_kept():
    llama = make_llama().to(torch.bfloat16)
    assert from_transformers(llama).lm_head.weight.dtype == torch.bfloat16
    assert to_transformers(from_transformers(llama)).model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0}}, "rope_parameters"),
    ],
)
def test_options_we_lack_are_refused(changes, named):
    with pytest.raises(UserError, match=named):
        from_transformers(make_llama(**changes))


def test_missing_extra_and_misshapen_weights_are_named(tmp_path):
    make_llama().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as raised:
        from_transformers(tmp_path)
    for part in (
        "missing model.layers.1.mlp.up_proj.weight",
        "extra model.layers.0.mixer.q_norm.weight",
        "model.norm.weight has shape [31], the config says [32]",
        str(tmp_path),
    ):
        assert part in str(raised.value)


def test_a_tied_config_with_two_matrices_is_refused(tmp_path):
    llama = make_llama()
    llama.config.tie_word_embeddings = True
    with pytest.raises(UserError, match="lm_head.weight differs"):
        from_transformers(llama)


@pytest.mark.parametrize("content, message", [(None, "config.json is missing"), ('{"model_type": "gpt2"}', "'gpt2'")])
def test_a_folder_that_is_no_llama(tmp_path, content, message):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        from_transformers(tmp_path)
