"""Causality, packing, padding and caching: one pass over the whole must equal the parts done alone."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache

from minillm.models import MiniLLMForCausalLM
from tests.support.toy_presets import toy_model

MODEL = {"rtol": 1e-4, "atol": 1e-4}


PRESETS = [
    "char-tiny",
    "gpt2-124m",
    "demo",
    "dense-171m",
    "llama3-mini",
    "qwen3-mini",
    "mistral-mini",
    "moe-876m",
    "qwen3-moe-mini",
    "mixtral-mini",
    "residual-moe-mini",
    "deepseek-v3-mini",
    "qwen3-next-mini",
]
NO_CACHE = {("qwen3-next-mini", "static")}  # transformers has no cache of fixed size for recurrent states
CACHED = [(name, kind) for name in PRESETS for kind in ("dynamic", "static") if (name, kind) not in NO_CACHE]
WINDOW = 8  # of mistral-mini's toy, shorter than most rows here


@cache
def model_of(preset: str) -> MiniLLMForCausalLM:
    """The preset's toy, every parameter moved off its initial value: a bias at 0 would hide what it does."""
    model = toy_model(preset).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).normal_(std=0.1, generator=generator))
    return model


@pytest.fixture(params=PRESETS)
def model(request) -> MiniLLMForCausalLM:
    return model_of(request.param)


def make_cache(model: MiniLLMForCausalLM, kind: str) -> Cache:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=40)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 101, shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_later_tokens_do_not_change_earlier_logits(model):
    ids = tokens(2, 20)
    changed = ids.clone()
    changed[:, 11:] = tokens(2, 9) % 7
    a, b = model(ids).logits, model(changed).logits
    # Experts multiply as many rows as chose them, later tokens among them, and rounding follows that number.
    tolerance = MODEL if "sparse" in model.config.mlp_layer_types else {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(a[:, :11], b[:, :11], **tolerance)
    assert (a[:, 11] - b[:, 11]).abs().max() > 1e-3


def test_packed_documents_equal_separate_ones(model):
    documents = [tokens(1, length) for length in (5, 13, 1, 9)]
    packed = torch.cat(documents, dim=1)
    position_ids = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    document_ids = torch.cat([torch.full((d.shape[1],), i) for i, d in enumerate(documents)])[None]
    actual = model(packed, position_ids=position_ids, document_ids=document_ids).logits
    expected = torch.cat([model(d).logits for d in documents], dim=1)
    torch.testing.assert_close(actual, expected, **MODEL)


def test_packed_gradients_equal_separate_ones(model):
    documents = [tokens(1, length) for length in (6, 11)]
    position_ids = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    document_ids = torch.tensor([[0] * 6 + [1] * 11])
    targets = [torch.cat([d[:, 1:], torch.full((1, 1), -100)], dim=1) for d in documents]
    model.zero_grad()
    for ids, target in zip(documents, targets):
        model(ids, shift_labels=target, num_items_in_batch=15).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    packed, target = torch.cat(documents, dim=1), torch.cat(targets, dim=1)
    model(
        packed, position_ids=position_ids, document_ids=document_ids, shift_labels=target, num_items_in_batch=15
    ).loss.backward()
    assert expected.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name, **MODEL)
    model.zero_grad()


@pytest.mark.parametrize("left", [True, False])
def test_padded_batch_equals_single_ones(model, left):
    rows = [tokens(1, length) for length in (4, 11, 7)]
    ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(11 - row.shape[1], None) if left else slice(row.shape[1])
        ids[i, where], mask[i, where] = row[0], 1
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i][mask[i].bool()], model(row).logits[0], **MODEL)


@pytest.mark.parametrize("preset, kind", CACHED)
@pytest.mark.parametrize("chunks", [[6, 1, 1, 1], [1, 5, 3], [19, 1, 1, 4, 1]], ids=str)
def test_prefill_and_decode_equal_one_pass(preset, kind, chunks):
    model, ids = model_of(preset), tokens(2, sum(chunks))
    cache = make_cache(model, kind)
    parts = [model(part, cache=cache).logits for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, **MODEL)


