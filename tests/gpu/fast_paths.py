"""Every fast path of a GPU against plain fp32 mathematics on the CPU: outputs and gradients, a line each.

    python -m tests.gpu.fast_paths [FAMILY ...]     (all of them where none is named)

The largest error is relative to the largest entry; presets are compared by loss and by the direction of the gradient.
Without a GPU the same runs on the CPU, by the paths it has there.
"""

from __future__ import annotations

import itertools
import json
import sys

import torch
import torch.nn.functional as F

from minillm.models import MiniLLMConfig, MiniLLMForCausalLM, attention, delta_rule, experts
from minillm.settings.presets import PRESETS, preset

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
TOLERANCE = 0.04  # some roundings of bf16, each 2^-8
ATTENTION = [  # heads, key heads, width, window, width of the values
    (64, 32, 16, None, 16), (16, 8, 64, None, 64), (12, 4, 64, 37, 64), (12, 12, 96, None, 64), (4, 2, 8, None, 8),
    (8, 4, 96, None, 96),
]  # fmt: skip
EXPERTS = [  # kind, experts, chosen, hidden, intermediate, idle experts
    ("silu", 8, 4, 1024, 4096, 0), ("swiglu", 8, 2, 768, 1024, 3), ("swiglu", 4, 1, 96, 40, 1),
    ("silu", 1, 1, 64, 64, 0),
]  # fmt: skip


def far(ours: torch.Tensor, exact: torch.Tensor) -> float:
    ours, exact = ours.detach().float().cpu(), exact.detach().float().cpu()
    return float((ours - exact).abs().max() / exact.abs().max().clamp(min=1e-9))


