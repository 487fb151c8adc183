"""Validation loss, perplexity and bits per byte, the same at any number of ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from minillm.data.loader import BatchLoader
from minillm.training.step import move_to_device
from minillm.utils import distributed
from minillm.utils.errors import UserError
from minillm.utils.logging import say


@torch.no_grad()
def validate(
    engine,
    loaders: dict[str, BatchLoader],
    token_bytes: torch.Tensor,
    max_bad_rows: int,
    step: int,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Token-mean loss over every validation sequence of every source.

    All ranks run the same number of forward passes (rows past the end are ignored targets), as ZeRO-3 needs.

    Args:
        loaders: by source name, over its sequences in order.
        token_bytes: [vocab] UTF-8 bytes a token stands for.
        max_bad_rows: unreadable sequences allowed, over all ranks.
        step: optimizer steps done, for the line in the log.
        progress: told each batch.

    Returns:
        val_loss, val_ppl, val_bpb; with several sources also val_loss/NAME.

    Raises:
        UserError: on every rank, more unreadable sequences than allowed.
    """
    start = time.perf_counter()
    engine.eval()
    totals = torch.zeros(4, dtype=torch.float64)
    result = {}
    for name, loader in loaders.items():
        sums = torch.zeros(4, dtype=torch.float64)  # loss in nats, target tokens, bytes of the targets, unreadable rows
        for number in range(loader.num_steps):
            progress(f"validation on {name}, batch {number + 1} of {loader.num_steps}")
            batch = loader.batch_at(number)
            sums[3] += batch.num_bad_rows
            for micro_batch in batch.micro_batches:
                sums[:3] += sums_of(engine, micro_batch, token_bytes)
        sums = torch.tensor(distributed.reduce_sum(sums.tolist()), dtype=torch.float64)
        totals += sums
        if len(loaders) > 1:
            result[f"val_loss/{name}"] = float(sums[0] / sums[1].clamp(min=1))
    engine.train()
    loss, tokens, num_bytes, bad_rows = totals.tolist()
    if bad_rows > max_bad_rows:
        raise UserError(
            f"validation: {bad_rows:.0f} sequences cannot be read, data.max_bad_samples = {max_bad_rows}; the warnings "
            f"name the shards. Write them again, or raise the limit"
        )
    mean = loss / max(1.0, tokens)
    bpb = loss / math.log(2) / max(1.0, num_bytes)
    sources = "".join(f", {name.removeprefix('val_loss/')} {value:.4f}" for name, value in result.items())
    seconds = time.perf_counter() - start
    say(
        f"validation at step {step}: loss {mean:.4f}, perplexity {perplexity(mean):.2f}, {bpb:.3f} bits per byte"
        f"{sources} ({seconds:.1f} s)"
    )
    return {"val_loss": mean, "val_ppl": perplexity(mean), "val_bpb": bpb, **result}


def sums_of(engine, micro_batch: dict[str, torch.Tensor], token_bytes: torch.Tensor) -> torch.Tensor:
    targets = micro_batch["shift_labels"]
    kept = targets[targets != -100]
    one = torch.ones((), dtype=torch.long, device=engine.device)  # the sum; a number would be compiled anew
    loss = engine(**move_to_device(micro_batch, engine.device), num_items_in_batch=one, return_logits=False).loss
    return torch.tensor([float(loss), kept.numel(), float(token_bytes[kept].sum())], dtype=torch.float64)


def perplexity(loss: float) -> float:
    """exp(loss), capped where a float overflows."""
    return math.exp(min(loss, 700.0))
