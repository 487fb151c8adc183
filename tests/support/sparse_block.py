"""Sparse blocks for tests: small, every parameter random; experts in plain loops."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.models.moe import SparseMoE
from tests.support.toy_presets import toy_model

D, H, E, K = 24, 16, 8, 3
SIGMOID = {"router_type": "sigmoid", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
PLAIN = {"mlp_type": "mlp", "mlp_bias": True}
KINDS = {
    "swiglu": {},
    "silu": PLAIN,
    "gelu": {**PLAIN, "hidden_act": "gelu"},
    "gelu_new without biases": {"mlp_type": "mlp", "hidden_act": "gelu_new"},
}


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


def spread(tokens: int) -> torch.Tensor:
    return torch.rand(tokens, E, generator=torch.Generator().manual_seed(3)).topk(K, dim=-1).indices


def sigmoid_toy(**changes) -> MiniLLMForCausalLM:
    return toy_model("mixtral-mini", **SIGMOID, router_bias_update_speed=0.001, **changes)
