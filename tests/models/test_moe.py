"""Sparse blocks against those of transformers and DeepSpeed; in models: the same bits, checkpoints, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from deepspeed.moe.layer import MoE
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig, Qwen3NextConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from minillm.models.capacity import Capacity
from minillm.models.moe import SparseMoE
from tests.support.parity import assert_same, outputs_and_gradients
from tests.support.sparse_block import KINDS, SIGMOID, D, E, H, K, block_of, inputs, sigmoid_toy
from tests.support.toy_presets import toy_model

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


# DeepSpeed's own layer

RESIDUAL = {"shared_expert_intermediate_size": H, "residual_moe": True, "norm_topk_prob": False}


def deepspeed_layer(block: SparseMoE, top_k: int) -> MoE:
    """PR-MoE's layer with the weights of `block`, in this process alone; top-2 weights there are renormalised."""
    layer = MoE(
        D, copy.deepcopy(block.shared_expert), num_experts=E, k=top_k, use_residual=True, drop_tokens=False,
        use_rts=False, top2_2nd_expert_sampling=False,
    )  # fmt: skip
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(block.gate.weight)
        for number, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            expert.gate_proj.weight.copy_(block.experts.gate_up_proj[number, :H])
            expert.up_proj.weight.copy_(block.experts.gate_up_proj[number, H:])
            expert.down_proj.weight.copy_(block.experts.down_proj[number])
    layer.mlp.load_state_dict(block.shared_expert.state_dict())
    layer.coefficient.load_state_dict(block.coefficient.state_dict())
    return layer


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_residual_block_equals_that_of_deepspeed(top_k):
    ours = block_of(**{**RESIDUAL, "num_experts_per_tok": top_k, "norm_topk_prob": top_k == 2})
    found = outputs_and_gradients(ours, inputs())
    theirs = outputs_and_gradients(deepspeed_layer(ours, top_k), inputs())
    renamed = {"gate.weight": theirs.pop("deepspeed_moe.gate.wg.weight")}
    parts = {
        part: torch.stack([theirs.pop(f"deepspeed_moe.experts.deepspeed_experts.{e}.{part}.weight") for e in range(E)])
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    renamed["experts.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
    renamed["experts.down_proj"] = parts["down_proj"]
    theirs = {name.replace("mlp.", "shared_expert."): value for name, value in theirs.items()}
    assert_same(found, theirs | renamed)


# capacity


class Spy(torch.nn.Module):
    """Experts that only remember what they were called with."""

    def forward(self, x, weights, indices):
        self.weights, self.indices = weights, indices
        return x


def test_a_capacity_drops_routes_in_training_alone():
    block, x = block_of(), inputs()
    block.experts, block.capacity = Spy(), Capacity(0.5, 1)  # 18 tokens, K of E: 4 routes an expert
    everything = torch.bincount(block.gate(x.flatten(0, 1)).indices.flatten(), minlength=E)
    assert everything.max() > 4
    routing = block.train()(x, torch.ones(2, 9, dtype=torch.bool))[1]
    kept = block.experts.indices
    assert kept.min() == -1 and not block.experts.weights[kept < 0].any()
    assert torch.equal(torch.bincount(kept[kept >= 0], minlength=E), everything.clamp(max=4))
    assert torch.equal(routing.counts, everything.float())  # what the router wanted is what balancing is about
    block.eval()(x)
    assert torch.equal(torch.bincount(block.experts.indices.flatten(), minlength=E), everything)


# in a model

PRESETS = ["moe-876m", "mixtral-mini", "qwen3-moe-mini", "residual-moe-mini"]


def tokens(batch: int = 4, time: int = 24) -> torch.Tensor:
    return torch.randint(0, 101, (batch, time), generator=torch.Generator().manual_seed(7))


def gradients_of(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(11)
    ids = tokens()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return found | {"loss": output.loss.detach(), "counts": output.routing["counts"]}


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


@pytest.mark.parametrize(
    "changes",
    [KINDS["swiglu"], KINDS["silu"], RESIDUAL, {"router_noise": "jitter"}, {"router_noise": "rsample"}],
    ids=["swiglu", "silu", "residual", "jitter", "rsample"],
)
def test_it_compiles_into_one_graph(changes):
    torch._dynamo.reset()
    block, x = block_of(**changes, router_aux_loss_coef=0.1), inputs()
    counted = torch.ones(2, 9, dtype=torch.bool)

    def call(x):
        y, routing = block(x, counted)
        return y + routing.terms["load_balancing"].sum() + routing.counts.sum()

    def seeded(call):
        torch.manual_seed(3)  # of the router's noise
        return outputs_and_gradients(block, x, call)

    assert_same(seeded(torch.compile(call, backend="aot_eager", fullgraph=True)), seeded(call), 1e-6)


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
