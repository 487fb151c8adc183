"""Multi-head latent attention: keys and values are expanded from one small vector a token, which is all a cache holds.

DeepSeek-V2 (arXiv:2405.04434), section 2.1, and V3 (arXiv:2412.19437), section 2.1.1. Contract: the module names and
shapes of DeepSeek's weights; the rotary parts in the half-split layout (DeepSeek's are interleaved:
minillm.interop.rotary_layout permutes the rows). A cache gets the normalised latent [B, 1, T, C] in the place of keys
and the rotated shared key [B, 1, T, R] in that of values.

Shapes: B batch, T time (queries), S time (keys, cached ones included), D hidden, N heads, C kv_lora_rank,
P qk_nope_head_dim (not rotated), R qk_rope_head_dim (rotated), V v_head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache

from minillm.models.attention import PackedDocuments, attend
from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.linear import Linear, should_widen
from minillm.models.normalization import build_norm
from minillm.models.positions import apply_rotary, yarn_attention_scale

# Of the two inner norms, in DeepSeek's code and in transformers', whatever rms_norm_eps says of the others.
INNER_EPS = 1e-6


class LatentAttention(nn.Module):
    """Causal self-attention whose keys and values come from a shared latent, with decoupled rotary positions.

    Attention over cached tokens is computed in the latent space (section 2.1.2 of the paper, "absorb"): there each
    head is a query of C + R numbers against one key all heads share, and no key of the cache is ever expanded.
    """

    def __init__(self, config: MiniLLMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.kv_lora_rank = config.kv_lora_rank
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_dim = config.v_head_dim
        self.attention_dropout = config.attention_dropout
        head_dim = self.nope_dim + self.rope_dim
        self.scale = head_dim**-0.5 * yarn_attention_scale(config.rope_scaling)
        self.has_query_latent = config.q_lora_rank is not None
        if self.has_query_latent:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank, bias=False)
            self.q_a_layernorm = _inner_norm(config, config.q_lora_rank)
            self.q_b_proj = Linear(config.q_lora_rank, self.num_heads * head_dim, bias=False)
        else:
            self.q_proj = Linear(config.hidden_size, self.num_heads * head_dim, bias=False)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, self.kv_lora_rank + self.rope_dim, bias=False)
        self.kv_a_layernorm = _inner_norm(config, self.kv_lora_rank)
        self.kv_b_proj = LatentExpansion(self.kv_lora_rank, self.num_heads, self.nope_dim, self.value_dim)
        self.o_proj = Linear(self.num_heads * self.value_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        attention_mask: torch.Tensor | PackedDocuments | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]; `positions` is the rotation [B, T, 1, R], the mask as `attend` takes it."""
        query_nope, query_rope = self._queries(hidden_states, positions)  # [B, N, T, P], [B, N, T, R]
        compressed = self.kv_a_proj_with_mqa(hidden_states)
        latent, key_rope = compressed.split((self.kv_lora_rank, self.rope_dim), dim=-1)
        latent = self.kv_a_layernorm(latent)[:, None]  # [B, 1, T, C]
        key_rope = apply_rotary(key_rope[:, :, None], positions).transpose(1, 2)  # [B, 1, T, R]
        if cache is not None:
            latent, key_rope = cache.update(latent, key_rope, self.layer_idx)  # [B, 1, S, C], [B, 1, S, R]
        # Only a cache makes more keys than queries, and only there is the mask never PackedDocuments.
        in_latent_space = self._is_cheaper_in_latent_space(query_nope.shape[2], latent.shape[2])
        form = self._attend_latent if in_latent_space else self._attend_expanded
        mixed = form(query_nope, query_rope, latent, key_rope, attention_mask, self.attention_dropout * self.training)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _queries(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.has_query_latent:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        else:
            query = self.q_proj(hidden_states)
        query = query.unflatten(-1, (self.num_heads, -1))  # [B, T, N, P + R]
        nope, rope = query.split((self.nope_dim, self.rope_dim), dim=-1)
        return nope.transpose(1, 2), apply_rotary(rope, positions).transpose(1, 2)

    def _is_cheaper_in_latent_space(self, num_queries: int, num_keys: int) -> bool:
        """Whether there are cached keys, and for each head fewer multiplications without expanding them.

        So it is for one token or a few; a chunk of some hundred tokens pays for the expansion of all keys.
        """
        rank, expanded = self.kv_lora_rank, self.nope_dim + self.value_dim
        in_latent_space = num_queries * rank * (expanded + 2 * num_keys)
        return num_queries < num_keys and in_latent_space < num_keys * expanded * (rank + num_queries)

    def _attend_expanded(self, query_nope, query_rope, latent, key_rope, mask, dropout=0.0) -> torch.Tensor:
        """[B, N, T, V], from keys and values of every head."""
        key_nope, value = self.kv_b_proj(latent).split((self.nope_dim, self.value_dim), dim=-1)  # [B, N, S, P or V]
        query = torch.cat((query_nope, query_rope), dim=-1)
        key = torch.cat((key_nope, key_rope.expand(-1, self.num_heads, -1, -1)), dim=-1)
        return attend(query, key, value, mask, dropout=dropout, scale=self.scale)

    def _attend_latent(self, query_nope, query_rope, latent, key_rope, mask, dropout=0.0) -> torch.Tensor:
        """[B, N, T, V], from the latents alone: the same numbers, because (W_k c) . q = c . (W_k^T q).

        Without a mask every query sees every key.
        """
        dtype = query_nope.dtype
        query = self.kv_b_proj(query_nope, absorb="key")  # [B, N, T, C]
        # Written out: all heads share one key, so that a head's queries are rows of one product and the cache is read
        # where it lies, neither joined nor repeated.
        if should_widen(query):
            query, query_rope, latent, key_rope = (x.float() for x in (query, query_rope, latent, key_rope))
        heads, length = query.shape[1:3]
        latent, key_rope = latent[:, 0], key_rope[:, 0]  # [B, S, C], [B, S, R]
        scores = query.flatten(1, 2) @ latent.mT + query_rope.flatten(1, 2) @ key_rope.mT  # [B, N * T, S]
        scores = scores.unflatten(1, (heads, length)).float() * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0).to(latent.dtype)  # [B, N, T, S]
        mixed = (weights.flatten(1, 2) @ latent).unflatten(1, (heads, length)).to(dtype)  # [B, N, T, C]
        return self.kv_b_proj(mixed, absorb="value")