def leaf(x: torch.Tensor | None, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
    return None if x is None else x.detach().to(device, dtype, copy=True).requires_grad_()


def check_attention(heads, shared, width, window, value_width) -> float:
    length = 200
    documents = (torch.rand(3, length) < 0.02).long().cumsum(1)
    shapes = [(3, heads, length, width), (3, shared, length, width), (3, shared, length, value_width)]
    low = [torch.randn(shape).bfloat16() for shape in shapes]
    ours = [leaf(x, DEVICE, torch.bfloat16) for x in low]
    exact = [leaf(x, CPU, torch.float32) for x in low]
    borders = attention.document_borders_of(documents)
    padded = torch.cat((borders, borders[-1:].expand(5)))  # documents of no tokens, as a loader's
    out = attention.attend(*ours, attention.PackedDocuments(padded.to(DEVICE), window))
    reference = attention.attend(*exact, attention.PackedDocuments(borders, window).dense(3, length, CPU))
    gradient = torch.randn_like(reference).bfloat16()
    out.backward(gradient.to(DEVICE))
    reference.backward(gradient.float())
    return max(far(out, reference), *(far(x.grad, y.grad) for x, y in zip(ours, exact)))


def check_experts(kind, count, chosen, hidden, size, idle, compiled) -> float:
    tokens, biased = 200, kind != "swiglu"
    indices = torch.stack([torch.randperm(count - idle)[:chosen] for _ in range(tokens)])
    weights, x = torch.rand(tokens, chosen), torch.randn(tokens, hidden).bfloat16()
    up = (torch.randn(count, size * (1 if biased else 2), hidden) / hidden**0.5).bfloat16()
    down = (torch.randn(count, hidden, size) / size**0.5).bfloat16()
    up_bias = torch.randn(count, size).bfloat16() if biased else None
    down_bias = torch.randn(count, hidden).bfloat16() if biased else None
    results = []
    for device, dtype in ((DEVICE, torch.bfloat16), (CPU, torch.float32)):
        leaves = [leaf(t, device, dtype) for t in (x, up, up_bias, down, down_bias)]
        own = leaf(weights, device, torch.float32)
        call = torch.compile(experts._apply_experts) if compiled and device == DEVICE else experts._apply_experts
        y = call(leaves[0], own, indices.to(device), *leaves[1:], kind)
        y.float().square().sum().backward()
        results.append([y, own.grad, *(t.grad for t in leaves if t is not None)])
    return max(far(ours, exact) for ours, exact in zip(*results))


def check_preset(name) -> float:
    small = {"num_hidden_layers": 4 if "next" in name else 2, "vocab_size": 512, "router_noise": "none"}
    fields = preset(name, **small, embedding_dropout=0.0, hidden_dropout=0.0, attention_dropout=0.0)
    exact = MiniLLMForCausalLM(MiniLLMConfig(**fields)).train(fields["router_type"] != "noisy_topk").bfloat16()
    low = MiniLLMForCausalLM(MiniLLMConfig(**fields)).train(exact.training).bfloat16()
    low.load_state_dict(exact.state_dict())
    low, exact = low.to(DEVICE), exact.float()
    ids = torch.randint(0, 512, (2, min(128, fields["max_position_embeddings"])))
    documents = (torch.rand(ids.shape) < 0.03).long().cumsum(1)
    losses, gradients = [], []
    for model, device in ((low, DEVICE), (exact, CPU)):
        given = ids.to(device)
        loss = model(given, shift_labels=given, document_ids=documents.to(device)).loss
        loss.backward()
        losses.append(float(loss.detach()))
        parts = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
    return max(abs(losses[0] - losses[1]) / losses[1], 1 - float(F.cosine_similarity(*gradients, dim=0)))


def check_flash_linear_attention(documents: bool) -> float:
    q, k = torch.randn(2, 2, 130, 2, 64, device=DEVICE).bfloat16()
    v = torch.randn(2, 130, 4, 64, device=DEVICE).bfloat16()
    g, beta = -torch.rand(2, 130, 4, device=DEVICE), torch.rand(2, 130, 4, device=DEVICE)
    inputs = [x.requires_grad_() for x in (q, k, v, g, beta)]
    numbers = borders = None
    if documents:
        numbers = (torch.rand(2, 130, device=DEVICE) < 0.05).long().cumsum(1)
        borders = attention.document_borders_of(numbers).long()
        borders = torch.cat((borders, borders[-1:].expand(3)))
    ours, _ = delta_rule.chunked_gated_delta_rule(*inputs, segments=numbers, borders=borders)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    exact, _ = delta_rule.chunked_gated_delta_rule(*wide, segments=numbers)
    gradient = torch.randn_like(exact)
    ours.backward(gradient.to(ours.dtype))
    exact.backward(gradient)
    return max(far(ours, exact), *(far(x.grad, y.grad) for x, y in zip(inputs, wide)))


def attention_cases():
    kernel = "variable-length attention" if attention.packs(DEVICE) else "masked attention"
    for case in ATTENTION:
        heads, shared, width, window, value_width = case
        name = f"{kernel}: {heads}/{shared} heads of {width}, window {window}, values {value_width}"
        yield name, check_attention, case
    if delta_rule.flash_chunks is not None and DEVICE.type == "cuda":
        for documents in (False, True):
            name = f"flash-linear-attention{' with documents' if documents else ''}"
            yield name, check_flash_linear_attention, (documents,)


def expert_cases(compiled: bool):
    for case in EXPERTS:
        kind, count, chosen, hidden, size, idle = case
        how = "compiled" if compiled else "eager"
        name = f"experts, {how}: {kind}, {chosen} of {count} ({idle} idle), {hidden} x {size}"
        yield name, check_experts, (*case, compiled)


def preset_cases():
    for name in PRESETS:
        yield f"preset {name}: loss and gradient's direction in bf16", check_preset, (name,)


# A device-side assertion ruins the process it happens in: each may have its own.
FAMILIES = {
    "attention": attention_cases,
    "experts": lambda: expert_cases(False),
    "compiled-experts": lambda: expert_cases(True),
    "presets": preset_cases,
}


def main(families: list[str]) -> int:
    wrong = []
    count = 0
    for name, check, arguments in itertools.chain(*(FAMILIES[family]() for family in families or FAMILIES)):
        torch.manual_seed(0)
        count += 1
        try:
            error = check(*arguments)
            good, what = error < TOLERANCE, f"{error:.4f}"
        except Exception as problem:  # the other lines stand
            good, what = False, f"{type(problem).__name__}: {str(problem).splitlines()[0][:160]}"
        print(f"{'ok ' if good else 'BAD'} {what:>7} {name}", flush=True)
        if not good:
            wrong.append(name)
    print("RESULT " + json.dumps({"cases": count, "wrong": wrong}), flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
