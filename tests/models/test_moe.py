"""Routers, experts and balancing terms against transformers' blocks, written-out references, and each other's paths."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig, Qwen3NextConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

import minillm.models.linear as linear
from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.models.balancing import BALANCING, TERMS, Routing, Tally, importance
from minillm.models.loss import IGNORE, auxiliary_losses, counted_tokens
from minillm.models.moe import SparseMoE
from tests.toy_presets import toy_model

D, H, E, K = 24, 16, 8, 3
SIGMOID = {"router_type": "sigmoid", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
PLAIN = {"mlp_type": "mlp", "mlp_bias": True}


def config_of(**changes) -> MiniLLMConfig:
    fields = {
        "hidden_size": D, "num_hidden_layers": 1, "mlp_layer_types": ["sparse"], "moe_intermediate_size": H,
        "num_experts": E, "num_experts_per_tok": K,
    }  # fmt: skip
    return MiniLLMConfig(**fields | changes)


def block_of(seed: int = 0, **changes) -> SparseMoE:
    """A block with every parameter and buffer random and far from its initial value."""
    block = SparseMoE(config_of(**changes))
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in block.state_dict().values():
            tensor.normal_(std=0.4)
    return block


def inputs(batch: int = 2, time: int = 9, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(batch, time, D)


def outputs_and_gradients(block, x: torch.Tensor, call=None) -> dict[str, torch.Tensor]:
    """The output of `call` (default: the block), and the gradients of the input and of every parameter by name."""
    x = x.clone().requires_grad_()
    block.zero_grad()
    y = (call or block)(x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    gradients = {name.replace("shared_experts", "shared_expert"): p.grad for name, p in block.named_parameters()}
    return {"output": y.detach(), "input": x.grad} | gradients


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


# transformers' own blocks

THEIRS = {
    "hidden_size": D, "moe_intermediate_size": H, "num_experts_per_tok": K, "hidden_act": "silu",
}  # fmt: skip


def mixtral():
    config = MixtralConfig(hidden_size=D, intermediate_size=H, num_local_experts=E, num_experts_per_tok=K)
    return MixtralSparseMoeBlock, config, {}


def qwen3_moe(normalised: bool):
    config = Qwen3MoeConfig(**THEIRS, num_experts=E, norm_topk_prob=normalised)
    return Qwen3MoeSparseMoeBlock, config, {"norm_topk_prob": normalised}


def qwen3_next():
    config = Qwen3NextConfig(**THEIRS, num_experts=E, shared_expert_intermediate_size=12, norm_topk_prob=True)
    return Qwen3NextSparseMoeBlock, config, {"shared_expert_intermediate_size": 12, "shared_expert_gate": True}


def deepseek(normalised: bool):
    ours = {**SIGMOID, "norm_topk_prob": normalised}
    ours.pop("router_type")
    config = DeepseekV3Config(**THEIRS, **ours, n_routed_experts=E, n_shared_experts=2)
    return DeepseekV3MoE, config, {**SIGMOID, "norm_topk_prob": normalised, "shared_expert_intermediate_size": 2 * H}


@pytest.mark.parametrize(
    "family",
    [mixtral(), qwen3_moe(True), qwen3_moe(False), qwen3_next(), deepseek(True), deepseek(False)],
    ids=["mixtral", "qwen3-moe", "qwen3-moe not normalised", "qwen3-next", "deepseek-v3", "deepseek-v3 not normalised"],
)
def test_blocks_equal_those_of_transformers(family):
    cls, their_config, changes = family
    their_config._experts_implementation = "eager"
    ours, theirs = block_of(**changes), cls(their_config)
    weights = {name.replace("shared_expert.", "shared_experts."): w for name, w in ours.state_dict().items()}
    theirs.load_state_dict(weights if cls is DeepseekV3MoE else ours.state_dict())  # strict: the same names
    x = inputs()
    assert_same(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x))


# written-out references


def slow_experts(experts, x, weights, indices, activation=F.silu):
    """Token by token and expert by expert, in plain differentiable torch."""
    rows = []
    for token in range(x.shape[0]):
        total = torch.zeros(x.shape[1], dtype=x.dtype)
        for k in range(indices.shape[1]):
            e = indices[token, k]
            if hasattr(experts, "gate_up_proj"):
                size = experts.gate_up_proj.shape[1] // 2
                gate, up = experts.gate_up_proj[e][:size] @ x[token], experts.gate_up_proj[e][size:] @ x[token]
                out = experts.down_proj[e] @ (F.silu(gate) * up)
            else:
                inner = experts.up_proj[e] @ x[token]
                inner = activation(inner if experts.up_bias is None else inner + experts.up_bias[e])
                out = experts.down_proj[e] @ inner
                out = out if experts.down_bias is None else out + experts.down_bias[e]
            total = total + weights[token, k] * out
        rows.append(total)
    return torch.stack(rows)


class Applied(torch.nn.Module):
    """Experts as a function of x alone, with trainable weights for their gradients' sake."""

    def __init__(self, experts, weights, indices):
        super().__init__()
        self.experts, self.weights, self.indices = experts, torch.nn.Parameter(weights.clone()), indices

    def forward(self, x):
        return self.experts(x, self.weights, self.indices)


