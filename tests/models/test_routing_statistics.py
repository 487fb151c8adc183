"""What a forward pass reports of its routers, against loops over the tokens; and its law: reports of parts add up."""

from __future__ import annotations

import math

import pytest
import torch

from minillm.models.balancing import summarise
from minillm.models.moe import SparseMoE
from minillm.models.routers import Choice
from tests.support.toy_presets import toy_model

# every router, with dense layers and a multi-token module among them -> the term each has by itself
PRESETS = {
    "mixtral-mini": "load_balancing",
    "moe-876m": "importance",
    "deepseek-v3-mini": "sequence_balancing",
    "residual-moe-mini": "load_balancing",
}
STATISTICS = {"counts", "dropped", "entropy", "tokens"}
BATCH, TIME = 8, 24


def batch() -> dict[str, torch.Tensor]:
    """Rows of different lengths, one of them without a target."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 101, (BATCH, TIME), generator=generator)
    targets = torch.randint(0, 101, (BATCH, TIME), generator=generator)
    for row, length in enumerate([24, 20, 3, 0, 24, 11, 1, 17]):
        targets[row, length:] = -100
    targets[0, :6] = -100  # a prompt: its tokens count, they come before the last target
    return {"input_ids": ids, "shift_labels": targets}


def blocks(model) -> list[SparseMoE]:
    return [module for module in model.modules() if isinstance(module, SparseMoE)]


def forward(model, **inputs) -> tuple[object, list[Choice]]:
    """The output, and what each router answered, in order."""
    choices: list[Choice] = []
    hooks = [b.gate.register_forward_hook(lambda module, arguments, choice: choices.append(choice))
             for b in blocks(model)]  # fmt: skip
    output = model(**inputs)
    for hook in hooks:
        hook.remove()
    return output, choices


def counted_by_hand(targets: torch.Tensor, ahead: int) -> list[int]:
    """Places in the flattened batch of the tokens that count: up to the row's last target, `ahead` fewer at its end."""
    places = []
    for row in range(targets.shape[0]):
        last = max((t for t in range(targets.shape[1]) if targets[row, t] >= 0), default=-1)
        places += [row * targets.shape[1] + t for t in range(last + 1 - ahead)]
    return places


@pytest.mark.parametrize("preset", PRESETS)
def test_statistics_equal_a_loop_over_the_tokens(preset):
    model, inputs = toy_model(preset, router_z_loss_coef=0.01), batch()
    output, choices = forward(model, **inputs)
    routing = output.routing
    assert len(choices) == len(blocks(model)) == len(routing["counts"])
    for layer, choice in enumerate(choices):
        ahead = max(0, layer - model.config.mlp_layer_types.count("sparse") + 1)
        counts, entropy, tokens = [0] * model.config.num_experts, 0.0, counted_by_hand(inputs["shift_labels"], ahead)
        for token in tokens:
            for expert in choice.indices[token].tolist():
                counts[expert] += 1
            entropy -= sum(p * math.log(p) for p in choice.probabilities[token].tolist() if p)
        assert routing["counts"][layer].tolist() == counts
        assert routing["tokens"][layer].item() == len(tokens)
        assert sum(counts) == len(tokens) * model.config.num_experts_per_tok
        assert routing["entropy"][layer].item() == pytest.approx(entropy, rel=1e-5)
        assert routing["dropped"][layer].item() == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_terms_by_layer_add_up_to_the_losses(preset):
    model = toy_model(preset, router_z_loss_coef=0.01)
    output = model(**batch())
    terms = output.routing.keys() - STATISTICS
    assert terms == {PRESETS[preset], "router_z"} == output.losses.keys() - {"cross_entropy", "multi_token_1"}
    for name in terms:
        assert output.routing[name].shape == (len(blocks(model)),)
        assert output.routing[name].sum().item() == pytest.approx(output.losses[name].item(), rel=1e-6)
    assert not any(value.requires_grad for value in output.routing.values())


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "moe-876m"])  # its noise differs between forwards
def test_one_by_eight_and_two_by_four_report_the_same(preset):
    model, inputs = toy_model(preset, router_z_loss_coef=0.01, router_noise="none"), batch()
    items = (inputs["shift_labels"] >= 0).sum()

    def report(size: int) -> dict[str, torch.Tensor]:
        parts = [{n: x[i : i + size] for n, x in inputs.items()} for i in range(0, BATCH, size)]
        found = [model(**part, num_items_in_batch=items).routing for part in parts]
        return {name: sum(routing[name].double() for routing in found) for name in found[0]}

    eight, two = report(1), report(4)
    assert eight.keys() == two.keys() > STATISTICS
    for name, value in eight.items():
        exact = name in ("counts", "tokens", "dropped")
        torch.testing.assert_close(value, two[name], rtol=0 if exact else 1e-5, atol=0)
    assert (two["counts"].sum(-1) == two["tokens"] * model.config.num_experts_per_tok).all()


def choice_of(probabilities: list[list[float]], indices: list[list[int]], kept=None) -> Choice:
    p = torch.tensor(probabilities)
    indices = torch.tensor(indices)
    kept = None if kept is None else torch.tensor(kept)
    return Choice(p.clamp(min=1e-9).log(), p, torch.ones(indices.shape), indices, kept)


def test_dropped_routes_are_counted_as_chosen_and_as_dropped():
    p = [[0.4, 0.3, 0.2, 0.1]] * 4
    indices, kept = [[0, 1], [0, 2], [0, 1], [0, 3]], [[True, True], [False, True], [False, False], [False, False]]
    counted = torch.tensor([[True, True], [True, False]])  # the last token does not count, nor what it lost
    routing = summarise(choice_of(p, indices, kept), counted, [])
    assert routing.counts.tolist() == [3, 2, 1, 0]
    assert routing.dropped.item() == 3
    assert routing.tokens.item() == 3


def test_entropy_of_known_distributions():
    p = [[0.25] * 4, [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]]
    choice = choice_of(p, [[0], [1], [0], [0]])
    routing = summarise(choice, torch.tensor([[True, True, True, False]]), [])
    assert routing.entropy.item() == pytest.approx(math.log(4) + math.log(2), rel=1e-6)  # and 0 of the certain one


@pytest.mark.parametrize("preset", ["mixtral-mini", "gpt2-124m"])
def test_only_training_with_experts_reports(preset):
    model, inputs = toy_model(preset), batch()
    assert (model(**inputs).routing is not None) == (preset == "mixtral-mini")
    assert model(inputs["input_ids"]).routing is None
    assert model.eval()(**inputs).routing is None
