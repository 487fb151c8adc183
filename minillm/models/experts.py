"""Experts: the feed-forward blocks of a sparse layer, stacked into one tensor a product; the table by `mlp_type`.

Contract: dropless, never a loop over tokens, the same bits from run to run. Every product of a layer's experts is one
autograd function. It keeps the parameters themselves, never views or casts of them (under ZeRO-3 a saved parameter is
emptied and gathered again, a saved view of it stays whole), and of what it computes only the input of the activation:
gathered tokens and activations are made again in backward. Weighting a row before the down product instead of after it
gives the same sum, and spares keeping that product for the gradient of the weight.

Shapes: S tokens, D hidden, E experts, K experts a token, R rows (S * K), H intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from minillm.compat.transformers_api import init
from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.linear import should_widen
from minillm.models.mlp import ACTIVATIONS


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
    if torch.compiler.is_compiling():  # which writes one kernel of it
        return torch.cat((torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)), dim=-1)
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
    for expert, end in enumerate(_numbers(ends)):
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
    for expert, end in enumerate(_numbers(ends)):
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


def _numbers(ends: torch.Tensor | list[int]) -> list[int]:
    return ends if isinstance(ends, list) else ends.tolist()


@torch.compiler.assume_constant_result
def _has_grouped_products(device: torch.device) -> bool:
    """Whether torch's grouped product has a kernel for this GPU. Below Hopper it copies `offs` to the CPU, once a
    product, and loops: seven waits for the device in a layer, where the loop here has one."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _can_group(x: torch.Tensor, *parameters: torch.Tensor) -> bool:
    """Whether torch's grouped product is the faster way: bf16 on CUDA from compute capability 9.0 on.

    It needs every row to begin at a multiple of 16 bytes, the first of a parameter inside a flat buffer included (the
    compiler copies what does not).
    """
    if not x.is_cuda or x.dtype != torch.bfloat16 or not _has_grouped_products(x.device):
        return False
    if any(n % 8 for p in parameters for n in p.shape[1:]):
        return False
    return torch.compiler.is_compiling() or all(p.data_ptr() % 16 == 0 for p in parameters)


def _multiply_rows(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor, transposed: bool) -> torch.Tensor:
    return F.grouped_mm(rows, matrices.transpose(1, 2) if transposed else matrices, offs=ends)