def spread(tokens: int) -> torch.Tensor:
    return torch.rand(tokens, E, generator=torch.Generator().manual_seed(3)).topk(K, dim=-1).indices


ROUTES = {
    "all experts": spread(20),
    "experts without tokens": spread(20) % 2 + torch.tensor([0, 2, 4]),  # never 6 and 7
    "one token": spread(1),
    "all tokens to the same": torch.tensor([[6, 2, 4]]).repeat(20, 1),
    "one expert": torch.full((20, 1), 5),
}
KINDS = {
    "swiglu": {},
    "silu": PLAIN,
    "gelu": {**PLAIN, "hidden_act": "gelu"},
    "gelu_new without biases": {"mlp_type": "mlp", "hidden_act": "gelu_new"},
}


@pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_experts_equal_a_loop_over_tokens(route, kind, grouped, monkeypatch):
    # torch's grouped product runs on a CPU as well, which shows that both ways are right.
    monkeypatch.setattr("minillm.models.experts._can_group", lambda *_: grouped)
    experts, indices = block_of(**KINDS[kind]).experts, ROUTES[route]
    activation = {"gelu": F.gelu, "gelu_new without biases": lambda x: F.gelu(x, approximate="tanh")}.get(kind, F.silu)
    applied = Applied(experts, torch.rand(indices.shape), indices)
    x = inputs()[0].repeat(3, 1)[: len(indices)]
    ours = outputs_and_gradients(applied, x)
    slow = outputs_and_gradients(applied, x, lambda x: slow_experts(experts, x, applied.weights, indices, activation))
    assert_same(ours, slow)


@pytest.mark.parametrize("path", ["loop", "loop, widened", "grouped"])
@pytest.mark.parametrize("kind", ["swiglu", "silu"])
def test_bf16_is_as_close_to_exact_as_roundings_allow(kind, path, monkeypatch):
    experts, indices = block_of(**KINDS[kind]).experts.bfloat16(), spread(40)
    x, weights = torch.randn(40, D).bfloat16(), torch.rand(indices.shape)
    exact = outputs_and_gradients(Applied(copy.deepcopy(experts).double(), weights.double(), indices), x.double())
    monkeypatch.setattr("minillm.models.experts._can_group", lambda *_: path == "grouped")
    monkeypatch.setattr(linear, "CPU_MULTIPLIES_BF16", path != "loop, widened")
    ours = outputs_and_gradients(Applied(experts, weights, indices), x)
    for name, truth in exact.items():
        assert ours[name].dtype == (torch.float32 if name == "weights" else torch.bfloat16)
        assert (ours[name].double() - truth).norm() / truth.norm() < 3 * 2**-8, name


def test_experts_keep_their_parameters_and_little_else():
    """Parameters by reference, so that ZeRO-3 can empty them; one activation a row."""
    block, x = block_of(), inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block.experts(x[0], torch.rand(9, K), spread(9))
    assert any(t is block.experts.gate_up_proj for t in kept) and any(t is block.experts.down_proj for t in kept)
    large = [t for t in kept if t.is_floating_point() and t.numel() > x[0].numel()]
    large = [t.shape for t in large if not isinstance(t, torch.nn.Parameter)]
    assert large == [(9 * K, 2 * H)]


