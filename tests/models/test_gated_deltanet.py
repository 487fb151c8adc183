"""Gated DeltaNet: both forms of the rule, the mixer against transformers', packing, padding, caching."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from transformers import DynamicCache, Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from minillm.interop import deltanet_layout
from minillm.models import MiniLLMConfig, delta_rule
from minillm.models.delta_rule import chunked_gated_delta_rule, recurrent_gated_delta_rule
from minillm.models.gated_deltanet import GatedDeltaNet, Segments
from tests.reference.gated_delta_rule import gated_delta_rule
from tests.support.toy_presets import toy_fields, toy_model

EXACT = 1e-5
BATCH, KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 2, 6, 8, 5
DENSE = {
    "mlp_layer_types": None,
    "num_experts": None,
    "num_experts_per_tok": None,
    "moe_intermediate_size": None,
    "shared_expert_intermediate_size": 0,
    "shared_expert_gate": False,
    "router_aux_loss_coef": 0.0,
}


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The distance relative to theirs, NaN where either has one."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30)).item()


def rule_inputs(length: int, dtype=torch.float32, decay: float = 3.0) -> list[torch.Tensor]:
    """q, k, v, g, beta and a first state; decays from none to strong."""
    torch.manual_seed(length)
    q, k = torch.randn(2, BATCH, length, KEY_HEADS, KEY_DIM)
    v = torch.randn(BATCH, length, VALUE_HEADS, VALUE_DIM)
    g = -decay * torch.rand(BATCH, length, VALUE_HEADS) ** 3
    beta = torch.rand(BATCH, length, VALUE_HEADS)
    state = torch.randn(BATCH, VALUE_HEADS, KEY_DIM, VALUE_DIM)
    return [x.to(dtype) for x in (q, k, v, g, beta, state)]


def with_gradients(rule, inputs, **options) -> list[torch.Tensor]:
    """Output, last state, and the gradient of every input."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    results = rule(*inputs, **options)
    weights = [torch.linspace(-1, 1.5, y.numel(), dtype=y.dtype).view_as(y) for y in results]
    sum((y * w).sum() for y, w in zip(results, weights)).backward()
    return [y.detach() for y in results] + [x.grad for x in inputs]


def mixer(seed: int = 0, **changes) -> GatedDeltaNet:
    """A toy mixer, every parameter random."""
    torch.manual_seed(seed)
    module = GatedDeltaNet(MiniLLMConfig(**toy_fields("qwen3-next-mini", **DENSE, **changes)), 0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
        module.norm.weight.add_(1)
    return module


def empty_cache(module: GatedDeltaNet) -> DynamicCache:
    return DynamicCache(config=MiniLLMConfig(**toy_fields("qwen3-next-mini", **DENSE)))


def segments(documents: torch.Tensor) -> Segments:
    """From the document of each token, -1 at padding."""
    return Segments.of(documents, real=documents >= 0 if (documents < 0).any() else None)


def hidden(length: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, 48, generator=torch.Generator().manual_seed(seed))


# The rule ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [recurrent_gated_delta_rule, chunked_gated_delta_rule])
def test_both_forms_equal_the_papers_equation(rule):
    inputs = rule_inputs(19, torch.float64)
    expected, expected_state = gated_delta_rule(*inputs)
    output, state = rule(*inputs)
    assert far(output, expected) < 1e-12
    assert far(state, expected_state) < 1e-12
    output, state = rule(*inputs[:-1])
    assert far(output, gated_delta_rule(*inputs[:-1])[0]) < 1e-12


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_chunks_equal_steps_gradients_included(length):
    inputs = rule_inputs(length)
    for ours, theirs in zip(
        with_gradients(chunked_gated_delta_rule, inputs), with_gradients(recurrent_gated_delta_rule, inputs)
    ):
        assert far(ours, theirs) < EXACT


def test_derivative_of_the_chunks_by_finite_differences():
    inputs = [x[:1].double().requires_grad_() for x in rule_inputs(5)]
    segments = torch.tensor([[0, 0, 1, 1, 1]])
    assert torch.autograd.gradcheck(
        lambda *x: chunked_gated_delta_rule(*x, segments=segments, chunk_size=2), inputs, nondet_tol=0.0, fast_mode=True
    )


@pytest.mark.parametrize("chunk_size", [4, 64])
def test_borders_inside_and_between_chunks(chunk_size):
    documents = torch.tensor([[0] * 3 + [1] * 5 + [2] + [3] * 7, [4] * 4 + [2] * 12])
    inputs = rule_inputs(16, torch.float64)
    expected, expected_state = gated_delta_rule(*inputs, documents=documents)
    output, state = chunked_gated_delta_rule(*inputs, segments=segments(documents).numbers, chunk_size=chunk_size)
    assert far(output, expected) < 1e-12
    assert far(state, expected_state) < 1e-12


def test_segments_count_the_documents_begun_and_padding_begins_none():
    documents = torch.tensor([[-1, -1, 5, 5, 7, 7, -1], [3, 3, 1, 1, 0, -1, -1], [0, 0, 0, 0, 0, 0, 0]])
    assert segments(documents).numbers.tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2, 2], [0] * 7]


