"""Latent attention against transformers' DeepseekV3Attention with the same weights, and its two forms alike."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config, DynamicCache, StaticCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from minillm.interop.rotary_layout import interleaved_to_split, split_to_interleaved
from minillm.models import MiniLLMConfig
from minillm.models.latent_attention import LatentAttention
from minillm.models.positions import build_positions
from tests.support.toy_presets import toy_fields, toy_model

MODULE = {"rtol": 1e-5, "atol": 1e-5}
MODEL = {"rtol": 1e-4, "atol": 1e-4}
HEADS, NOPE, ROPE, VALUE, RANK, WIDTH = 6, 4, 8, 6, 16, 48
DENSE = {
    "mlp_layer_types": None, "num_experts": None, "num_experts_per_tok": None, "moe_intermediate_size": None,
    "shared_expert_intermediate_size": 0, "router_type": "softmax", "n_group": 1, "topk_group": 1,
    "router_bias_update_speed": 0.0, "router_sequence_loss_coef": 0.0, "routed_scaling_factor": 1.0,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0,
    "mscale": 0.7, "mscale_all_dim": 1.3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


def config(**changes) -> MiniLLMConfig:
    sizes = {"qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "head_dim": NOPE + ROPE, "v_head_dim": VALUE}
    return MiniLLMConfig(**toy_fields("deepseek-v3-mini", **DENSE, **{**sizes, "kv_lora_rank": RANK, **changes}))


def theirs_of(ours: MiniLLMConfig) -> DeepseekV3Config:
    shared = (
        "hidden_size num_attention_heads num_key_value_heads q_lora_rank kv_lora_rank qk_nope_head_dim "
        "qk_rope_head_dim v_head_dim max_position_embeddings rms_norm_eps"
    ).split()
    rope = {"rope_theta": ours.rope_theta, **(ours.rope_scaling or {"rope_type": "default"})}
    fields = {name: getattr(ours, name) for name in shared}
    theirs = DeepseekV3Config(**fields, rope_parameters=rope, rope_interleave=True)
    theirs._attn_implementation = "eager"
    return theirs


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    return module


def permuted(weights: dict[str, torch.Tensor], permute) -> dict[str, torch.Tensor]:
    """A layer's weights with the rotary rows in the other layout."""
    heads = {"q_proj.weight": (HEADS, NOPE + ROPE), "q_b_proj.weight": (HEADS, NOPE + ROPE)}
    heads["kv_a_proj_with_mqa.weight"] = (1, RANK + ROPE)
    return {n: permute(w, *heads[n], ROPE) if n in heads else w.clone() for n, w in weights.items()}


def causal(length: int) -> torch.Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("q_lora_rank", [24, None])
@pytest.mark.parametrize("scaling", [None, YARN])
def test_latent_attention_equals_transformers(q_lora_rank, scaling):
    # The inner norms' epsilon is DeepSeek's own; with another one outside, only the right one gives the same numbers.
    ours_config = config(q_lora_rank=q_lora_rank, rope_scaling=scaling, rms_norm_eps=0.1)
    theirs_config = theirs_of(ours_config)
    theirs = randomised(DeepseekV3Attention(theirs_config, 0)).eval()
    ours = LatentAttention(ours_config, 0).eval()
    ours.load_state_dict(permuted(theirs.state_dict(), interleaved_to_split), strict=True)

    x = torch.randn(2, 9, WIDTH)
    position_ids = torch.arange(9).expand(2, 9) * 3
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual = ours(a, build_positions(ours_config)(x, position_ids)[1])
    rotary = DeepseekV3RotaryEmbedding(theirs_config)(x, position_ids)
    minus_infinity = torch.zeros(1, 1, 9, 9).masked_fill(~causal(9), -torch.inf)
    expected = theirs(b, rotary, minus_infinity)[0]
    torch.testing.assert_close(actual, expected, **MODULE)

    weights = torch.randn_like(actual)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, **MODULE)
    gradients = permuted({n: p.grad for n, p in ours.named_parameters()}, split_to_interleaved)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name, **MODULE)


def attention(**changes) -> tuple[LatentAttention, callable]:
    made = config(**changes)
    positions = build_positions(made)

    def rotation(start: int, end: int) -> torch.Tensor:
        return positions(torch.empty(1), torch.arange(start, end)[None])[1]

    return randomised(LatentAttention(made, 0)).eval(), rotation