def slow_noisy_top_k(gate, x, noise):
    """Equations 3-5 of arXiv:1701.06538, token by token: weights [S, E], 0 where not chosen."""
    rows = []
    for token in range(x.shape[0]):
        h = gate.router.weight @ x[token] + gate.router.bias
        if noise is not None:
            width = (1 + (gate.noise.weight @ x[token] + gate.noise.bias).exp()).log()
            h = h + noise[token] * width
        kept = sorted(range(E), key=lambda i, h=h: h[i].item())[-K:]
        exponentials = {i: h[i].exp() for i in kept}
        total = sum(exponentials.values())
        rows.append(torch.stack([exponentials[i] / total if i in kept else h.new_zeros(()) for i in range(E)]))
    return torch.stack(rows)


@pytest.mark.parametrize("training", [True, False])
def test_noisy_top_k_equals_its_equations(training):
    block, x = block_of(router_type="noisy_topk", **PLAIN).train(training), inputs()
    torch.manual_seed(5)
    noise = torch.randn(18, E) if training else None

    def slow(x):
        tokens = x.flatten(0, 1)
        dense = slow_noisy_top_k(block.gate, tokens, noise)
        indices = dense.topk(K, dim=-1).indices
        return slow_experts(block.experts, tokens, dense.gather(1, indices), indices).view_as(x)

    torch.manual_seed(5)
    ours = outputs_and_gradients(block, x)
    theirs = outputs_and_gradients(block, x, slow)
    if not training:
        for found in (ours, theirs):
            assert found.pop("gate.noise.weight") is None and found.pop("gate.noise.bias") is None
    assert_same(ours, theirs)


def test_noise_is_off_in_evaluation_and_on_in_training():
    block, x = block_of(router_type="noisy_topk"), inputs()
    assert torch.equal(block.eval()(x)[0], block(x)[0])
    assert not torch.equal(block.train()(x)[0], block(x)[0])


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy_topk"])
def test_the_scaling_factor_scales_every_router(router):
    plain, scaled = (block_of(router_type=router, routed_scaling_factor=f).eval() for f in (1.0, 2.5))
    torch.testing.assert_close(scaled(inputs())[0], 2.5 * plain(inputs())[0])


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy_topk"])
def test_routing_is_fp32_in_a_bf16_model(router):
    block = block_of(router_type=router).bfloat16().eval()
    choice = block.gate(inputs()[0].bfloat16())
    assert {t.dtype for t in choice[:3]} == {torch.float32}
    exact = copy.deepcopy(block.gate).double()
    weight = exact.weight if router != "noisy_topk" else exact.router.weight
    logits = inputs()[0].bfloat16().double() @ weight.t() + (exact.router.bias if router == "noisy_topk" else 0)
    torch.testing.assert_close(choice.logits.double(), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [0, -20], ids=["positive", "negative"])
def test_a_sigmoid_router_uses_the_best_groups_only(shift):
    block = block_of(**SIGMOID, num_experts_per_tok=4)
    with torch.no_grad():
        block.gate.e_score_correction_bias.copy_(
            shift + torch.tensor([0, 0, 9, 9, 5, 0, 3, 3.0])
        )  # groups: 0, 18, 5, 6
    assert set(block.gate(inputs()[0]).indices.flatten().tolist()) == {2, 3, 6, 7}


# balancing

ALL_TERMS = dict.fromkeys(TERMS.values(), 0.1)


def routed(block, x, counted) -> Routing:
    return block(x, counted)[1]


def by_hand(block, x, counted) -> dict[str, list[float]]:
    """Every term of every row, in plain loops over the tokens that count."""
    terms = {name: [] for name in BALANCING}
    for row in range(x.shape[0]):
        choice = block.gate(x[row])
        tokens = [t for t in range(x.shape[1]) if counted[row, t]]
        if not tokens:
            for values in terms.values():
                values.append(0.0)
            continue
        n, p = len(tokens), choice.probabilities
        used = [sum(int(i in choice.indices[t]) for t in tokens) / n for i in range(E)]
        mean = [sum(p[t, i].item() for t in tokens) / n for i in range(E)]
        even = sum(f * m for f, m in zip(used, mean))
        terms["load_balancing"].append(E * even)
        terms["importance"].append(math.log(E) + sum(m * math.log(m) for m in mean))
        z = [math.log(sum(math.exp(v) for v in choice.logits[t].tolist())) for t in tokens]
        terms["router_z"].append(sum(v * v for v in z) / n)
        terms["sequence_balancing"].append(E / K * even)
    return terms