class LatentExpansion(Linear):
    """A latent -> each head's key part and value; also those two products turned around, for attention over latents.

    All three are this module's own forward, because ZeRO-3 has the weight, [N (P + V), C] as in DeepSeek's files,
    only there.
    """

    def __init__(self, rank: int, num_heads: int, key_dim: int, value_dim: int):
        super().__init__(rank, num_heads * (key_dim + value_dim), bias=False)
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim

    def forward(self, x: torch.Tensor, absorb: str | None = None) -> torch.Tensor:
        """Expand a latent, or move one part of the expansion to the other side of attention.

        Args:
            x: None: latents [B, 1, S, C]; "key": queries [B, N, T, P]; "value": mixed latents [B, N, T, C].
            absorb: which part.

        Returns:
            [B, N, S, P + V]; "key": queries for latents, [B, N, T, C]; "value": [B, N, T, V].
        """
        if absorb is None:
            expanded = super().forward(x)[:, 0]  # [B, S, N (P + V)]
            return expanded.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        dtype = x.dtype
        key, value = self.weight.unflatten(0, (self.num_heads, -1)).split((self.key_dim, self.value_dim), dim=1)
        part = key if absorb == "key" else value.mT  # [N, P, C] or [N, C, V]
        if should_widen(x):
            x, part = x.float(), part.float()
        return torch.einsum("bnti,nio->bnto", x, part).to(dtype)  # `@` would copy the weight for each row of the batch


def _inner_norm(config: MiniLLMConfig, size: int) -> nn.Module:
    norm = build_norm(config, size)
    norm.eps = INNER_EPS
    return norm
