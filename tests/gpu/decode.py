"""Decoding speed of dense-171m's shape on one GPU, batch 1, greedy, against the limit that reading its weights sets.

    python -m tests.gpu.decode [--tiny]

Ways: a growing cache with this project's `generate` (eager); the same with cuDNN's attention allowed, as transformers'
own does; and a cache of fixed size with the step compiled (CUDA graphs).
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from transformers import GenerationMixin

from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.settings.presets import preset

PROMPT, NEW = 64, 128


def rate(call, tokens: int, repeats: int = 2) -> float:
    """Tokens/s of the best of `repeats`."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return tokens / best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = preset("dense-171m", **({"num_hidden_layers": 2, "vocab_size": 512} if tiny else {}))
    torch.manual_seed(0)
    model = MiniLLMForCausalLM(MiniLLMConfig(**fields)).to(device, torch.bfloat16).eval()
    new = 16 if tiny else NEW
    prompt = torch.randint(0, fields["vocab_size"], (1, PROMPT), device=device)
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
               "attention_mask": torch.ones_like(prompt)}  # fmt: skip
    found: dict[str, object] = {"weight_bytes": sum(p.nbytes for p in model.parameters())}
    model.generate(prompt, **{**options, "max_new_tokens": 4})
    found["tokens_per_s"] = round(rate(lambda: model.generate(prompt, **options), new), 1)
    short = {**options, "max_new_tokens": min(new, 48)}
    found["with_cudnn_tokens_per_s"] = round(
        rate(lambda: GenerationMixin.generate(model, prompt, **short), short["max_new_tokens"], 1), 1
    )
    static = {**options, "cache_implementation": "static"}
    try:
        start = time.perf_counter()
        for _ in range(2):
            model.generate(prompt, **static)
        found["static_warm_up_s"] = round(time.perf_counter() - start, 1)
        found["static_tokens_per_s"] = round(rate(lambda: model.generate(prompt, **static), new), 1)
    except Exception as problem:  # the other rows stand
        found["static_error"] = f"{type(problem).__name__}: {str(problem)[:200]}"
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