COUNTED = torch.ones(4, 9, dtype=torch.bool)
COUNTED[1, 5:] = COUNTED[2] = COUNTED[3, :3] = False


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy_topk"])
def test_terms_equal_those_computed_by_hand(router):
    sequence = {"router_sequence_loss_coef": 0.1 if router == "sigmoid" else 0.0}
    block, x = block_of(router_type=router, **{**ALL_TERMS, **sequence}).eval(), inputs(4)
    routing, expected = routed(block, x, COUNTED), by_hand(block, x, COUNTED)
    assert routing.terms.keys() == {name for name in TERMS if name != "sequence_balancing" or router == "sigmoid"}
    for name, values in routing.terms.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, torch.tensor(expected[name]), rtol=1e-5, atol=1e-6)
    indices = block.gate(x.flatten(0, 1)).indices.view(4, 9, K)
    assert torch.equal(routing.counts, torch.bincount(indices[COUNTED].flatten(), minlength=E).float())


def test_sigmoid_probabilities_are_normalised_scores():
    gate, x = block_of(**SIGMOID).gate, inputs()[0]
    scores = 1 / (1 + (-(x @ gate.weight.t())).exp())
    torch.testing.assert_close(gate(x).probabilities, scores / scores.sum(-1, keepdim=True))


def test_importance_of_two_known_distributions():
    tally = Tally(None, torch.tensor([[0.25] * 4, [0.5, 0.25, 0.25, 0.0]]), None, 2)
    # log 4 - (1/2 log 2 + 2/4 log 4) = 2 log 2 - 1.5 log 2
    torch.testing.assert_close(importance(tally), torch.tensor([0.0, 0.5 * math.log(2)]))


def test_load_balancing_equals_that_of_transformers():
    block, x = block_of(router_aux_loss_coef=0.1), inputs(1)
    logits = x[0] @ block.gate.weight.t()
    ours = routed(block, x, torch.ones(1, 9, dtype=torch.bool)).terms["load_balancing"]
    torch.testing.assert_close(ours[0], load_balancing_loss_func((logits,), E, K))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0]])
    ours = routed(block, x, mask.bool()).terms["load_balancing"]
    torch.testing.assert_close(ours[0], load_balancing_loss_func((logits,), E, K, mask))


def test_no_term_without_its_coefficient_and_no_routing_without_counted():
    block = block_of(router_z_loss_coef=0.1)
    assert routed(block, inputs(), torch.ones(2, 9, dtype=torch.bool)).terms.keys() == {"router_z"}
    assert block(inputs())[1] is None
    assert BALANCING.keys() == TERMS.keys()


def test_terms_of_half_batches_add_up_to_those_of_the_whole():
    config = config_of(**SIGMOID, **ALL_TERMS)
    x, targets = inputs(4), torch.zeros(4, 9, dtype=torch.long)
    targets[0, 7:] = targets[1, ::2] = targets[2] = IGNORE
    items = (targets != IGNORE).sum()

    def losses(*parts):
        block = block_of(**SIGMOID, **ALL_TERMS)
        found, total = [], 0.0
        for part in parts:
            routing = routed(block, x[part], counted_tokens(targets[part]))
            terms, weighted = auxiliary_losses(config, [routing, routing], targets[part], items)
            found.append(terms)
            total = total + weighted
        total.backward()
        return {name: sum(t[name] for t in found).detach() for name in TERMS} | {"gradient": block.gate.weight.grad}

    whole, halves = losses(slice(0, 4)), losses(slice(0, 2), slice(2, 4))
    assert_same(halves, whole, 1e-6)
    assert all(value.abs().max() > 0 for value in whole.values())


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy_topk"])
def test_padding_leaves_no_trace_in_terms_or_gradients(router):
    sequence = {"router_sequence_loss_coef": 0.1 if router == "sigmoid" else 0.0}
    changes = {"router_type": router, **ALL_TERMS, **sequence}
    gradients = []
    for filler in (0.0, 7.0):
        block, x = block_of(**changes).eval(), inputs(4)
        x = x.masked_fill(~COUNTED[..., None], filler).requires_grad_()
        sum(term.sum() for term in routed(block, x, COUNTED).terms.values()).backward()
        assert x.grad[COUNTED].abs().sum() > 0 and not x.grad[~COUNTED].any()  # NaN would be true here
        gradients.append({n: p.grad for n, p in block.gate.named_parameters() if p.grad is not None})
    assert_same(*gradients, 1e-6)


# DeepSeek-V3's bias