@pytest.mark.parametrize("preset, kind", CACHED)
def test_left_padded_decode_equals_single_one(preset, kind):
    model, prompt = model_of(preset), 7  # one less than the window, which the decoded tokens then cross
    long, short = tokens(1, prompt + 4), tokens(1, prompt)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    cache = make_cache(model, kind)
    logits = [model(ids[:, :prompt], attention_mask=mask[:, :prompt], cache=cache).logits]
    for t in range(prompt, prompt + 4):
        logits += [model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache).logits]
    logits = torch.cat(logits, dim=1)
    torch.testing.assert_close(logits[0], model(long).logits[0], **MODEL)
    torch.testing.assert_close(logits[1, 4:], model(short).logits[0], **MODEL)


@pytest.mark.parametrize("preset, kind", CACHED)
def test_greedy_generation_equals_recomputing(preset, kind):
    """Rows of different lengths, beyond the window: `generate` must choose what a pass over the whole row would."""
    model, rows = model_of(preset), [tokens(1, 12), tokens(1, 7)]
    ids, mask = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 12 - row.shape[1] :], mask[i, 12 - row.shape[1] :] = row[0], 1
    options = {"cache_implementation": "static", "disable_compile": True} if kind == "static" else {}
    actual = model.generate(
        ids, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )[:, 12:]
    for i, row in enumerate(rows):
        logits = model(torch.cat([row, actual[i : i + 1]], dim=1)).logits[0, row.shape[1] - 1 : -1]
        chosen = logits.gather(-1, actual[i][:, None])[:, 0]
        assert (chosen > logits.amax(-1) - 1e-4).all()  # equal to rounding, should two tokens ever tie


def test_a_rolling_cache_keeps_no_more_than_the_window():
    model = model_of("mistral-mini")
    cache = make_cache(model, "dynamic")
    for part in tokens(1, 30).split([20, *[1] * 10], dim=1):
        model(part, cache=cache)
    assert model.config.sliding_window == WINDOW
    assert {layer.keys.shape[2] for layer in cache.layers} == {WINDOW - 1}


def test_tokens_beyond_every_window_change_nothing():
    """4 layers of windows of 8 see 4 * 7 tokens back and no further; without windows the first token is felt."""
    ids = tokens(1, 40)
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 101
    for preset, felt in (("mistral-mini", False), ("llama3-mini", True)):
        difference = (model_of(preset)(ids).logits - model_of(preset)(changed).logits)[0].abs().amax(-1)
        assert (difference[29:] > 1e-5).any() == felt, preset
        assert difference[1:8].max() > 1e-3


def test_document_ids_with_cached_tokens_are_refused(model):
    cache = DynamicCache(config=model.config)
    model(tokens(1, 3), cache=cache)
    with pytest.raises(ValueError, match="document_ids"):
        model(tokens(1, 2), document_ids=torch.zeros(1, 2, dtype=torch.long), cache=cache)


def gradients(model: MiniLLMForCausalLM, run=None) -> dict[str, torch.Tensor]:
    ids = tokens(2, 20)
    document_ids = torch.tensor([[0] * 13 + [1] * 7, [2] * 4 + [3] * 16])
    position_ids = torch.cat([torch.arange(13), torch.arange(7), torch.arange(4), torch.arange(16)]).view(2, 20)
    model.zero_grad()
    run = model if run is None else run
    run(ids, labels=ids, document_ids=document_ids, position_ids=position_ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("preset", PRESETS)
def test_activation_checkpointing_changes_no_gradient(preset):
    model = toy_model(preset, hidden_dropout=0.1)
    torch.manual_seed(5)
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(5)
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


def test_options_compile():
    """Gate, norms on queries and keys, a window, partial YaRN positions: one graph, the same gradients."""
    model = toy_model(
        "mistral-mini", num_hidden_layers=1, layer_types=["sliding_attention"], qk_norm=True, attention_bias=True,
        attention_output_gate=True, norm_type="zero_centered_rmsnorm", partial_rotary_factor=0.5,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    )  # fmt: skip
    expected = gradients(model)
    actual = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