@pytest.mark.parametrize("rule", [recurrent_gated_delta_rule, chunked_gated_delta_rule])
@pytest.mark.parametrize("decay", [0.0, 30.0, 1e4])
def test_extreme_decays_stay_finite(rule, decay):
    """From nothing forgotten over a long row to everything at every token."""
    inputs = rule_inputs(300, decay=decay)
    results = with_gradients(rule, inputs)
    assert all(torch.isfinite(x).all() for x in results)
    exact = with_gradients(recurrent_gated_delta_rule, [x.double() for x in inputs])
    for ours, theirs in zip(results, exact):
        assert far(ours, theirs) < EXACT


def test_bf16_inputs_are_computed_in_fp32():
    inputs = [x.bfloat16() for x in rule_inputs(100)]
    output, state = chunked_gated_delta_rule(*inputs)
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
    exact, exact_state = recurrent_gated_delta_rule(*(x.double() for x in inputs))
    assert far(output, exact) < 2**-8  # one rounding to bf16
    assert far(state, exact_state) < EXACT


def test_what_the_chunks_keep_for_backward():
    """Eight tensors of the size of v, the states among them, however many operations there are."""
    inputs = [x.requires_grad_() for x in rule_inputs(256)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        chunked_gated_delta_rule(*inputs)
    pairs = BATCH * VALUE_HEADS * 256 * 64  # the largest kind here: a number for each two tokens of a chunk
    # Decays and inverses [C, C] a value head, scores [2C, C] a key head; the others are a head dim a token, or less.
    largest = (2 + 2 * KEY_HEADS / VALUE_HEADS) * pairs
    assert sum(t.numel() for t in kept) < largest + 8 * BATCH * VALUE_HEADS * 256 * KEY_DIM


# The mixer -----------------------------------------------------------------------------------------------------------


def mixer_from_transformers(theirs: Mapping[str, torch.Tensor], fields: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The state of a Qwen3NextGatedDeltaNet, names without prefix, as the state of a GatedDeltaNet."""
    ours = {our_name: theirs[their_name] for our_name, their_name in deltanet_layout.SAME_TENSORS.items()}
    ours["qkv_proj.weight"], ours["z_proj.weight"] = deltanet_layout.split_qkvz(theirs["in_proj_qkvz.weight"], fields)
    ours["b_proj.weight"], ours["a_proj.weight"] = deltanet_layout.split_ba(theirs["in_proj_ba.weight"], fields)
    return ours


def mixer_to_transformers(ours: Mapping[str, torch.Tensor], fields: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The inverse of mixer_from_transformers."""
    theirs = {their_name: ours[our_name] for our_name, their_name in deltanet_layout.SAME_TENSORS.items()}
    theirs["in_proj_qkvz.weight"] = deltanet_layout.join_qkvz(ours["qkv_proj.weight"], ours["z_proj.weight"], fields)
    theirs["in_proj_ba.weight"] = deltanet_layout.join_ba(ours["b_proj.weight"], ours["a_proj.weight"], fields)
    return theirs


def transformers_mixer(module: GatedDeltaNet) -> Qwen3NextGatedDeltaNet:
    """Theirs with our weights."""
    fields = toy_fields("qwen3-next-mini", **DENSE)
    shared = {name: value for name, value in fields.items() if name.startswith("linear_")}
    config = Qwen3NextConfig(
        hidden_size=fields["hidden_size"], rms_norm_eps=fields["rms_norm_eps"], num_hidden_layers=4, **shared
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    theirs.load_state_dict(mixer_to_transformers(module.state_dict(), fields))
    return theirs


@pytest.mark.parametrize("length", [1, 7, 64, 130])
def test_mixer_equals_transformers(length):
    ours = mixer()
    theirs, fields = transformers_mixer(ours), toy_fields("qwen3-next-mini", **DENSE)
    inputs = [hidden(length).requires_grad_() for _ in range(2)]
    outputs = [ours(inputs[0]), theirs(inputs[1])]
    weight = torch.linspace(-1, 1.5, outputs[0].numel()).view_as(outputs[0])
    for output in outputs:
        (output * weight).sum().backward()
    assert far(outputs[0], outputs[1]) < EXACT
    assert far(inputs[0].grad, inputs[1].grad) < EXACT
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    gradients = mixer_from_transformers(gradients, fields)
    for name, parameter in ours.named_parameters():
        if length > 1 or name != "A_log":  # one token has nothing to forget: both are 0
            assert far(parameter.grad, gradients[name]) < EXACT, name


def test_layouts_are_inverse_and_refuse_other_shapes():
    fields = toy_fields("qwen3-next-mini", **DENSE)
    state = mixer().state_dict()
    back = mixer_from_transformers(mixer_to_transformers(state, fields), fields)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    for call in (
        lambda: deltanet_layout.split_qkvz(torch.zeros(7, 3), fields),
        lambda: deltanet_layout.split_ba(torch.zeros(7, 3), fields),
        lambda: deltanet_layout.join_qkvz(torch.zeros(7, 3), torch.zeros(24, 3), fields),
        lambda: deltanet_layout.join_ba(torch.zeros(4, 3), torch.zeros(5, 3), fields),
    ):
        with pytest.raises(ValueError, match="rows"):
            call()


def test_initialisation_is_qwen3_nexts():
    model = toy_model("qwen3-next-mini", **DENSE, linear_num_value_heads=64, initializer_range=0.02)
    module = model.model.layers[0].mixer
    assert module.dt_bias.eq(1).all() and module.norm.weight.eq(1).all()
    rates = module.A_log.exp()
    assert rates.min() >= 0.0099 and rates.max() <= 16 and 5 < rates.mean() < 11
    assert module.conv.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_packed_documents_equal_separate_ones_gradients_included():
    module, lengths = mixer(), [3, 70, 1, 2, 20]
    x = hidden(sum(lengths), batch=1).requires_grad_()
    documents = torch.repeat_interleave(torch.tensor([4, 0, 9, 2, 7]), torch.tensor(lengths))[None]
    packed = module(x, mask=segments(documents))
    weight = torch.linspace(-1, 1.5, packed.numel()).view_as(packed)
    (packed * weight).sum().backward()
    packed_gradients = [x.grad] + [p.grad for p in module.parameters()]
    module.zero_grad()
    separate = x.detach().clone().requires_grad_()
    outputs = torch.cat([module(part) for part in separate.split(lengths, dim=1)], dim=1)
    (outputs * weight).sum().backward()
    assert far(packed, outputs) < EXACT
    for ours, theirs in zip(packed_gradients, [separate.grad] + [p.grad for p in module.parameters()]):
        assert far(ours, theirs) < EXACT


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    """Outputs, gradients and the state, whatever stands at padding."""
    module, pad = mixer(), 7
    real = hidden(66, batch=1)
    results = []
    for padding in (0, pad):
        parts = [torch.full((1, padding, 48), 3.0), real]
        numbers = [torch.full((1, padding), -1), torch.zeros(1, 66, dtype=torch.long)]
        order = slice(None) if side == "left" else slice(None, None, -1)
        x, mask = (torch.cat(part[order], dim=1) for part in (parts, numbers))
        module.zero_grad()
        outputs = module(x, mask=segments(mask) if padding else None)[mask >= 0]
        (outputs * torch.linspace(-1, 1.5, outputs.numel()).view_as(outputs)).sum().backward()
        cache = empty_cache(module)
        with torch.no_grad():
            module(x, mask=segments(mask) if padding else None, cache=cache)
        results.append([outputs, cache.get_recurrent_state(0), *(p.grad for p in module.parameters())])
    for plain, padded in zip(*results):
        assert far(padded, plain) < EXACT


@pytest.mark.parametrize("parts", [[20] + [1] * 5, [1] * 8, [2, 1, 70, 3], [65, 64, 1, 1]])
@torch.no_grad()
def test_prefill_and_steps_equal_one_pass(parts):
    module = mixer()
    x = hidden(sum(parts))
    cache = empty_cache(module)
    outputs = torch.cat([module(part, cache=cache) for part in x.split(parts, dim=1)], dim=1)
    assert far(outputs, module(x)) < EXACT


@torch.no_grad()
def test_left_padded_rows_decode_like_single_ones():
    module = mixer()
    x = hidden(12)
    mask = torch.tensor([[-1] * 5 + [0] * 4, [0] * 9])
    cache = empty_cache(module)
    outputs = [module(x[:, :9], mask=segments(mask), cache=cache)]
    outputs += [module(x[:, t : t + 1], cache=cache) for t in range(9, 12)]
    outputs = torch.cat(outputs, dim=1)
    assert far(outputs[0, 5:], module(x[:1, 5:])[0]) < EXACT
    assert far(outputs[1], module(x[1:])[0]) < EXACT


@torch.no_grad()
def test_reordered_cache_goes_on_from_the_chosen_rows():
    module, x = mixer(), hidden(10)
    cache = empty_cache(module)
    module(x[:, :9], cache=cache)
    cache.layers[0].reorder_cache(torch.tensor([1, 1]))
    following = module(x[:, 9:], cache=cache)
    expected = module(torch.cat((x[[1, 1], :9], x[:, 9:]), dim=1))[:, 9:]
    assert far(following, expected) < EXACT


def test_bf16_mixer_is_close_and_finite():
    module, x = mixer(), hidden(100)
    expected = module(x)
    module.bfloat16()
    rounded = x.bfloat16().requires_grad_()
    output = module(rounded)
    output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16 and far(output, expected) < 0.03
    assert all(torch.isfinite(p.grad).all() for p in [rounded, *module.parameters()])


def test_training_path_compiles_in_one_piece():
    module, x = mixer(), hidden(70)
    mask = torch.arange(70).div(30, rounding_mode="floor").expand(2, -1)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    results = []
    for call in (module, compiled):
        module.zero_grad()
        output = call(x, None, segments(mask))
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad for p in module.parameters())])
    for plain, traced in zip(*results):
        assert far(traced, plain) < EXACT