@pytest.mark.parametrize("kind", ["causal", "padded", "added"])
def test_both_forms_are_equal(kind):
    """Attention in the latent space and over expanded keys, outputs and gradients."""
    module, rotation = attention(rope_scaling=YARN)
    mask = causal(7).repeat(2, 1, 1, 1)
    if kind == "padded":
        mask[1] &= (torch.arange(7) != 1) | torch.eye(7, dtype=torch.bool)
    if kind == "added":
        mask = torch.zeros(2, 1, 7, 7).masked_fill(~mask, torch.finfo(torch.float32).min)
    results = []
    for form in (module._attend_expanded, module._attend_latent):
        generator = torch.Generator().manual_seed(2)
        shapes = (2, HEADS, 7, NOPE), (2, HEADS, 7, ROPE), (2, 1, 7, RANK), (2, 1, 7, ROPE)
        inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        module.zero_grad()
        output = form(*inputs, mask)
        (output * torch.randn(output.shape, generator=generator)).sum().backward()
        results.append([output, module.kv_b_proj.weight.grad.clone(), *(x.grad for x in inputs)])
    for expanded, latent in zip(*results):
        torch.testing.assert_close(latent, expanded, **MODULE)


def test_decoding_expands_nothing(monkeypatch):
    """A token against a cache never makes keys or values of all heads; a prompt does, once."""
    module, rotation = attention()
    used = []
    for form in ("_attend_expanded", "_attend_latent"):
        original = getattr(module, form)
        monkeypatch.setattr(module, form, lambda *a, form=form, original=original: used.append(form) or original(*a))
    cache = DynamicCache()
    x = torch.randn(1, 12, WIDTH)
    module(x[:, :8], rotation(0, 8), None, cache)
    for t in (8, 9, 10):
        module(x[:, t : t + 1], rotation(t, t + 1), None, cache)
    assert used == ["_attend_expanded"] + 3 * ["_attend_latent"]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [[6, 1, 1, 1], [1, 5, 3], [2, 7], [9]])
def test_prefill_and_decode_equal_one_pass(kind, chunks):
    module, rotation = attention()
    x = torch.randn(2, 9, WIDTH)
    expected = module(x, rotation(0, 9))
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=config(), max_cache_len=12)
    outputs, start = [], 0
    for length in chunks:
        end = start + length
        keys = torch.arange(end if kind == "dynamic" else 12)
        mask = (keys[None] <= torch.arange(start, end)[:, None])[None, None]
        outputs.append(module(x[:, start:end], rotation(start, end), mask, cache))
        start = end
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, **MODULE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cached_token_holds_the_latent_and_one_rotated_key(dtype):
    model = toy_model("deepseek-v3-mini", **DENSE).eval().to(dtype)
    ids = torch.randint(1, 101, (2, 10))
    cache = model(ids, use_cache=True).cache
    per_token = (model.config.kv_lora_rank + model.config.qk_rope_head_dim) * dtype.itemsize
    for layer in cache.layers:
        held = sum(x.numel() * x.element_size() for x in (layer.keys, layer.values))
        assert held == 2 * 10 * per_token
    assert len(cache.layers) == model.config.num_hidden_layers


@pytest.mark.parametrize("make_cache", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [[6, 1, 1, 1], [1, 5, 3], [9]])
@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_model_prefill_and_decode_equal_one_pass(make_cache, chunks, q_lora_rank):
    model = toy_model("deepseek-v3-mini", **DENSE, q_lora_rank=q_lora_rank).eval()
    ids = torch.randint(1, 101, (2, 9))
    cache = DynamicCache() if make_cache == "dynamic" else StaticCache(config=model.config, max_cache_len=16)
    parts = [model(part, cache=cache).logits for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, **MODEL)


def test_model_left_padding_and_decoding_equal_single_rows():
    model = toy_model("deepseek-v3-mini", **DENSE).eval()
    long, short = torch.randint(1, 101, (1, 9)), torch.randint(1, 101, (1, 5))
    ids = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)])
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    cache = DynamicCache()
    logits = [model(ids[:, :6], attention_mask=mask[:, :6], cache=cache).logits]
    for t in (6, 7, 8):
        logits += [model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache).logits]
    logits = torch.cat(logits, dim=1)
    torch.testing.assert_close(logits[0], model(long).logits[0], **MODEL)
    torch.testing.assert_close(logits[1, 4:], model(short).logits[0], **MODEL)


def test_model_packed_documents_equal_separate_ones():
    model = toy_model("deepseek-v3-mini", **DENSE).eval()
    documents = [torch.randint(1, 101, (1, length)) for length in (5, 13, 1, 9)]
    position_ids = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    document_ids = torch.cat([torch.full((d.shape[1],), i) for i, d in enumerate(documents)])[None]
    actual = model(torch.cat(documents, dim=1), position_ids=position_ids, document_ids=document_ids).logits
    torch.testing.assert_close(actual, torch.cat([model(d).logits for d in documents], dim=1), **MODEL)


