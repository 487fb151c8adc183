"""Sparse feed-forward: a router, experts in plain torch that drop no token, a shared expert, balancing terms.

Contract: SparseMoE is a feed_forward block. ROUTERS, EXPERTS and BALANCING choose a router by `router_type`, experts by
`mlp_type` and terms by the coefficients of minillm.models.loss.TERMS. Routing is computed in fp32; everything is the
same bit for bit from run to run. Module and parameter names are those that transformers' Mixtral, Qwen3-MoE,
Qwen3-Next and DeepSeek-V3 have in memory: `gate.weight`, `experts.gate_up_proj`, `experts.down_proj`.

Shapes: B batch, T time, S tokens (B * T), D hidden, E experts, K experts a token, R rows (S * K), H intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.linear import Linear, should_widen
from minillm.models.mlp import ACTIVATIONS, build_dense_mlp


class Routing(NamedTuple):
    """What a router did with one forward's counted tokens.

    Attributes:
        counts: [E] fp32, counted tokens sent to each expert.
        terms: by name, [B] fp32: each balancing term of each row, of those whose coefficient is not 0.
    """

    counts: torch.Tensor
    terms: dict[str, torch.Tensor]


class Choice(NamedTuple):
    """What a router says of each token, all fp32 but the indices.

    Attributes:
        logits: [S, E], noise included.
        probabilities: [S, E], non-negative, adding up to 1: what the balancing terms are about.
        weights: [S, K], what each chosen expert's output is multiplied by.
        indices: [S, K], the chosen experts, no two of a token alike.
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    weights: torch.Tensor
    indices: torch.Tensor


# Routers


class _Router(nn.Module):
    """Scores of tokens against one learned vector an expert; `weight` [E, D]."""

    def __init__(self, config: MiniLLMConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalised = config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def init_weights(self, config: MiniLLMConfig) -> None:
        init.normal_(self.weight, mean=0.0, std=config.initializer_range)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.weight.float())


class SoftmaxRouter(_Router):
    """The K largest of softmax(logits), as weights, renormalised where `norm_topk_prob` says so.

    Mixtral (arXiv:2401.04088, section 2.1; there as softmax over the K largest logits, which is the same), Qwen3-MoE,
    Qwen3-Next. Probabilities: the softmax.
    """

    def forward(self, x: torch.Tensor) -> Choice:
        """[S, D] -> Choice."""
        logits = self.logits(x)
        probabilities = logits.softmax(-1)
        weights, indices = probabilities.topk(self.top_k, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return Choice(logits, probabilities, weights * self.scale, indices)


class SigmoidRouter(_Router):
    """Each expert scored for itself, balanced by a bias that acts on the choice and never on the weights.

    DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, equations 12-16: the K largest sigmoid(logit) + bias among the
    `topk_group` of `n_group` groups whose best two such scores are largest; weights are the scores without the bias.
    Probabilities: the scores normalised over all experts (equation 19).

    `e_score_correction_bias` [E] is part of the state dict and stays fp32 in a bf16 model, since one step of
    `update_bias` is smaller than what bf16 resolves.
    """

    def __init__(self, config: MiniLLMConfig):
        super().__init__(config)
        self.groups, self.top_groups = config.n_group, config.topk_group
        self.bias_speed = config.router_bias_update_speed
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def init_weights(self, config: MiniLLMConfig) -> None:
        super().init_weights(config)
        init.zeros_(self.e_score_correction_bias)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if after.dtype != torch.float32:  # cast: take the values from before, on the device of after
            self.e_score_correction_bias = after.float() if before.is_meta else before.to(after.device)
        return self

    def forward(self, x: torch.Tensor) -> Choice:
        """[S, D] -> Choice."""
        logits = self.logits(x)
        scores = logits.sigmoid()
        indices = self._allowed(scores + self.e_score_correction_bias.float()).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, indices)
        if self.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        probabilities = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        return Choice(logits, probabilities, weights * self.scale, indices)

    def _allowed(self, biased: torch.Tensor) -> torch.Tensor:
        """Scores [S, E] with -inf outside the best groups."""
        if self.groups == 1:
            return biased
        grouped = biased.unflatten(-1, (self.groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
        allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=biased.device).scatter(1, best, True)
        return grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)

    @torch.no_grad()
    def update_bias(self, counts: torch.Tensor) -> None:
        """Raise the bias of experts below the mean load and lower that of those above it, by the update speed.

        Balancing without a loss (arXiv:2412.19437, section 2.1.2; arXiv:2408.15664, algorithm 1).

        Args:
            counts: [E], the tokens each expert got in one optimizer step, over all ranks and micro-batches.
        """
        counts = counts.to(self.e_score_correction_bias)
        self.e_score_correction_bias += self.bias_speed * (counts.mean() - counts).sign()


