"""How evenly the experts are used: the biases that balance them, the record of a step, the watch over idle ones.

Contract: everything is a function of StepResult.routing, the sums of the global batch, so that any split into ranks and
micro-batches moves the biases, reports and warns alike; every rank computes the same.

Shapes: E experts, L sparse layers in order, multi-token modules last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import nn

from minillm.models import MiniLLMConfig
from minillm.models.balancing import TERMS
from minillm.models.moe import SparseMoE

Routing = dict[str, torch.Tensor]  # StepResult.routing
Layer = int | str  # a decoder layer's index, or mtp1, mtp2, ... for a multi-token module

STATISTICS = ("counts", "dropped", "entropy", "tokens")
NAMED_LAYERS = 8  # what one warning lists
# What moves tokens to idle experts; router_z keeps logits small and balances nothing.
BALANCING_FIELDS = (*(term.field for name, term in TERMS.items() if name != "router_z"), "router_bias_update_speed")


def update_router_biases(model: nn.Module, counts: torch.Tensor) -> None:
    """Balancing without a loss (DeepSeek-V3, arXiv:2412.19437, section 2.1.2), for every router that has biases.

    Args:
        counts: [L, E], tokens of the global batch that chose each expert; once an optimizer step.
    """
    routers = [module.gate for module in model.modules() if isinstance(module, SparseMoE)]
    for router, of_router in zip(routers, counts, strict=True):
        if hasattr(router, "update_bias"):
            router.update_bias(of_router)


def sparse_layers(config: MiniLLMConfig) -> list[Layer]:
    """What the L rows are called."""
    decoder = [i for i in range(config.num_hidden_layers) if config.is_sparse(i)]
    ahead = range(config.num_nextn_predict_layers) if config.is_sparse(config.num_hidden_layers) else ()
    return [*decoder, *(f"mtp{i + 1}" for i in ahead)]


def experts_record(routing: Routing, layers: Sequence[Layer]) -> dict[str, list]:
    """A line of experts.jsonl, one entry a layer; six significant digits.

    Returns:
        layers: their names.
        share: each expert's part of the layer's routes; adds up to 1.
        max_over_mean, max_over_min: of the shares; the latter null where an expert got nothing.
        dropped: part of the routes that the capacity dropped.
        entropy: mean over tokens of that of the routing probabilities, in nats.
        Every balancing term under its name. A layer without a token has shares 0, dropped 0 and null for the rest.
    """
    counts, tokens = routing["counts"], routing["tokens"]
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    record = {
        "share": share,
        "max_over_mean": share.amax(-1) / share.mean(-1),
        "max_over_min": share.amax(-1) / share.amin(-1),
        "dropped": routing["dropped"] / counts.sum(-1).clamp(min=1),
        "entropy": routing["entropy"] / tokens,
        **{name: values for name, values in routing.items() if name not in STATISTICS},
    }
    return {"layers": list(layers), **{name: _rounded(values.tolist()) for name, values in record.items()}}


def _rounded(value: float | list) -> float | list | None:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if math.isfinite(value) else None


def summary(record: dict[str, list]) -> dict[str, float]:
    """The step's three numbers of metrics.jsonl: the worst layer's load, and the mean layer's drops and entropy."""

    def known(name: str) -> list[float]:
        return [value for value in record[name] if value is not None]

    if not known("max_over_mean"):  # a batch without a token
        return {}
    return {
        "moe/max_over_mean": max(known("max_over_mean")),
        "moe/dropped": _rounded(sum(known("dropped")) / len(known("dropped"))),
        "moe/entropy": _rounded(sum(known("entropy")) / len(known("entropy"))),
    }


def scalars(record: dict[str, list]) -> dict[str, float]:
    """A record's numbers for trackers, under names such as experts/layer_03/entropy and experts/mtp1/share_05."""
    found = {}
    for row, layer in enumerate(record["layers"]):
        place = f"experts/layer_{layer:02d}" if isinstance(layer, int) else f"experts/{layer}"
        for name, values in record.items():
            if name == "share":
                found |= {f"{place}/share_{expert:02d}": value for expert, value in enumerate(values[row])}
            elif name != "layers" and values[row] is not None:
                found[f"{place}/{name}"] = values[row]
    return found


def balance_experts(
    model: nn.Module, counts: torch.Tensor, idle: list[list[int]] | None, every: int
) -> tuple[list[list[int]], str | None]:
    """After a step: move the routers' biases, and count the steps that experts have been idle.

    Args:
        counts: routed tokens of the step, [sparse layers, E].
        idle: count_idle_steps before this step.
        every: see idle_warning.

    Returns:
        count_idle_steps after it, and a warning where one is due.
    """
    update_router_biases(model, counts)
    after = count_idle_steps(idle, counts)
    return after, idle_warning(idle, after, every, sparse_layers(model.config), model.config)


def count_idle_steps(idle: list[list[int]] | None, counts: torch.Tensor) -> list[list[int]]:
    """Steps since each expert last got a token, [L][E], one step on; a layer that had no token at all stands still."""
    before = torch.tensor(idle) if idle is not None else torch.zeros(counts.shape, dtype=torch.long)
    after = torch.where(counts > 0, 0, before + 1)
    return torch.where(counts.sum(-1, keepdim=True) > 0, after, before).tolist()


def idle_warning(
    before: list[list[int]] | None, after: list[list[int]], every: int, layers: Sequence[Layer], config: MiniLLMConfig
) -> str | None:
    """What to say of experts that have just been idle for `every` steps, or a multiple of that; None where none has.

    Args:
        before, after: count_idle_steps around this step.
        every: 0: never.
    """
    if not every:
        return None
    idle: dict[int, list[str]] = {}  # steps -> "layer 3 expert 5", ...
    for row, layer in enumerate(layers):
        reached = [
            (steps, expert)
            for expert, steps in enumerate(after[row])
            if steps and steps % every == 0 and (before is None or steps != before[row][expert])
        ]
        for steps, group in groupby(sorted(reached), key=lambda item: item[0]):
            experts = [expert for _, expert in group]
            place = f"layer {layer}" if isinstance(layer, int) else layer
            idle.setdefault(steps, []).append(f"{place} expert{'s' * (len(experts) > 1)} {_listed(experts)}")
    if not idle:
        return None
    found = "; ".join(f"no token for {steps} steps: {_first(places)}" for steps, places in sorted(idle.items()))
    return f"{found}; {_advice(config)}"


def _listed(numbers: list[int]) -> str:
    """Ascending numbers in words: `0 and 2`, `1, 4 to 7 and 9`."""
    runs = [
        [number for _, number in group] for _, group in groupby(enumerate(numbers), key=lambda item: item[1] - item[0])
    ]
    parts = [part for r in runs for part in ([f"{r[0]} to {r[-1]}"] if len(r) > 2 else map(str, r))]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _first(places: list[str]) -> str:
    more = len(places) - NAMED_LAYERS
    return ", ".join(places[:NAMED_LAYERS]) + (f", and {more} more layers (see experts.jsonl)" if more > 0 else "")


def _advice(config: MiniLLMConfig) -> str:
    """The balancing that the model uses; what defines a model may not change within a run, the learning rate may."""
    used = [f"model.{field} (now {value:g})" for field in BALANCING_FIELDS if (value := getattr(config, field))]
    raised = f"raise {' or '.join(used)}" if used else "set model.router_aux_loss_coef (now 0)"
    return f"{raised} in a new run, or lower optim.learning_rate in this one"
