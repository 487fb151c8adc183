"""Gated DeltaNet: the linear-attention mixer of Qwen3-Next (Yang, Kautz, Hatamizadeh, arXiv:2412.06464).

Contract: q, k and v come through a short causal convolution and SiLU, a decay and a step size from products of their
own; the gated delta rule (minillm.models.delta_rule) mixes them over time, step by step for one token, in chunks for
more; its output is normalised head by head, gated, and projected back.

The mask is that of linear_attention layers (minillm.models.mixers): Segments, or None where each row is one document.
State and convolution begin anew where the segment changes. Padding, at either end of a row, neither decays nor writes
the state and enters no convolution; what comes out there is undefined.

Tensors against transformers' Qwen3NextGatedDeltaNet (minillm.interop.deltanet_layout maps them):
    qkv_proj.weight  rows: q of all key heads, k of all key heads, v of all value heads, each head by head.
    z_proj.weight    rows: the output gate of all value heads. Theirs is in_proj_qkvz.weight, whose rows are grouped by
                     key head: for each key head its q, its k, the v of its value heads, the z of its value heads.
    b_proj, a_proj   [N, D], for beta and the decay. Theirs is in_proj_ba.weight: for each key head the b rows of its
                     value heads, then the a rows.
    conv.weight      [channels, 1, kernel], channels in the order of qkv_proj's rows: conv1d.weight as it is.
    A_log, dt_bias, norm.weight, o_proj.weight (theirs: out_proj.weight): as they are.
Value head n belongs to key head n // (N / K), consecutive value heads sharing a key head, on both sides.

Shapes: B batch, T time, D hidden, K key heads, N value heads, H key dim, V value dim, F channels of the
convolution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache

from minillm.compat.transformers_api import init, linear_attention_states
from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.delta_rule import chunked_gated_delta_rule, recurrent_gated_delta_rule
from minillm.models.linear import Linear


class Segments(NamedTuple):
    """Which tokens belong together; made once a forward, for all layers.

    Attributes:
        numbers: int64 [B, T]: how many documents have begun before each token, not counting the row's first. Padding
            belongs to the document before it, and at the row's start to the one after it: it adds nothing to either.
            Segment 0 is what goes on from the state and the convolution's past, where there are any.
        real: bool [B, T], False at padding; None where there is none.
        borders: int64 [documents + 1], where documents begin in the flattened batch, at its end its length, once or
            several times; None where they are not known.
    """

    numbers: torch.Tensor
    real: torch.Tensor | None = None
    borders: torch.Tensor | None = None

    @classmethod
    def of(
        cls, documents: torch.Tensor, real: torch.Tensor | None = None, borders: torch.Tensor | None = None
    ) -> Segments:
        """From the document of each token [B, T], neighbours of equal number being one; the rest as above."""
        if real is None:
            begins = documents[:, 1:] != documents[:, :-1]
            borders = None if borders is None else borders.long()
            return cls(F.pad(begins.long().cumsum(1), (1, 0)), None, borders)
        steps = torch.arange(documents.shape[1], device=documents.device)
        last_real = torch.where(real, steps, 0).cummax(1).values  # the token itself, or the last real one
        filled, known = documents.gather(1, last_real), real.gather(1, last_real)
        begins = (filled[:, 1:] != filled[:, :-1]) & known[:, :-1]
        return cls(F.pad(begins.long().cumsum(1), (1, 0)), real)


class GatedDeltaNet(nn.Module):
    """The mixer of linear_attention layers."""

    def __init__(self, config: MiniLLMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_key_heads, self.num_value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        key_width, value_width = self.num_key_heads * self.key_dim, self.num_value_heads * self.value_dim
        self.widths = (key_width, key_width, value_width)
        self.qkv_proj = Linear(config.hidden_size, sum(self.widths), bias=False)
        self.z_proj = Linear(config.hidden_size, value_width, bias=False)
        self.b_proj = Linear(config.hidden_size, self.num_value_heads, bias=False)
        self.a_proj = Linear(config.hidden_size, self.num_value_heads, bias=False)
        self.conv = CausalConvolution(sum(self.widths), config.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.zeros(self.num_value_heads))
        self.dt_bias = nn.Parameter(torch.ones(self.num_value_heads))
        self.norm = GatedRMSNorm(config, self.value_dim)
        self.o_proj = Linear(value_width, config.hidden_size, bias=False)

    def init_weights(self, config: MiniLLMConfig) -> None:
        """Decay rates from uniform(0, 16), as Qwen3-Next's source; away from 0, whose logarithm is -inf."""
        init.copy_(self.A_log, torch.empty_like(self.A_log, dtype=torch.float32).uniform_(0.01, 16).log_())
        init.ones_(self.dt_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: Segments | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]; `positions` are not used, `mask` as in the header."""
        length = hidden_states.shape[1]
        segments, real, borders = (None, None, None) if mask is None else mask
        if cache is not None:
            borders = None  # with them no last state comes back
        mixed = self.qkv_proj(hidden_states)  # [B, T, F]
        beta = self.b_proj(hidden_states).float().sigmoid()  # [B, T, N]
        g = -self.A_log.float().exp() * F.softplus(self.a_proj(hidden_states).float() + self.dt_bias.float())
        if real is not None:
            mixed, beta, g = (x * real[..., None] for x in (mixed, beta, g))
        past_inputs = state = None
        if cache is not None:
            # [B, F, kernel or more] and [B, N, H, V]
            past_inputs, state = linear_attention_states(cache, self.layer_idx)
        convolved = self.conv(mixed, past_inputs, segments)
        query, key, value = convolved.split(self.widths, dim=-1)
        query, key = (x.unflatten(-1, (self.num_key_heads, self.key_dim)) for x in (query, key))
        value = value.unflatten(-1, (self.num_value_heads, self.value_dim))
        if length == 1:
            output, state = recurrent_gated_delta_rule(query, key, value, g, beta, state)
        else:
            output, state = chunked_gated_delta_rule(query, key, value, g, beta, state, segments, borders)
        if cache is not None:
            cache.update_conv_state(
                mixed.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv.kernel_size
            )
            cache.update_recurrent_state(state, self.layer_idx)
        gate = self.z_proj(hidden_states).unflatten(-1, (self.num_value_heads, self.value_dim))
        return self.o_proj(self.norm(output, gate).flatten(2))


class CausalConvolution(nn.Module):
    """SiLU of a causal convolution of each channel with itself, without bias."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))

    def init_weights(self, config: MiniLLMConfig) -> None:
        """Normal, like transformers' initialisation of a Conv1d."""
        init.normal_(self.weight, mean=0.0, std=config.initializer_range)

    def forward(
        self, x: torch.Tensor, past: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, T, F] -> [B, T, F] in x's dtype.

        Args:
            past: [B, F, at least kernel - 1], the inputs before x; absent: zeros.
            segments: [B, T], Segments.numbers: a token sees inputs of its own segment alone, and segment 0 the past.
        """
        reach = self.kernel_size - 1
        if past is None:
            return _Convolution.apply(x, self.weight, segments)
        x = torch.cat((past[..., past.shape[-1] - reach :].transpose(1, 2).to(x.dtype), x), dim=1)
        segments = None if segments is None else F.pad(segments, (reach, 0))
        return _Convolution.apply(x, self.weight, segments)[:, reach:]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kernel_size={self.kernel_size}"


class _Convolution(torch.autograd.Function):
    """SiLU of the sum over taps of shifted inputs times weights, in fp32; what came before the row is zeros.

    Tokens stay in rows of channels, as the products before and after have them: a Conv1d wants the transpose, and
    autograd would fill a padded gradient for each tap. It saves the parameter itself, which ZeRO-3 can follow.
    """

    @staticmethod
    def forward(ctx, x, weight, segments):
        taps = weight.squeeze(1).float().t().contiguous()  # [kernel, F], the token's own last
        wide = x.float()
        total = wide * taps[-1]
        for back in range(1, min(len(taps), x.shape[1])):
            total[:, back:].addcmul_(_within(wide[:, :-back], segments, back), taps[-1 - back])
        kept = total.to(x.dtype)
        ctx.save_for_backward(x, weight, segments, kept)
        return F.silu(kept)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, segments, kept = ctx.saved_tensors
        taps, wide = weight.squeeze(1).float().t().contiguous(), x.float()
        d_total = torch.ops.aten.silu_backward(gradient.float(), kept.float())
        d_x, d_taps = d_total * taps[-1], torch.zeros_like(taps)
        d_taps[-1] = _sum_of_tokens(d_total * wide)
        for back in range(1, min(len(taps), x.shape[1])):
            reached = _within(d_total[:, back:], segments, back)
            d_x[:, :-back].addcmul_(reached, taps[-1 - back])
            d_taps[-1 - back] = _sum_of_tokens(reached * wide[:, :-back])
        return d_x.to(x.dtype), d_taps.t()[:, None].to(weight.dtype), None


def _sum_of_tokens(x: torch.Tensor) -> torch.Tensor:
    """[B, T, F] -> [F], by a product: sum((0, 1)) takes several times as long on CPUs."""
    return x.new_ones(x.shape[0] * x.shape[1]) @ x.flatten(0, 1)


def _within(x: torch.Tensor, segments: torch.Tensor | None, back: int) -> torch.Tensor:
    """x [B, T - back, F], zero where the token `back` tokens before is of another segment."""
    return x if segments is None else x * (segments[:, back:] == segments[:, :-back])[..., None]


class GatedRMSNorm(nn.Module):
    """norm(x) * weight * silu(gate) over the last dimension, in fp32 (Qwen3-Next: the norm before the gate)."""

    def __init__(self, config: MiniLLMConfig, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = config.rms_norm_eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """[..., V] and [..., V] -> [..., V] in the gate's dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float() * F.silu(gate.float())).to(gate.dtype)