class _Float32Linear(nn.Linear):
    """A linear layer that computes and answers in fp32, whatever it is stored in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class NoisyTopKRouter(nn.Module):
    """Softmax over the K largest logits, to which training adds normal noise of a learned width for each token.

    Shazeer et al. (arXiv:1701.06538), section 2.1, equations 3-5, with biases in both projections: logits =
    router(x) + normal() * softplus(noise(x)); without the noise in evaluation. The weights add up to 1 by
    construction. Probabilities: softmax over all logits, noise included.
    """

    def __init__(self, config: MiniLLMConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        self.router = _Float32Linear(config.hidden_size, config.num_experts)
        self.noise = _Float32Linear(config.hidden_size, config.num_experts)

    def forward(self, x: torch.Tensor) -> Choice:
        """[S, D] -> Choice."""
        logits = self.router(x)
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x))
        kept, indices = logits.topk(self.top_k, dim=-1)
        return Choice(logits, logits.softmax(-1), kept.softmax(-1) * self.scale, indices)


ROUTERS: dict[str, type[nn.Module]] = {
    "softmax": SoftmaxRouter,
    "sigmoid": SigmoidRouter,
    "noisy_topk": NoisyTopKRouter,
}


# Balancing terms: each takes what one router said of B rows and gives one number a row.


class Tally(NamedTuple):
    """Routing of B rows, reduced over their counted tokens; all fp32, 0 for a row without counted tokens.

    Attributes:
        load: [B, E], share of the row's tokens whose K experts include this one; adds up to K.
        probability: [B, E], mean routing probability; adds up to 1.
        squared_normaliser: [B], mean of logsumexp(logits)^2.
        top_k: K.
    """

    load: torch.Tensor
    probability: torch.Tensor
    squared_normaliser: torch.Tensor
    top_k: int


def load_balancing(tally: Tally) -> torch.Tensor:
    """[B]: E * sum_i load_i * probability_i; K where all is even.

    Switch (arXiv:2101.03961), equations 4-6, with K experts a token as in transformers' load_balancing_loss_func.
    """
    return tally.load.shape[-1] * (tally.load * tally.probability).sum(-1)


def importance(tally: Tally) -> torch.Tensor:
    """[B]: KL(mean probabilities || uniform) = log E - entropy of the mean probabilities; 0 where all is even.

    After the importance loss of Shazeer et al. (arXiv:1701.06538), section 4, which takes the squared coefficient of
    variation in place of the divergence.
    """
    # The clamp: a row without counted tokens has probabilities 0, and log 0 a gradient that 0 does not undo.
    even = tally.probability * tally.probability.shape[-1]
    return (tally.probability * even.clamp(min=torch.finfo(even.dtype).tiny).log()).sum(-1)


def router_z(tally: Tally) -> torch.Tensor:
    """[B]: mean of logsumexp(logits)^2. ST-MoE (arXiv:2202.08906), equation 5."""
    return tally.squared_normaliser


def sequence_balancing(tally: Tally) -> torch.Tensor:
    """[B]: sum_i E / K * load_i * probability_i; 1 where all is even. DeepSeek-V3 (arXiv:2412.19437), equations 17-20.

    load_i counts what was used, the choice with biases.
    """
    return load_balancing(tally) / tally.top_k


BALANCING: dict[str, Callable[[Tally], torch.Tensor]] = {
    "load_balancing": load_balancing,
    "importance": importance,
    "router_z": router_z,
    "sequence_balancing": sequence_balancing,
}


def summarise(choice: Choice, counted: torch.Tensor, terms: list[str]) -> Routing:
    """What a router did with the tokens where `counted` [B, T] is true."""
    top_k = choice.indices.shape[-1]
    chosen = torch.zeros_like(choice.logits, requires_grad=False).scatter(1, choice.indices, 1.0)  # [S, E]
    tokens = counted.float()[..., None]  # [B, T, 1]
    per_row = tokens.sum(1).clamp(min=1)  # [B, 1]

    def total(values: torch.Tensor) -> torch.Tensor:  # [S, N] -> [B, N]
        return (tokens * values.view(*counted.shape, -1)).sum(1)

    counts = total(chosen)
    tally = Tally(
        load=counts / per_row,
        probability=total(choice.probabilities) / per_row,
        squared_normaliser=(total(choice.logits.logsumexp(-1, keepdim=True).square()) / per_row)[:, 0],
        top_k=top_k,
    )
    return Routing(counts.sum(0), {name: BALANCING[name](tally) for name in terms})


# Experts
#
# Every product of a layer's experts is one autograd function. It keeps the parameters themselves, never views or casts
# of them (under ZeRO-3 a saved parameter is emptied and gathered again, a saved view of it stays whole), and of what it
# computes only the input of the activation: gathered tokens and activations are made again in backward. Weighting a
# row before the down product instead of after it gives the same sum, and spares keeping that product for the gradient
# of the weight.


class _Order(NamedTuple):
    """Rows, one for each (token, expert) pair, sorted by expert and within an expert by token.

    Attributes:
        rows: [R], the place of each sorted row among [S, K] flattened.
        ends: [E] int32, one past each expert's last row.
    """

    rows: torch.Tensor
    ends: torch.Tensor


def _sort_by_expert(indices: torch.Tensor, experts: int) -> _Order:
    """Indices [S, K] -> _Order."""
    chosen, rows = indices.flatten().sort(stable=True)
    ends = torch.searchsorted(chosen, torch.arange(experts, device=indices.device), right=True, out_int32=True)
    return _Order(rows, ends)


def _swiglu(z: torch.Tensor) -> torch.Tensor:
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(gradient: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    gate, up = z.chunk(2, dim=-1)
    of_z = torch.empty_like(z)
    of_gate, of_up = of_z.chunk(2, dim=-1)
    torch.ops.aten.silu_backward(gradient * up, gate, grad_input=of_gate)
    torch.mul(gradient, F.silu(gate), out=of_up)
    return of_z


# name -> the activation between the two products, and its derivative times a gradient
_INNER: dict[str, tuple[Callable, Callable]] = {
    "swiglu": (_swiglu, _swiglu_backward),
    "silu": (ACTIVATIONS["silu"], torch.ops.aten.silu_backward),
    "gelu": (ACTIVATIONS["gelu"], torch.ops.aten.gelu_backward),
    "gelu_new": (ACTIVATIONS["gelu_new"], partial(torch.ops.aten.gelu_backward, approximate="tanh")),
}


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if should_widen(x) else x


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b (+ bias), also written to `out`, whose dtype may be narrower."""
    y = out if a.dtype == out.dtype else a.new_empty(out.shape)
    torch.mm(a, b, out=y) if bias is None else torch.addmm(_wide(bias), a, b, out=y)
    if y is not out:
        out.copy_(y)
    return y


