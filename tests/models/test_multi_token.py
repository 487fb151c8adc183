"""Multi-token prediction against the paper's equations written out, one document at a time without its padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.models.test_latent_attention import DENSE
from tests.support.toy_presets import toy_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LATENT, GROUPED = ("deepseek-v3-mini", DENSE), ("llama3-mini", {})
EXPERTS = ("deepseek-v3-mini", {})
LENGTHS = (7, 1, 4, 2, 6)  # of the documents packed into each row


def make(preset=LATENT, depth: int = 2, **changes):
    name, fields = preset
    modules = {"num_nextn_predict_layers": depth, "mtp_loss_coef": 0.7 if depth else 0.3}
    model = toy_model(name, **{**fields, **modules, **changes})
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def batch() -> dict[str, torch.Tensor]:
    """Two rows of packed documents, of which some prompts have no target."""
    length = sum(LENGTHS)
    ids = torch.randint(1, 101, (2, length), generator=torch.Generator().manual_seed(2))
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)]).expand(2, length)
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    targets = targets.masked_fill(F.pad(documents[:, 1:] != documents[:, :-1], (0, 1)), -100)
    targets[1, :4] = -100
    return {
        "input_ids": ids,
        "shift_labels": targets,
        "document_ids": documents,
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS]).expand(2, length),
    }


def normed(x: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight


def written_out(model, inputs: dict[str, torch.Tensor], count: int) -> list[torch.Tensor]:
    """The loss of each depth, 0 included: equations 21 to 24, on positions 1 to T - k of each document alone."""
    totals = [torch.zeros(()) for _ in range(model.config.num_nextn_predict_layers + 1)]
    for row in range(2):
        for document in range(len(LENGTHS)):
            here = inputs["document_ids"][row] == document
            ids, targets = inputs["input_ids"][row, here][None], inputs["shift_labels"][row, here]
            state = model.model(ids).last_hidden_state
            totals[0] = totals[0] + F.cross_entropy(model.lm_head(state)[0], targets, reduction="sum")
            for k, module in enumerate(model.model.multi_token_modules, 1):
                length = ids.shape[1] - k
                if length < 1:
                    break
                embedded = model.model.embed_tokens.weight[ids[:, k:]]
                joined = torch.cat([normed(embedded, module.enorm), normed(state[:, :length], module.hnorm)], dim=-1)
                rotation = model.model.positions(embedded, torch.arange(length)[None])[1]
                hidden = joined @ module.eh_proj.weight.T
                state = normed(module.layer(hidden, rotation, {"full_attention": None})[0], module.norm)
                logits = state @ model.lm_head.weight.T
                totals[k] = totals[k] + F.cross_entropy(logits[0], targets[k:], reduction="sum")
    return [total / count for total in totals]


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("preset", [LATENT, GROUPED, EXPERTS], ids=["latent", "grouped", "experts"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("count", [None, 50])
def test_loss_and_gradients_equal_the_equations(preset, depth, count):
    model, inputs = make(preset, depth, router_sequence_loss_coef=0.0), batch()
    targets = int((inputs["shift_labels"] >= 0).sum())
    output = model(**inputs, num_items_in_batch=count)
    # Equation 24 divides every depth by the T of the next-token loss, not by the fewer tokens the depth predicts.
    expected = written_out(model, inputs, count or targets)
    assert list(output.losses) == ["cross_entropy", *(f"multi_token_{k + 1}" for k in range(depth))]
    for actual, wanted in zip(output.losses.values(), expected):
        torch.testing.assert_close(actual, wanted, **CLOSE)
    total = expected[0] + 0.7 * sum(expected[1:]) / depth  # equation 25
    torch.testing.assert_close(output.loss, total, **CLOSE)
    wanted = gradients(model, total)
    for name, gradient in gradients(model, output.loss).items():
        torch.testing.assert_close(gradient, wanted[name], msg=name, **CLOSE)


@pytest.mark.parametrize("tied", [True, False])
def test_the_term_alone_teaches_embedding_head_and_trunk(tied):
    model, inputs = make(depth=1, tie_word_embeddings=tied), batch()
    found = gradients(model, model(**inputs).losses["multi_token_1"])
    for name, gradient in found.items():
        # What only the decoder's own prediction reads does not exist: its head is this one, its last norm feeds it.
        assert gradient.abs().max() > 0, name


def test_a_module_sees_its_next_token_and_none_later():
    """The state at t depends on tokens up to t + k, and on token t + k."""
    model = make().eval()
    ids = torch.randint(1, 101, (1, 10), generator=torch.Generator().manual_seed(3))
    counted = torch.ones(1, 10, dtype=torch.bool)
    before = model.model(ids, counted=counted).multi_token_states
    for k, states in enumerate(before, 1):
        changed = ids.clone()
        changed[0, 6] = 100 - changed[0, 6]
        after = model.model(changed, counted=counted).multi_token_states[k - 1]
        moved = (after - states)[0].abs().amax(-1)
        assert moved[: 6 - k].max() < 1e-6
        assert moved[6 - k] > 1e-3


def test_evaluation_runs_no_module():
    model, inputs = make(), batch()
    calls = []
    for module in model.model.multi_token_modules:
        module.register_forward_hook(lambda *_: calls.append(1))
    assert list(model.eval()(**inputs).losses) == ["cross_entropy"]
    model.generate(inputs["input_ids"][:, :5], max_new_tokens=3, do_sample=False)
    model.train()(inputs["input_ids"])
    assert not calls
    model(**inputs)
    assert len(calls) == 2


def test_the_decoder_computes_the_same_with_and_without_modules():
    with_modules, without = make(), make(depth=0)
    without.load_state_dict({n: w for n, w in with_modules.state_dict().items() if n in without.state_dict()})
    inputs = batch()
    torch.testing.assert_close(with_modules.eval()(**inputs).logits, without.eval()(**inputs).logits, rtol=0, atol=0)
    ours = with_modules.train()(**inputs).losses["cross_entropy"]
    torch.testing.assert_close(ours, without.train()(**inputs).loss, rtol=0, atol=0)


@pytest.mark.parametrize("preset", [LATENT, EXPERTS], ids=["dense", "experts"])
def test_micro_batches_add_up_to_the_whole(preset):
    model, inputs = make(preset), batch()
    count = int((inputs["shift_labels"] >= 0).sum())
    whole = model(**inputs, num_items_in_batch=count)
    expected = gradients(model, whole.loss)
    parts = [model(**{n: x[i : i + 1] for n, x in inputs.items()}, num_items_in_batch=count) for i in range(2)]
    for name, value in whole.losses.items():
        torch.testing.assert_close(sum(part.losses[name] for part in parts), value, **CLOSE)
    for name, gradient in gradients(model, sum(part.loss for part in parts)).items():
        torch.testing.assert_close(gradient, expected[name], msg=name, **CLOSE)


@pytest.mark.parametrize("count", [None, 50])
def test_a_batch_without_targets_has_zero_loss_and_gradients(count):
    model, inputs = make(), batch()
    inputs["shift_labels"] = torch.full_like(inputs["shift_labels"], -100)
    loss = model(**inputs, num_items_in_batch=count).loss
    assert loss.item() == 0.0
    assert all((g == 0).all() for g in gradients(model, loss).values())


def test_experts_are_balanced_over_tokens_whose_next_token_is_there():
    model, inputs = make(EXPERTS, depth=2), batch()
    counts = model(**inputs).routing["counts"]
    chosen = model.config.num_experts_per_tok
    sparse = model.config.mlp_layer_types.count("sparse")
    tokens = [int((inputs["shift_labels"][row] >= 0).nonzero().max()) + 1 for row in range(2)]
    assert counts.shape == (sparse + 2, model.config.num_experts)
    expected = [sum(tokens)] * sparse + [sum(tokens) - 2, sum(tokens) - 4]
    assert counts.sum(-1).tolist() == [chosen * tokens for tokens in expected]


def test_modules_keep_nothing_in_a_cache():
    model, inputs = make(), batch()
    del inputs["document_ids"], inputs["position_ids"]
    cache = model(**inputs, use_cache=True).cache
    assert len(cache.layers) == model.config.num_hidden_layers
    assert cache.get_seq_length() == sum(LENGTHS)


def test_activation_checkpointing_changes_no_gradient():
    model, inputs = make(), batch()
    expected = gradients(model, model(**inputs).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, gradient in gradients(model, model(**inputs).loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0, msg=name)


def test_compiles_without_graph_breaks():
    model, inputs = make(num_hidden_layers=1, depth=1), batch()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss, **CLOSE)