def test_generation_with_and_without_a_cache_is_the_same():
    model = toy_model("deepseek-v3-mini", **DENSE).eval()
    ids = torch.randint(1, 101, (2, 5))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert torch.equal(cached, model.generate(ids, cache_implementation="static", disable_compile=True, **options))


def test_dropout_is_of_attention_weights_and_in_training_alone():
    module, rotation = attention(attention_dropout=0.5)
    x = torch.randn(1, 8, WIDTH)
    plain = module(x, rotation(0, 8))
    torch.testing.assert_close(plain, attention()[0](x, rotation(0, 8)), rtol=0, atol=0)
    sampled = torch.stack([module.train()(x, rotation(0, 8)) for _ in range(400)])
    assert sampled.std(0).mean() > 0.1 * plain.std()
    torch.testing.assert_close(sampled.mean(0), plain, rtol=0, atol=0.2 * plain.abs().max().item())


def test_bf16_stays_close_in_both_forms():
    module, rotation = attention()
    x = torch.randn(1, 12, WIDTH)
    exact = module(x, rotation(0, 12))
    narrow = module.bfloat16()
    whole = narrow(x.bfloat16(), rotation(0, 12))
    cache = DynamicCache()
    parts = [narrow(x[:, :8].bfloat16(), rotation(0, 8), None, cache)]
    parts += [narrow(x[:, t : t + 1].bfloat16(), rotation(t, t + 1), None, cache) for t in range(8, 12)]
    for actual in (whole, torch.cat(parts, dim=1)):
        assert actual.dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(actual.float().flatten(), exact.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("form", ["training", "decoding"])
def test_compiles_without_graph_breaks(form):
    module, rotation = attention()
    x = torch.randn(2, 10, WIDTH)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    if form == "training":
        torch.testing.assert_close(compiled(x, rotation(0, 10)), module(x, rotation(0, 10)), **MODULE)
        return
    outputs = []
    for call in (module, compiled):
        cache = DynamicCache()
        module(x[:, :9], rotation(0, 9), None, cache)
        outputs.append(call(x[:, 9:], rotation(9, 10), None, cache))
    torch.testing.assert_close(outputs[1], outputs[0], **MODULE)


@pytest.mark.parametrize("parts", ["expansion", "absorption"])
def test_the_expansion_uses_its_weight_in_its_own_forward(parts):
    """ZeRO-3 has a weight only between the hooks of its module: nothing else may read kv_b_proj's."""
    module, rotation = attention()
    full = module.kv_b_proj.weight.data
    hidden = torch.zeros_like(full)
    module.kv_b_proj.register_forward_pre_hook(lambda m, _: setattr(m.weight, "data", full))
    module.kv_b_proj.register_forward_hook(lambda m, *_: setattr(m.weight, "data", hidden))
    x = torch.randn(1, 9, WIDTH)
    expected = attention()[0](x, rotation(0, 9))
    with torch.no_grad():
        module.kv_b_proj.weight.data = hidden
        if parts == "expansion":
            actual = module(x, rotation(0, 9))
        else:
            cache = DynamicCache()
            chunks = [module(x[:, :5], rotation(0, 5), None, cache)]
            chunks += [module(x[:, t : t + 1], rotation(t, t + 1), None, cache) for t in range(5, 9)]
            actual = torch.cat(chunks, dim=1)
    torch.testing.assert_close(actual, expected, **MODULE)


def test_rotary_layout_round_trip_and_order():
    weight = torch.arange(2 * 10 * 3.0).view(20, 3)
    split = interleaved_to_split(weight, num_heads=2, head_dim=10, rotary_dim=6)
    assert (split[:, 0] / 3).tolist() == [0, 1, 2, 3, 4, 6, 8, 5, 7, 9, 10, 11, 12, 13, 14, 16, 18, 15, 17, 19]
    assert torch.equal(split_to_interleaved(split, 2, 10, 6), weight)
    assert torch.equal(interleaved_to_split(split_to_interleaved(weight, 1, 20, 20), 1, 20, 20), weight)
    bias = torch.arange(8)
    assert interleaved_to_split(bias, 1, 8, 4).tolist() == [0, 1, 2, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("permute", [interleaved_to_split, split_to_interleaved])
@pytest.mark.parametrize("arguments", [(3, 8, 4), (2, 10, 3), (2, 10, 12)])
def test_rotary_layout_refuses_shapes_that_do_not_fit(permute, arguments):
    with pytest.raises(ValueError):
        permute(torch.zeros(20, 3), *arguments)