def _looped_forward(x, weights, order, ends, up, up_bias, down, down_bias, inner):
    """One expert after the other, each on a piece that fits the cache; see _experts_forward."""
    activate, _ = _INNER[inner]
    tokens, weight_of = order // weights.shape[1], weights.flatten()[order]
    z = x.new_empty(tokens.shape[0], up.shape[1])
    y = torch.zeros_like(x, dtype=torch.float32)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        piece, weight = tokens[start:end], weight_of[start:end, None]
        bias = None if up_bias is None else up_bias[expert]
        z_piece = _product(_wide(x.index_select(0, piece)), _wide(up[expert]).t(), z[start:end], bias)
        out = activate(z_piece).mul_(weight) @ _wide(down[expert]).t()
        if down_bias is not None:
            out += weight * down_bias[expert]
        y.index_add_(0, piece, out.float())
        start = end
    return y.to(x.dtype), z


def _looped_backward(gradient, x, weights, order, ends, z, up, up_bias, down, down_bias, inner):
    activate, activate_backward = _INNER[inner]
    tokens, weight_of = order // weights.shape[1], weights.flatten()[order]
    of_x, of_weight = torch.zeros_like(x, dtype=torch.float32), torch.empty_like(weight_of)
    of_up, of_up_bias, of_down, of_down_bias = (
        None if p is None else torch.empty_like(p) for p in (up, up_bias, down, down_bias)
    )
    start = 0
    for expert, end in enumerate(ends.tolist()):
        piece, weight = tokens[start:end], weight_of[start:end, None]
        of_y, z_piece = _wide(gradient.index_select(0, piece)), _wide(z[start:end])
        activation, of_activation = activate(z_piece), of_y @ _wide(down[expert])
        of_weight[start:end] = (of_activation * activation).sum(-1)
        if down_bias is not None:
            of_weight[start:end] += of_y @ _wide(down_bias[expert])
            of_down_bias[expert] = (of_y * weight).sum(0)
        _product(of_y.t(), activation.mul_(weight), of_down[expert])
        of_z = activate_backward(of_activation.mul_(weight), z_piece)
        if up_bias is not None:
            of_up_bias[expert] = of_z.sum(0)
        _product(of_z.t(), _wide(x.index_select(0, piece)), of_up[expert])
        of_x.index_add_(0, piece, (of_z @ _wide(up[expert])).float())
        start = end
    of_weights = torch.empty_like(of_weight).index_copy_(0, order, of_weight).view_as(weights)
    return of_x.to(x.dtype), of_weights, of_up, of_up_bias, of_down, of_down_bias


