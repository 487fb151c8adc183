"""Folders of native models: read as they are saved and published, every weight accounted for by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.interop import from_transformers
from minillm.interop.convert import load_as_minillm, load_config_as_minillm
from minillm.interop.load import load_model_folder
from minillm.interop.weights import fill
from minillm.utils.errors import UserError
from tests.support.native_models import CASES, make_native, randomise
from tests.support.toy_presets import toy_model

PER_EXPERT = {  # how a published folder names one expert's gate
    "mixtral": "model.layers.0.block_sparse_moe.experts.4.w1.weight",
    "qwen3-moe": "model.layers.3.mlp.experts.5.gate_proj.weight",
    "deepseek": "model.layers.1.mlp.experts.7.gate_proj.weight",
    "qwen3-next": "model.layers.1.mlp.experts.5.gate_proj.weight",
}

OTHER_POSITIONS = {"llama-linear", "llama-dynamic", "llama-yarn", "mistral-full", "deepseek-plain"}


def edit(folder, change):
    """Pass the weights of a folder through `change`, which works on the dictionary."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("case", [case for case in CASES if case not in OTHER_POSITIONS])
def test_a_folder_gives_the_same_weights_as_the_model(tmp_path, case):
    theirs = make_native(case)
    theirs.save_pretrained(tmp_path)
    if case in PER_EXPERT:
        assert PER_EXPERT[case] in load_file(tmp_path / "model.safetensors")
    expected = from_transformers(theirs)
    model = from_transformers(tmp_path)
    assert model.config.architecture == expected.config.architecture == load_config_as_minillm(tmp_path).architecture
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    assert not model.training


def test_several_files_and_a_lower_dtype(tmp_path):
    theirs = make_native("deepseek").to(torch.bfloat16)
    bias = theirs.model.layers[1].mlp.gate.e_score_correction_bias
    bias.data = bias.data.float() + 1e-4  # more digits than bf16 has
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for source in (theirs, tmp_path):
        ours = from_transformers(source)
        assert ours.model.norm.weight.dtype == ours.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(ours.model.layers[1].mlp.gate.e_score_correction_bias, bias)
    assert load_as_minillm(tmp_path).lm_head.weight.dtype == torch.float32


def test_published_gpt2_has_shorter_names_and_masks(tmp_path):
    theirs = make_native("gpt2")
    theirs.save_pretrained(tmp_path)

    def as_published(weights):
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)
        for layer in range(4):
            weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()

    edit(tmp_path, as_published)
    ours = from_transformers(tmp_path)
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_published_multi_token_weights_are_left_out_with_one_line(tmp_path, capsys):
    for case, names in (
        ("deepseek", ("model.layers.4.eh_proj.weight", "model.layers.4.mlp.experts.0.up_proj.weight")),
        ("qwen3-next", ("mtp.fc.weight", "mtp.layers.0.mlp.experts.0.up_proj.weight")),
    ):
        make_native(case).save_pretrained(tmp_path / case)
        edit(tmp_path / case, lambda weights, names=names: weights.update({name: torch.ones(4, 4) for name in names}))
        assert from_transformers(tmp_path / case).config.num_nextn_predict_layers == 0
        printed = capsys.readouterr().out
        assert "left out: 2 weights of multi-token prediction" in printed and printed.count("\n") == 1
    make_native("llama").save_pretrained(tmp_path / "llama")
    edit(tmp_path / "llama", lambda weights: weights.update({"model.layers.4.eh_proj.weight": torch.ones(4, 4)}))
    with pytest.raises(UserError, match="extra model.layers.4.eh_proj.weight"):
        from_transformers(tmp_path / "llama")