def test_bias_rises_for_idle_experts_and_falls_for_busy_ones():
    block = block_of(**SIGMOID, router_bias_update_speed=0.01)
    before = block.gate.e_score_correction_bias.clone()
    block.gate.update_bias(torch.tensor([9.0, 1, 5, 5, 5, 5, 5, 5]))  # mean 5
    expected = before + torch.tensor([-0.01, 0.01, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(block.gate.e_score_correction_bias, expected)


def test_bias_updates_even_out_the_load():
    block, x = block_of(router_type="sigmoid", router_bias_update_speed=0.02), inputs(8, 32)
    counted = torch.ones(8, 32, dtype=torch.bool)
    loads = []
    for _ in range(60):
        loads.append(routed(block, x, counted).counts)
        block.gate.update_bias(loads[-1])
    assert loads[-1].std() < 0.2 * loads[0].std()


def sigmoid_toy(**changes) -> MiniLLMForCausalLM:
    return toy_model("mixtral-mini", **SIGMOID, router_bias_update_speed=0.001, **changes)


def biases(model) -> list[torch.Tensor]:
    return [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]


def test_bias_stays_fp32_in_a_bf16_model_and_is_saved(tmp_path):
    model = sigmoid_toy()
    values = [torch.rand(E) * 1e-4 + 1 for _ in range(4)]  # bf16 would round every one of them to 1
    for bias, value in zip(biases(model), values, strict=True):
        bias.copy_(value)
    for cast in (model.bfloat16(), model.to(torch.bfloat16), model.half(), model.bfloat16()):
        assert next(cast.parameters()).dtype in (torch.bfloat16, torch.float16)
        for bias, value in zip(biases(cast), values, strict=True):
            assert bias.dtype == torch.float32 and torch.equal(bias, value)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = MiniLLMForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.model.layers[0].mlp.gate.weight.dtype == dtype
        for bias, value in zip(biases(loaded), values, strict=True):
            assert bias.dtype == torch.float32 and torch.equal(bias, value)


def test_a_block_can_be_made_on_the_meta_device():
    with torch.device("meta"):
        block = SparseMoE(config_of(**SIGMOID)).bfloat16()
    block = block.to_empty(device="cpu")
    assert block.gate.e_score_correction_bias.dtype == torch.float32
    assert block.gate.e_score_correction_bias.device.type == "cpu"


# in a model

PRESETS = ["moe-876m", "mixtral-mini", "qwen3-moe-mini"]


def tokens(batch: int = 4, time: int = 24) -> torch.Tensor:
    return torch.randint(0, 101, (batch, time), generator=torch.Generator().manual_seed(7))


def gradients_of(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(11)
    ids = tokens()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return found | {"loss": output.loss.detach(), "counts": output.expert_counts}


@pytest.mark.parametrize("preset", PRESETS)
def test_runs_are_the_same_bit_for_bit(preset):
    assert_same(gradients_of(toy_model(preset)), gradients_of(toy_model(preset)), 0.0)


@pytest.mark.parametrize("preset", [*PRESETS, "deepseek-v3-mini", "qwen3-next-mini"])
def test_activation_checkpointing_changes_nothing(preset):
    model = toy_model(preset)
    plain = gradients_of(model)
    model.gradient_checkpointing_enable()
    assert_same(gradients_of(model), plain, 1e-6)
    assert (plain["counts"][0].sum() == 4 * 23 * model.config.num_experts_per_tok).all()  # 23 of 24 have a target


@pytest.mark.parametrize("preset", PRESETS)
def test_toys_learn(preset):
    model, ids = toy_model(preset, initializer_range=0.05), tokens()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("kind", ["swiglu", "silu"])
def test_it_compiles_into_one_graph(kind):
    torch._dynamo.reset()
    block, x = block_of(**KINDS[kind], router_aux_loss_coef=0.1), inputs()
    counted = torch.ones(2, 9, dtype=torch.bool)

    def call(x):
        y, routing = block(x, counted)
        return y + routing.terms["load_balancing"].sum() + routing.counts.sum()

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_same(outputs_and_gradients(block, x, compiled), outputs_and_gradients(block, x, call), 1e-6)


def test_initial_weights():
    model = toy_model("moe-876m", initializer_range=0.2)
    block = model.model.layers[0].mlp
    for name, parameter in block.named_parameters():
        if "bias" in name:
            assert not parameter.any(), name
        else:
            assert 0.15 < parameter.std() < 0.25, name
    gate = sigmoid_toy().model.layers[0].mlp.gate
    assert 0.15 < gate.weight.std() < 0.25 and not gate.e_score_correction_bias.any()