@pytest.mark.gpu
def test_flash_linear_attention_equals_the_chunks():
    if delta_rule.flash_chunks is None:
        pytest.skip("flash-linear-attention is not installed")
    if not torch.cuda.is_available():
        pytest.skip("flash-linear-attention needs a GPU")
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 130, 2, 64, device="cuda").bfloat16()
    v = torch.randn(2, 130, 4, 64, device="cuda").bfloat16()
    g, beta = -torch.rand(2, 130, 4, device="cuda"), torch.rand(2, 130, 4, device="cuda")
    output, state = delta_rule.flash_gated_delta_rule(q, k, v, g, beta)
    expected, expected_state = chunked_gated_delta_rule(*(x.float() for x in (q, k, v, g, beta)))
    assert far(output, expected) < 0.02 and far(state, expected_state) < 0.02


# The model -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_generation_equals_full_recomputation():
    model = toy_model("qwen3-next-mini", **DENSE).eval()
    prompt = torch.randint(1, 101, (2, 7))
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    ids = prompt
    for _ in range(8):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, ids)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_left_padded_generation_equals_single_generation(options):
    model = toy_model("qwen3-next-mini", **DENSE).eval()
    long, short = torch.randint(1, 101, (1, 9)), torch.randint(1, 101, (1, 4))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    batch = torch.cat((long, torch.cat((torch.zeros(1, 5, dtype=torch.long), short), dim=1)))
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    together = model.generate(batch, attention_mask=mask, **options)[:, 9:]
    alone = [model.generate(x, attention_mask=torch.ones_like(x), **options)[0, x.shape[1] :] for x in (long, short)]
    assert torch.equal(together, torch.stack(alone))


