"""The model as a PreTrainedModel: folders, Auto classes, loss, activation checkpointing, compilation, config rules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from minillm.models import MiniLLMConfig, MiniLLMForCausalLM, MiniLLMModel
from minillm.models.feed_forward import build_mlp
from minillm.models.mixers import build_mixer
from minillm.models.normalization import build_norm
from minillm.models.positions import build_positions

SMALL = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
IDS = torch.arange(2 * 16).view(2, 16) * 7 % 67


def make(**changes) -> MiniLLMForCausalLM:
    torch.manual_seed(0)
    return MiniLLMForCausalLM(MiniLLMConfig(**{**SMALL, **changes}))


def gradients(model: MiniLLMForCausalLM, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS, **inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_folder_round_trip(tmp_path, tied):
    model = make(tie_word_embeddings=tied).eval()
    model.save_pretrained(tmp_path)
    for loaded in (MiniLLMForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is MiniLLMForCausalLM
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    assert isinstance(AutoModel.from_config(model.config), MiniLLMModel)


def test_names_of_parameters():
    layer = ["input_layernorm", "mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.o_proj"]
    layer += ["post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    expected = {f"model.layers.{i}.{part}.weight" for i in range(2) for part in layer}
    expected |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(make(tie_word_embeddings=False).state_dict()) == expected


def test_initialisation():
    model = make(hidden_size=256, initializer_range=0.02, tie_word_embeddings=False)
    assert model.model.layers[0].mixer.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model.model.norm.weight, torch.ones(256))
    loss = model(IDS, labels=IDS).loss.item()
    assert loss == pytest.approx(math.log(67), rel=0.05)  # what a model that knows nothing pays


def test_loss_is_the_token_sum_over_the_given_count():
    model = make()
    targets = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], dim=1)
    targets[0, 3:9] = -100
    logits = model.eval()(IDS).logits.double()
    per_token = -logits.log_softmax(-1)[targets >= 0].gather(-1, targets[targets >= 0][:, None])
    total, count = per_token.sum().item(), per_token.numel()
    model.train()
    assert count == 24
    assert model(IDS, shift_labels=targets).loss.item() == pytest.approx(total / count, rel=1e-5)
    assert model(IDS, shift_labels=targets, num_items_in_batch=100).loss.item() == pytest.approx(total / 100, rel=1e-5)
    as_tensor = model(IDS, shift_labels=targets, num_items_in_batch=torch.tensor(100)).loss
    assert as_tensor.shape == () and as_tensor.item() == pytest.approx(total / 100, rel=1e-5)
    labels = IDS.clone()
    labels[0, 4:10] = -100  # labels[t + 1] is the target of t
    assert model(IDS, labels=labels).loss.item() == pytest.approx(total / count, rel=1e-5)
    with pytest.raises(ValueError, match="not both"):
        model(IDS, labels=IDS, shift_labels=IDS)


@pytest.mark.parametrize("count", [None, 0, 128])
def test_a_batch_without_targets_has_zero_loss_and_gradients(count):
    nothing = torch.full_like(IDS, -100)
    if count == 0:  # a global batch without targets: the trainer divides by at least one
        count = 1
    model = make()
    assert model(IDS, shift_labels=nothing, num_items_in_batch=count).loss.item() == 0.0
    assert all((g == 0).all() for g in gradients(model, shift_labels=nothing, num_items_in_batch=count).values())


def test_logits_are_kept_where_they_are_wanted():
    model = make().train()
    full = model(IDS).logits
    assert model(IDS, labels=IDS).logits is None
    assert torch.equal(model(IDS, labels=IDS, return_logits=True).logits, full)
    assert model.eval()(IDS, labels=IDS).logits.shape == (2, 16, 67)
    torch.testing.assert_close(model(IDS, logits_to_keep=3).logits, full[:, -3:])
    torch.testing.assert_close(model(IDS, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]])
    assert model(IDS, labels=IDS, return_dict=False)[1].shape == (2, 16, 67)


def test_activation_checkpointing_changes_no_gradient():
    model = make().train()
    expected = gradients(model, labels=IDS)
    calls = []
    hook = model.model.layers[1].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    actual = gradients(model, labels=IDS)
    hook.remove()
    assert len(calls) == 2  # once forward, once again in backward
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


COMPILED = [
    ("float32", "aot_eager"),
    ("bfloat16", "aot_eager"),
    pytest.param("bfloat16", "inductor", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("dtype, backend", COMPILED)
def test_compiled_equals_eager(dtype, backend):
    inputs = {
        "shift_labels": IDS,
        "document_ids": (torch.arange(16) // 5).expand(2, 16),
        "position_ids": (torch.arange(16) % 5).expand(2, 16),
    }
    exact = make(num_hidden_layers=1).train()
    expected = gradients(exact, **inputs)
    model = make(num_hidden_layers=1).to(getattr(torch, dtype)).train()
    loss = torch.compile(model, fullgraph=True, backend=backend)(IDS, **inputs).loss
    loss.backward()
    narrow = dtype == "bfloat16"
    assert loss.item() == pytest.approx(exact(IDS, **inputs).loss.item(), rel=2e-2 if narrow else 1e-5)
    for name, p in model.named_parameters():
        if narrow:
            assert F.cosine_similarity(p.grad.flatten().float(), expected[name].flatten(), dim=0) > 0.99, name
        else:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_rotary_angles_survive_a_cast_of_the_model():
    """DeepSpeed casts whole modules to bf16; position 1000 must still turn by its own angle."""
    positions = build_positions(MiniLLMConfig(**SMALL)).to(torch.bfloat16)
    _, rotation = positions(torch.zeros(1, 1, 32, dtype=torch.bfloat16), torch.tensor([[1000]]))
    cos = rotation[0, 0, 0, :4]
    expected = [math.cos(1000 / 1e6 ** (2 * i / 8)) for i in range(4)]
    torch.testing.assert_close(cos, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"mlp_layer_types": ["dense", "thick"]}, ["mlp_layer_types holds 'thick'", "valid names are dense"]),
        ({"eos_token_id": 67}, ["eos_token_id is 67", "0 to 66"]),
        ({"num_key_value_heads": 3, "head_dim": 7}, ["num_key_value_heads is 3", "head_dim is 7"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, ["dynamic", "more than 2"]),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8,
                }
            },
            ["low_freq_factor is 4.0", "below high_freq_factor"],
        ),
    ],
)
def test_shapes_that_cannot_work_are_named(changes, parts):
    """Those that a run's settings can name are in tests/settings/mistakes.py."""
    with pytest.raises(ValueError) as raised:
        MiniLLMConfig(**{**SMALL, **changes})
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    "field, build, valid",
    [
        ("attention_type", lambda c: build_mixer(c, 0), "gqa"),
        ("mlp_type", lambda c: build_mlp(c, 0), "swiglu"),
        ("norm_type", build_norm, "rmsnorm"),
        ("position_embedding_type", build_positions, "rope"),
    ],
)
def test_unknown_mechanisms_name_the_valid_ones(field, build, valid):
    with pytest.raises(ValueError, match=rf"{field} is 'magic'.*valid names are {valid}"):
        build(MiniLLMConfig(**{**SMALL, field: "magic"}))
