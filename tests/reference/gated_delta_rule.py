"""The gated delta rule, one token, head and document at a time: slow, obvious, fp64.

Yang, Kautz, Hatamizadeh, arXiv:2412.06464, equation 10: S_t = S_{t-1} (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t
k_t^T and o_t = S_t q_t, with S [value dim, key dim] as in the paper, q and k of unit length, q over sqrt(key dim).
"""

from __future__ import annotations

import torch


def gated_delta_rule(q, k, v, g, beta, initial_state=None, documents=None):
    """q, k [B, T, K, H]; v [B, T, N, V]; g, beta [B, T, N]; initial_state [B, N, H, V]; documents [B, T], -1 padding.

    Returns o [B, T, N, V], zero at padding, and the last states [B, N, H, V].
    """
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    (batch, length, key_heads, key_dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    rows, last_states = [], []
    for b in range(batch):
        heads = []
        for n in range(value_heads):
            head = n // (value_heads // key_heads)
            start = torch.zeros(key_dim, value_dim).double() if initial_state is None else initial_state[b, n].double()
            state, document, outputs = start.T, None, []
            for t in range(length):
                number = 0 if documents is None else int(documents[b, t])
                if number < 0:
                    outputs.append(torch.zeros(value_dim).double())
                    continue
                if document is not None and number != document:
                    state = torch.zeros(value_dim, key_dim).double()
                document = number
                key = k[b, t, head] / (k[b, t, head].square().sum() + 1e-6).sqrt()
                query = q[b, t, head] / (q[b, t, head].square().sum() + 1e-6).sqrt() / key_dim**0.5
                alpha, step = g[b, t, n].exp(), beta[b, t, n]
                forget = alpha * (torch.eye(key_dim).double() - step * torch.outer(key, key))
                state = state @ forget + step * torch.outer(v[b, t, n], key)
                outputs.append(state @ query)
            heads.append(torch.stack(outputs))
            last_states.append(state.T)
        rows.append(torch.stack(heads, dim=1))
    return torch.stack(rows), torch.stack(last_states).unflatten(0, (batch, value_heads))