@torch.no_grad()
def test_prefill_in_pieces_equals_one_pass_in_the_model():
    model = toy_model("qwen3-next-mini", **DENSE).eval()
    ids, cache = torch.randint(1, 101, (2, 20)), None
    logits = []
    for part in ids.split([9, 1, 6, 4], dim=1):
        output = model(part, cache=cache, use_cache=True)
        cache = output.cache
        logits.append(output.logits)
    assert far(torch.cat(logits, dim=1), model(ids).logits) < 1e-4


def test_packed_model_equals_separate_documents():
    model, lengths = toy_model("qwen3-next-mini", **DENSE), [5, 11, 2]
    ids = torch.randint(1, 101, (1, 18))
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, document_ids=documents, position_ids=positions).logits
    separate = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    assert far(packed, separate) < 1e-4


def test_a_finished_mask_is_refused():
    model = toy_model("qwen3-next-mini", **DENSE)
    with pytest.raises(ValueError, match="linear_attention"):
        model(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_a_model_of_linear_layers_alone_is_refused():
    with pytest.raises(ValueError, match="linear_attention alone"):
        MiniLLMConfig(**toy_fields("qwen3-next-mini", **DENSE, layer_types=["linear_attention"] * 4))


def test_decoding_that_would_have_to_go_back_is_refused():
    """A recurrent state cannot forget the tokens that assisted decoding rejects."""
    model = toy_model("qwen3-next-mini").eval()
    with pytest.raises(ValueError, match="stateful"):
        model.generate(torch.ones(1, 9, dtype=torch.long), prompt_lookup_num_tokens=3, max_new_tokens=8)