def _can_group(x: torch.Tensor, *parameters: torch.Tensor) -> bool:
    """Whether torch's grouped product is the faster way: bf16 on CUDA from compute capability 8.0 on.

    It needs every row to begin at a multiple of 16 bytes, the first of a parameter inside a flat buffer included.
    """
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and all(p.data_ptr() % 16 == 0 and not any(n % 8 for n in p.shape[1:]) for p in parameters)
    )


def _grouped_sum(rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[R, N] -> [E, N] fp32, the sum of each expert's rows, by a product: the same bits every time."""
    expert_of = torch.searchsorted(ends, torch.arange(rows.shape[0], device=rows.device), right=True)
    return F.one_hot(expert_of, ends.shape[0]).t().float() @ rows.float()


def _grouped_outer(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[R, N], [R, M] -> [E, N, M], the sum of outer products of each expert's rows."""
    products = F.grouped_mm(left.t(), right, offs=ends)
    # An expert without rows is left unwritten on some devices (pytorch issue 172439).
    idle = ends == F.pad(ends[:-1], (1, 0))
    return products.masked_fill_(idle[:, None, None], 0.0)


def _rows_of(bias: torch.Tensor, ends: torch.Tensor, rows: int) -> torch.Tensor:
    """[E, N] -> [R, N], each row's expert's."""
    return bias[torch.searchsorted(ends, torch.arange(rows, device=bias.device), right=True)]


def _grouped_forward(x, weights, order, ends, up, up_bias, down, down_bias, inner):
    """All experts in one grouped product, without waiting for the device to say how many rows each has."""
    activate, _ = _INNER[inner]
    top_k, count = weights.shape[1], order.shape[0]
    weight = weights.flatten()[order, None]
    z = F.grouped_mm(x.index_select(0, order // top_k), up.transpose(1, 2), offs=ends)
    if up_bias is not None:
        z += _rows_of(up_bias, ends, count)
    out = F.grouped_mm(activate(z).mul_(weight), down.transpose(1, 2), offs=ends)
    if down_bias is not None:
        out += weight * _rows_of(down_bias, ends, count)
    return out.index_select(0, order.argsort()).view(*weights.shape, -1).sum(1, dtype=torch.float32).to(x.dtype), z


def _grouped_backward(gradient, x, weights, order, ends, z, up, up_bias, down, down_bias, inner):
    activate, activate_backward = _INNER[inner]
    top_k, inverse = weights.shape[1], order.argsort()
    tokens, weight = order // top_k, weights.flatten()[order, None]
    of_y, activation = gradient.index_select(0, tokens), activate(z)
    of_activation = F.grouped_mm(of_y, down, offs=ends)
    of_weight = (of_activation * activation).sum(-1, dtype=torch.float32)
    of_up_bias = of_down_bias = None
    if down_bias is not None:
        of_weight += (of_y * _rows_of(down_bias, ends, order.shape[0])).sum(-1, dtype=torch.float32)
        of_down_bias = _grouped_sum(of_y * weight, ends).to(down_bias.dtype)
    of_down = _grouped_outer(of_y, activation.mul_(weight), ends)
    of_z = activate_backward(of_activation.mul_(weight), z)
    if up_bias is not None:
        of_up_bias = _grouped_sum(of_z, ends).to(up_bias.dtype)
    of_up = _grouped_outer(of_z, x.index_select(0, tokens), ends)
    of_rows = F.grouped_mm(of_z, up, offs=ends)
    of_x = of_rows.index_select(0, inverse).view(*weights.shape, -1).sum(1, dtype=torch.float32).to(x.dtype)
    return of_x, of_weight[inverse].view_as(weights), of_up, of_up_bias, of_down, of_down_bias


def _experts_forward(
    x: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    inner: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = sum over a token's experts of weight * (down @ inner(up @ x + up_bias) + down_bias).

    Args:
        x: [S, D].
        weights: [S, K] fp32.
        order, ends: _Order.
        up: [E, 2H, D] with inner swiglu, else [E, H, D]; up_bias: of its first two dimensions.
        down: [E, D, H]; down_bias: [E, D].
        inner: a key of _INNER.

    Returns: y [S, D], and what backward needs, the input of `inner` for each sorted row.
    """
    path = _grouped_forward if _can_group(x, up, down) else _looped_forward
    return path(x, weights, order, ends, up, up_bias, down, down_bias, inner)


def _experts_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    z: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    inner: str,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, weights, up, up_bias, down and down_bias; None for a bias that is not there."""
    path = _grouped_backward if _can_group(x, up, down) else _looped_backward
    return path(gradient.contiguous(), x, weights, order, ends, z, up, up_bias, down, down_bias, inner)


def _register_operators() -> None:
    """The two functions as torch.ops.minillm.experts and experts_backward, so that the compiler need not look inside:
    the loop depends on how many rows each expert has."""
    if hasattr(torch.ops.minillm, "experts"):  # a second copy of this module, as exported code is, shares them
        return
    inputs = (
        "Tensor x, Tensor weights, Tensor order, Tensor ends, {}Tensor up, Tensor? up_bias, Tensor down, "
        "Tensor? down_bias, str inner"
    )

    def of_missing_empty(*arguments):
        x = arguments[0]
        return tuple(x.new_empty(0) if g is None else g for g in _experts_backward(*arguments))

    forward = torch.library.custom_op(
        "minillm::experts", _experts_forward, mutates_args=(), schema=f"({inputs.format('')}) -> (Tensor, Tensor)"
    )
    backward = torch.library.custom_op(
        "minillm::experts_backward",
        of_missing_empty,
        mutates_args=(),
        schema=f"(Tensor gradient, {inputs.format('Tensor z, ')}) -> ({', '.join(['Tensor'] * 6)})",
    )

    @forward.register_fake
    def _(x, weights, order, ends, up, up_bias, down, down_bias, inner):
        return torch.empty_like(x), x.new_empty(order.shape[0], up.shape[1])

    @backward.register_fake
    def _(gradient, x, weights, order, ends, z, up, up_bias, down, down_bias, inner):
        results = (x, weights, up, up_bias, down, down_bias)
        return tuple(x.new_empty(0) if p is None else p.new_empty(p.shape) for p in results)

    def keep(ctx, inputs, output):
        x, weights, order, ends, up, up_bias, down, down_bias, ctx.inner = inputs
        ctx.save_for_backward(x, weights, order, ends, output[1], up, up_bias, down, down_bias)

    def differentiate(ctx, of_y, of_z):
        of_x, of_weights, *of_parameters = backward(of_y, *ctx.saved_tensors, ctx.inner)
        given = ctx.saved_tensors[5:]
        return of_x, of_weights, None, None, *(g if p is not None else None for g, p in zip(of_parameters, given)), None

    forward.register_autograd(differentiate, setup_context=keep)


_register_operators()


class _ApplyExperts(torch.autograd.Function):
    """_experts_forward, differentiable."""

    @staticmethod
    def forward(ctx, x, weights, order, ends, up, up_bias, down, down_bias, inner):
        y, z = _experts_forward(x, weights, order, ends, up, up_bias, down, down_bias, inner)
        ctx.save_for_backward(x, weights, order, ends, z, up, up_bias, down, down_bias)
        ctx.inner = inner
        return y

    @staticmethod
    def backward(ctx, gradient):
        of_x, of_weights, *of_parameters = _experts_backward(gradient, *ctx.saved_tensors, ctx.inner)
        return of_x, of_weights, None, None, *of_parameters, None


def _apply_experts(x, weights, indices, up, up_bias, down, down_bias, inner):
    """Tokens [S, D], the weights and indices [S, K] of their experts -> [S, D]; the rest as in _experts_forward."""
    order, ends = _sort_by_expert(indices, up.shape[0])
    arguments = (x, weights, order, ends, up, up_bias, down, down_bias, inner)
    if torch.compiler.is_compiling():
        return torch.ops.minillm.experts(*arguments)[0]
    return _ApplyExperts.apply(*arguments)


class SwiGLUExperts(nn.Module):
    """E SwiGLU blocks: `gate_up_proj` [E, 2H, D], gate first, and `down_proj` [E, D, H]."""

    def __init__(self, config: MiniLLMConfig):
        super().__init__()
        experts, hidden, size = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * size, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, size))

    def init_weights(self, config: MiniLLMConfig) -> None:
        for parameter in (self.gate_up_proj, self.down_proj):
            init.normal_(parameter, mean=0.0, std=config.initializer_range)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Tokens [S, D], the weights and indices [S, K] of their experts -> [S, D]."""
        return _apply_experts(x, weights, indices, self.gate_up_proj, None, self.down_proj, None, "swiglu")


class MLPExperts(nn.Module):
    """E two-layer blocks: `up_proj` [E, H, D], `down_proj` [E, D, H], with `mlp_bias` also their biases."""

    def __init__(self, config: MiniLLMConfig):
        super().__init__()
        experts, hidden, size = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.inner = config.hidden_act
        self.up_proj = nn.Parameter(torch.empty(experts, size, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, size))
        self.up_bias = nn.Parameter(torch.empty(experts, size)) if config.mlp_bias else None
        self.down_bias = nn.Parameter(torch.empty(experts, hidden)) if config.mlp_bias else None

    def init_weights(self, config: MiniLLMConfig) -> None:
        for parameter in (self.up_proj, self.down_proj):
            init.normal_(parameter, mean=0.0, std=config.initializer_range)
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                init.zeros_(bias)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Tokens [S, D], the weights and indices [S, K] of their experts -> [S, D]."""
        parameters = (self.up_proj, self.up_bias, self.down_proj, self.down_bias)
        return _apply_experts(x, weights, indices, *parameters, self.inner)


EXPERTS: dict[str, type[nn.Module]] = {"swiglu": SwiGLUExperts, "mlp": MLPExperts}


class SparseMoE(nn.Module):
    """The sum of each token's K experts, weighted by the router, and of a shared expert where there is one.

    Dropless: an expert takes as many tokens as choose it. The shared expert (DeepSeekMoE, arXiv:2401.06066, section
    3.2) sees every token; with `shared_expert_gate` it is scaled by sigmoid(x @ gate) (Qwen3-Next).
    """

    def __init__(self, config: MiniLLMConfig):
        from minillm.models.loss import TERMS  # there, not above: that module imports this one's Routing

        super().__init__()
        self.gate = ROUTERS[config.router_type](config)
        self.experts = EXPERTS[config.mlp_type](config)
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = build_dense_mlp(config, config.shared_expert_intermediate_size)
            if config.shared_expert_gate:
                self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False)
        self.terms = [name for name, field in TERMS.items() if getattr(config, field)]

    def forward(self, x: torch.Tensor, counted: torch.Tensor | None = None) -> tuple[torch.Tensor, Routing | None]:
        """[B, T, D] -> [B, T, D], and the Routing over the tokens where `counted` [B, T] is true, if it is given."""
        tokens = x.flatten(0, 1)
        choice = self.gate(tokens)
        y = self.experts(tokens, choice.weights, choice.indices).view_as(x)
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            y = y + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared)
        return y, None if counted is None else summarise(choice, counted, self.terms)