@pytest.mark.parametrize("case", ["llama", "gpt2", "mixtral", "deepseek", "qwen3-next"])
def test_missing_extra_and_misshapen_weights_are_named(tmp_path, case):
    make_native(case).save_pretrained(tmp_path)
    names = {}

    def damage(weights):
        norm = [name for name in weights if "norm" in name or "ln_f" in name]
        names["missing"], names["misshapen"] = sorted(norm)[0], sorted(norm)[-1]
        del weights[names["missing"]]
        weights[names["misshapen"]] = weights[names["misshapen"]][:-1]
        weights["model.layers.0.self_attn.sinks"] = torch.ones(16)

    edit(tmp_path, damage)
    with pytest.raises(UserError) as raised:
        from_transformers(tmp_path)
    message = str(raised.value)
    for part in (
        f"missing {names['missing']}",
        "extra model.layers.0.self_attn.sinks",
        f"{names['misshapen']} has shape",
        str(tmp_path),
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("case", PER_EXPERT)
def test_one_wrong_expert_is_named(tmp_path, case):
    make_native(case).save_pretrained(tmp_path)
    edit(tmp_path, lambda weights: weights.update({PER_EXPERT[case]: weights[PER_EXPERT[case]][1:]}))
    with pytest.raises(UserError, match=rf"{PER_EXPERT[case]} has shape \[\d+, 48\], the other experts' have"):
        from_transformers(tmp_path)
    edit(tmp_path, lambda weights: weights.pop(PER_EXPERT[case]))
    with pytest.raises(UserError, match=f"missing {PER_EXPERT[case]}$"):
        from_transformers(tmp_path)
    last = PER_EXPERT[case].rpartition("experts.")[2].partition(".")[0]
    edit(tmp_path, lambda weights: [weights.pop(name) for name in list(weights) if f"experts.{last}." in name])
    with pytest.raises(UserError, match=r"experts.gate_up_proj has shape \[\d, "):
        from_transformers(tmp_path)


def test_a_tied_config_with_two_matrices_is_refused(tmp_path):
    for case, table in (("llama-tied", "model.embed_tokens.weight"), ("gpt2", "transformer.wte.weight")):
        theirs = make_native(case)
        theirs.save_pretrained(tmp_path / case)
        same = load_file(tmp_path / case / "model.safetensors")[table]
        edit(tmp_path / case, lambda weights, same=same: weights.update({"lm_head.weight": same.clone()}))
        from_transformers(tmp_path / case)
        edit(tmp_path / case, lambda weights, same=same: weights.update({"lm_head.weight": same + 1}))
        with pytest.raises(UserError, match=rf"lm_head.weight differs from {table}"):
            from_transformers(tmp_path / case)
    untied = make_native("llama")
    weights = {n.replace("self_attn", "mixer"): w for n, w in untied.state_dict().items()}
    with pytest.raises(UserError, match="lm_head.weight differs"):
        fill(from_transformers(make_native("llama", tie_word_embeddings=True)), weights, "here")


def test_a_damaged_file_is_refused(tmp_path):
    make_native("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="a weight file in .* is damaged"):
        from_transformers(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"{tmp_path} cannot be loaded as LlamaForCausalLM.*model.safetensors"):
        from_transformers(tmp_path)


def test_a_config_that_cannot_be_converted_is_refused_before_the_weights_are_read(tmp_path):
    theirs = make_native("llama")
    theirs.config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="LlamaConfig: quantization_config is .*fp8"):
        from_transformers(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "config.json is missing"),
        ('{"model_type": "bert"}', "model_type is 'bert': those that can be converted are llama, mistral, qwen3, "),
        ("[]", "model_type is None"),
        ("{", "is not valid JSON"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "config.json is no LlamaConfig: .*hidden_size"),
    ],
)
def test_a_folder_of_no_known_family(tmp_path, content, message):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        from_transformers(tmp_path)
    if content and "bert" in content:
        for load in (load_as_minillm, load_config_as_minillm):
            with pytest.raises(UserError, match="holds a bert model; training can start from: minillm, llama, "):
                load(tmp_path)


def test_our_own_folders_are_strict_too(tmp_path):
    ours = randomise(toy_model("deepseek-v3-mini")).eval()
    ours.save_pretrained(tmp_path)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    for model in (load_as_minillm(tmp_path), load_model_folder(tmp_path, device="cpu")):
        assert torch.equal(model.state_dict()[bias], ours.state_dict()[bias])
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "minillm"
    edit(tmp_path, lambda weights: weights.pop(bias))
    with pytest.raises(UserError, match=f"missing {bias}"):
        load_as_minillm(tmp_path)
    with pytest.raises(UserError, match=f"lack 1 of the tensors .*{bias}"):
        load_model_folder(tmp_path, device="cpu")
