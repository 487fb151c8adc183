"""The loss against sums written out position by position, and its law: terms of micro-batches add up."""

from __future__ import annotations

import types

import pytest
import torch

from minillm.models.balancing import TERMS, Routing
from minillm.models.loss import (
    auxiliary_losses,
    count_targets,
    counted_tokens,
    next_token_targets,
    targets_ahead,
    token_loss,
)

NONE = -100


def test_labels_move_one_place():
    labels = torch.tensor([[3, 4, NONE, 6], [7, 8, 9, 10]])
    assert next_token_targets(labels).tolist() == [[4, NONE, 6, NONE], [8, 9, 10, NONE]]


@pytest.mark.parametrize("count", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_loss_is_the_sum_written_out(count, dtype):
    logits = torch.randn(2, 5, 11).to(dtype).requires_grad_()
    targets = torch.randint(0, 11, (2, 5))
    targets[0, 1:4] = NONE
    total, number = 0.0, 0
    for row in range(2):
        for t in range(5):
            if targets[row, t] != NONE:
                total -= logits[row, t].double().log_softmax(-1)[targets[row, t]]
                number += 1
    loss = token_loss(logits, targets, count)
    assert loss.dtype == torch.float32 and number == 7
    assert loss.item() == pytest.approx(total.item() / 7, rel=1e-5)


def test_no_targets_are_zero_and_never_nan():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = token_loss(logits, torch.full((2, 3), NONE))
    loss.backward()
    assert loss.item() == 0.0 and (logits.grad == 0).all()
    assert count_targets(torch.full((2, 3), NONE)).item() == 1


def written_out(targets, documents, depth):
    ahead = [[NONE] * len(row) for row in targets]
    for r, row in enumerate(targets):
        for t in range(len(row) - depth):
            if documents is None or len(set(documents[r][t : t + depth + 1])) == 1:
                ahead[r][t] = row[t + depth]
    return ahead


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_targets_ahead_stay_in_row_and_document(depth, packed):
    targets = [[1, 2, 3, NONE, 5, 6, NONE, 8], [NONE, NONE, NONE, 14, 15, 16, 17, NONE]]
    documents = [[0, 0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0, 0]] if packed else None
    ahead = targets_ahead(torch.tensor(targets), torch.tensor(documents) if packed else None, depth)
    assert ahead.tolist() == written_out(targets, documents, depth)


def test_the_last_of_a_prompt_learns_the_answer_ahead():
    """A prompt token predicts no prompt token, and at depth 1 yet the answer's first two after the token between."""
    targets = torch.tensor([[NONE, NONE, 5, 6, 7, NONE]])  # the answer is 5, 6, 7; position 2 is the prompt's last
    assert targets_ahead(targets, None, 1).tolist() == [[NONE, 5, 6, 7, NONE, NONE]]
    assert targets_ahead(targets, None, 2).tolist() == [[5, 6, 7, NONE, NONE, NONE]]


def test_a_document_whose_id_comes_again_is_another():
    targets = torch.tensor([[1, 2, 3, 4]])
    assert targets_ahead(targets, torch.tensor([[0, 1, 0, 0]]), 2).tolist() == [[NONE] * 4]


def test_counted_are_the_tokens_up_to_the_last_target():
    targets = torch.tensor([[NONE, 2, NONE, 4, NONE], [NONE] * 5, [1, 2, 3, 4, 5]])
    assert counted_tokens(targets).int().tolist() == [[1, 1, 1, 1, 0], [0] * 5, [1] * 5]


def routing(terms: dict[str, torch.Tensor]) -> Routing:
    nothing = torch.zeros(())
    return Routing(counts=torch.zeros(4), dropped=nothing, entropy=nothing, tokens=nothing, terms=terms)


def routings(rows: int) -> list[Routing]:
    generator = torch.Generator().manual_seed(rows)
    return [routing({name: torch.rand(rows, generator=generator) for name in TERMS}) for _ in range(3)]


@pytest.mark.parametrize("count", [None, 20])
def test_auxiliary_terms_are_of_each_layer_and_weighted_by_targets(count):
    config = types.SimpleNamespace(**{term.field: 0.0 for term in TERMS.values()})
    config.router_aux_loss_coef, config.router_z_loss_coef = 0.5, 3.0
    targets = torch.tensor([[1, NONE, 3], [NONE] * 3, [4, 5, 6]])
    made = routings(3)
    losses, total = auxiliary_losses(config, made, targets, count)
    expected = {
        name: torch.stack([(r.terms[name][0] * 2 + r.terms[name][2] * 3) / (count or 5) for r in made])
        for name in ("load_balancing", "router_z")
    }
    assert set(losses) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    torch.testing.assert_close(total, 0.5 * sum(expected["load_balancing"]) + 3.0 * sum(expected["router_z"]))

    parts = []
    for rows in ([0], [1, 2]):
        part = [routing({n: x[rows] for n, x in r.terms.items()}) for r in made]
        parts.append(auxiliary_losses(config, part, targets[rows], 5)[0]["router_z"])
    torch.testing.assert_close(sum(parts), auxiliary_losses(config, made, targets, 5)[0]["router_z"])


def test_without_routers_there_are_no_terms():
    losses, total = auxiliary_losses(types.SimpleNamespace(), None, torch.tensor([[1, 2]]))
    assert losses == {} and total.item() == 0.0