def _multiply_outer(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    products = F.grouped_mm(left.t(), right, offs=ends)
    # An expert without rows is left unwritten on some devices (pytorch issue 172439).
    idle = ends == F.pad(ends[:-1], (1, 0))
    return products.masked_fill_(idle[:, None, None], 0.0)


def _grouped_rows(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor, transposed: bool) -> torch.Tensor:
    """[R, N] times each row's expert's matrix: [E, N, M], or [E, M, N] where it is to be transposed -> [R, M]."""
    call = torch.ops.minillm.multiply_rows if torch.compiler.is_compiling() else _multiply_rows
    return call(rows, matrices, ends, transposed)


def _grouped_outer(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[R, N], [R, M] -> [E, N, M], the sum of outer products of each expert's rows."""
    call = torch.ops.minillm.multiply_outer if torch.compiler.is_compiling() else _multiply_outer
    return call(left, right, ends)


def _grouped_sum(rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[R, N] -> [E, N], the sum of each expert's rows, by a product: the same bits every time."""
    return _grouped_outer(rows.new_ones(rows.shape[0], 8), rows, ends)[:, 0]


def _rows_of(bias: torch.Tensor, ends: torch.Tensor, rows: int) -> torch.Tensor:
    """[E, N] -> [R, N], each row's expert's."""
    return bias[torch.searchsorted(ends, torch.arange(rows, device=bias.device), right=True)]


def _grouped_forward(x, weights, order, ends, up, up_bias, down, down_bias, inner):
    """All experts in one grouped product, without waiting for the device to say how many rows each has."""
    activate, _ = _INNER[inner]
    top_k, count = weights.shape[1], order.shape[0]
    weight = weights.flatten()[order, None]
    z = _grouped_rows(x.index_select(0, order // top_k), up, ends, True)
    if up_bias is not None:
        z += _rows_of(up_bias, ends, count)
    out = _grouped_rows(activate(z).mul_(weight), down, ends, True)
    if down_bias is not None:
        out += weight * _rows_of(down_bias, ends, count)
    return out.index_select(0, order.argsort()).view(*weights.shape, -1).sum(1, dtype=torch.float32).to(x.dtype), z


def _grouped_backward(gradient, x, weights, order, ends, z, up, up_bias, down, down_bias, inner):
    activate, activate_backward = _INNER[inner]
    top_k, inverse = weights.shape[1], order.argsort()
    tokens, weight = order // top_k, weights.flatten()[order, None]
    of_y, activation = gradient.index_select(0, tokens), activate(z)
    of_activation = _grouped_rows(of_y, down, ends, False)
    of_weight = (of_activation * activation).sum(-1, dtype=torch.float32)
    of_up_bias = of_down_bias = None
    if down_bias is not None:
        of_weight += (of_y * _rows_of(down_bias, ends, order.shape[0])).sum(-1, dtype=torch.float32)
        of_down_bias = _grouped_sum((of_y * weight).to(of_y.dtype), ends).to(down_bias.dtype)
    of_down = _grouped_outer(of_y, activation.mul_(weight), ends)
    of_z = activate_backward(of_activation.mul_(weight), z)
    if up_bias is not None:
        of_up_bias = _grouped_sum(of_z, ends).to(up_bias.dtype)
    of_up = _grouped_outer(of_z, x.index_select(0, tokens), ends)
    of_rows = _grouped_rows(of_z, up, ends, False)
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
    """What the compiler does not look into, as torch.ops.minillm.*: `experts` and `experts_backward`, since the loop
    depends on how many rows each expert has; and the grouped products alone, around which it fuses, since their kernel
    asserts on the device that rows begin at multiples of 16 bytes, and the compiler would lay them out anew."""
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

    rows = torch.library.custom_op(
        "minillm::multiply_rows",
        lambda rows, *others: _multiply_rows(rows.contiguous(), *others),
        mutates_args=(),
        schema="(Tensor rows, Tensor matrices, Tensor ends, bool transposed) -> Tensor",
    )
    outer = torch.library.custom_op(
        "minillm::multiply_outer",
        lambda left, right, ends: _multiply_outer(left.contiguous(), right.contiguous(), ends),
        mutates_args=(),
        schema="(Tensor left, Tensor right, Tensor ends) -> Tensor",
    )

    @rows.register_fake
    def _(rows, matrices, ends, transposed):
        return rows.new_empty(rows.shape[0], matrices.shape[1 if transposed else 2])

    @outer.register_fake
    def _(left, right, ends):
        return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


_register_operators()


class _ApplyExperts(torch.autograd.Function):
    """_experts_forward, differentiable."""

    @staticmethod
    def forward(ctx, x, weights, order, ends, up, up_bias, down, down_bias, inner):
        # The loop waits for the device here, and not once more in backward.
        ctx.numbers = None if _can_group(x, up, down) else ends.tolist()
        places = ends if ctx.numbers is None else ctx.numbers
        y, z = _experts_forward(x, weights, order, places, up, up_bias, down, down_bias, inner)
        ctx.save_for_backward(x, weights, order, ends, z, up, up_bias, down, down_bias)
        ctx.inner = inner
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weights, order, ends, *rest = ctx.saved_tensors
        places = ends if ctx.numbers is None else ctx.numbers
        of_x, of_weights, *of_parameters = _experts_backward(gradient, x, weights, order, places, *rest, ctx.inner)
        return of_x, of_weights, None, None, *of_parameters, None


def _apply_experts(x, weights, indices, up, up_bias, down, down_bias, inner):
    """Tokens [S, D], the weights and indices [S, K] of their experts -> [S, D]; the rest as in _experts_forward."""
    order, ends = _sort_by_expert(indices, up.shape[0])
    arguments = (x, weights, order, ends, up, up_bias, down, down_bias, inner)
    if torch.compiler.is_compiling() and not _can_group(x, up, down):
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
