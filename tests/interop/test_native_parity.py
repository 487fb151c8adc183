"""Our decoder against transformers' own class of each family, with the same weights: logits, loss, every gradient,
greedy generation from rows of unequal length."""

from __future__ import annotations

import pytest
import torch

from minillm.interop import from_transformers, to_transformers
from minillm.interop.families import FAMILIES
from minillm.interop.family import MULTI_TOKEN
from minillm.interop.weights import to_theirs
from tests.support.native_models import CASES, make_native, randomise
from tests.support.toy_presets import toy_model

TOLERANCE = 1e-4
CHANGES = {
    # With weights of 0.2 and noise, one unit in the last place of the embeddings moves the logits of transformers' own
    # Qwen3-Next by 6e-4: no two orders of summation agree there.
    "qwen3-next-mini": {"initializer_range": 0.1},
    # Of 4 rotary rows the permutation would be its own inverse.
    "deepseek-v3-mini": {"qk_rope_head_dim": 8, "head_dim": 12},
}
NATIVE = {
    "char-tiny": "GPT2LMHeadModel",
    "gpt2-124m": "GPT2LMHeadModel",
    "llama3-mini": "LlamaForCausalLM",
    "qwen3-mini": "Qwen3ForCausalLM",
    "qwen3-moe-mini": "Qwen3MoeForCausalLM",
    "mistral-mini": "MistralForCausalLM",
    "mixtral-mini": "MixtralForCausalLM",
    "deepseek-v3-mini": "DeepseekV3ForCausalLM",
    "qwen3-next-mini": "Qwen3NextForCausalLM",
}


def close(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    torch.testing.assert_close(
        actual, expected, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"{what}: {text}" if what else text
    )


@pytest.mark.parametrize("preset", NATIVE)
def test_ours_equals_the_native_class(preset):
    # transformers gives no gradient to the row of the padding token; here that token is one like others.
    ours = randomise(toy_model(preset, pad_token_id=None, **CHANGES.get(preset, {}))).eval()
    theirs = to_transformers(ours)
    assert type(theirs).__name__ == NATIVE[preset]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 101, (2, 33), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    actual, expected = ours(ids, labels=labels), theirs(ids, labels=labels)
    close(actual.logits, expected.logits)
    close(actual.loss, expected.loss)
    actual.loss.backward()
    expected.loss.backward()
    gradients = {n: p.grad for n, p in ours.named_parameters() if not n.startswith(MULTI_TOKEN)}
    assert None not in gradients.values()
    gradients = to_theirs(gradients, FAMILIES[theirs.config.model_type].rules(theirs.config), theirs.config)
    for name, parameter in theirs.named_parameters():
        close(gradients.pop(name), parameter.grad, name)
    assert not gradients


@pytest.mark.parametrize("preset", NATIVE)
def test_greedy_generation_from_padded_rows_is_the_same(preset):
    ours = randomise(toy_model(preset, **CHANGES.get(preset, {}))).eval()
    theirs = to_transformers(ours)
    ids = torch.randint(1, 101, (3, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :9] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    for model in (ours, theirs):
        model.generation_config.eos_token_id = None
    expected = theirs.generate(ids, **options)
    assert len({tuple(row) for row in expected[:, 11:].tolist()}) == 3  # three different replies
    assert torch.equal(ours.generate(ids, **options), expected)


@pytest.mark.parametrize("case", CASES)
def test_theirs_to_ours_and_back_is_bitwise(case):
    # As in CHANGES: with weights of 0.2 the order of summation, which processors differ in, moves the logits by 6e-4.
    theirs = make_native(case, **({"initializer_range": 0.05} if case == "qwen3-next" else {}))
    ours = from_transformers(theirs)
    ids = torch.randint(0, 61, (2, 30), generator=torch.Generator().manual_seed(3))
    close(ours(ids).logits, theirs(ids).logits)
    if case == "llama-dynamic":  # the stretch begins behind max_position_embeddings
        longer = torch.cat((ids, ids), dim=1)
        close(ours(longer).logits, theirs(longer).logits)
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    back = to_transformers(ours)
    expected = theirs.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, value in back.state_dict().items():
        assert torch.equal(value, expected[name]), name
    tied = ours.lm_head.weight is ours.model.embed_tokens.weight
    assert tied == theirs.config.tie_word_embeddings
    if type(back) is type(theirs):
        assert _changed(back.config, theirs.config) == {}


def _changed(after, before) -> dict[str, tuple]:
    """Options that differ, but for other spellings of the same (Qwen's sparse layers, DeepSeek's unused ones)."""
    other_spelling = {"mlp_only_layers", "decoder_sparse_step", "num_nextn_predict_layers", "num_mtp_layers",
                      "num_key_value_heads", "head_dim", "_name_or_path", "transformers_version",
                      "full_attention_interval", "n_inner"}  # fmt: skip
    a, b = after.to_dict(), before.to_dict()
    return {n: (a.get(n), b.get(n)) for n in a.keys() | b.keys() if a.get(n) != b.get(n) and n not in other_spelling}


def test_sparse_layers_are_the_same_in_either_spelling():
    """Qwen's decoder_sparse_step 2 with layer 1 excepted, of four: only the last is sparse."""
    ours = from_transformers(make_native("qwen3-moe"))
    assert ours.config.mlp_layer_types == ["dense", "dense", "dense", "sparse"]
    assert to_transformers(ours).config.mlp_only_layers == [0, 1, 2]


def test_rows_that_are_not_interleaved_stay_in_place():
    theirs = make_native("deepseek", rope_interleave=False)
    ours = from_transformers(theirs)
    ids = torch.arange(40).view(2, 20)
    close(ours(ids).logits, theirs(ids).logits)
    name = "self_attn.kv_a_proj_with_mqa.weight"
    assert torch.equal(
        ours.model.layers[0].mixer.kv_a_proj_with_mqa.weight, theirs.state_dict()[f"model.layers.0.{name}"]
    )
    close(to_transformers(ours)(ids).logits, theirs(ids).logits)


def test_dense_layers_of_families_with_experts():
    """No sparse layer at all: the fields of experts must be empty here and are ignored there."""
    for case, changes in (
        ("deepseek", {"first_k_dense_replace": 4}),
        ("qwen3-next", {"mlp_only_layers": list(range(6)), "layer_types": ["full_attention"] * 6}),
    ):
        theirs = make_native(case, **changes)
        ours = from_transformers(theirs)
        assert ours.config.num_experts is None and ours.config.linear_num_key_heads is None
        ids = torch.arange(40).view(2, 20)
        close(ours(ids).logits, theirs(ids).logits)
        assert type(to_transformers(ours)) is type(theirs)


def test_multi_token_modules_are_left_out_with_one_line(capsys):
    theirs = to_transformers(toy_model("deepseek-v3-mini"))
    printed = capsys.readouterr().out
    assert "multi-token prediction" in printed and printed.count("\n") == 1
    assert theirs.config.num_nextn_predict_layers == 0
    assert not [name for name in theirs.state_dict() if name.startswith("model.layers.4")]
