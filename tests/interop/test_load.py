"""Finding a model folder by what a user types, and loading only what is whole."""

import json
import os
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import minillm
from minillm.interop.load import load_model, load_model_folder
from minillm.run_folder import RunFolder, describe_model_folder, newest_run_checkpoint, resolve_model_folder
from minillm.utils.errors import UserError
from tests.support.tiny_run import tiny_model, tiny_tokenizer, write_run


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs under ./runs: `base` (older) and `talk` (newer, steps 10 and 20)."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs"
    write_run(root, "base", "pretrain", (5,))
    write_run(root, "talk", "sft", (10, 20))
    os.utime(root / "base/checkpoints/step-000005/manifest.json", (1_000, 1_000))
    return root


def damage(checkpoint):
    """Change one byte of the weights; the size stays."""
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_every_way_to_name_a_model(runs):
    newest = runs / "talk/checkpoints/step-000020"
    older = runs / "talk/checkpoints/step-000010"
    for path in (None, "talk", "runs/talk", runs / "talk", "runs/talk/checkpoints/step-000020", str(newest)):
        assert resolve_model_folder(path).resolve() == newest
    assert resolve_model_folder(older) == older
    assert resolve_model_folder("base").name == "step-000005"
    assert resolve_model_folder("talk", run_root=runs).name == "step-000020"


def test_newest_run_of_a_stage(runs):
    assert newest_run_checkpoint(runs).parent.parent.name == "talk"
    assert newest_run_checkpoint(runs, "pretrain") == runs / "base/checkpoints/step-000005"
    (runs / "talk/run.yaml").unlink()
    with pytest.raises(UserError, match="no sft run under"):
        newest_run_checkpoint(runs, "sft")


def test_what_a_folder_says_about_itself(runs):
    origin = describe_model_folder(resolve_model_folder("base"))
    assert (origin.run, origin.step, origin.stage) == ("base", 5, "pretrain")
    origin = describe_model_folder(resolve_model_folder("runs/talk/checkpoints/step-000010"))
    assert (origin.run, origin.step, origin.stage) == ("talk", 10, "sft")


def test_damaged_checkpoint_is_skipped_by_name_of_the_file(runs, capsys):
    damage(runs / "talk/checkpoints/step-000020")
    (runs / "talk/checkpoints/step-000030.tmp").mkdir()
    assert resolve_model_folder("talk").name == "step-000010"
    assert "step-000020/model.safetensors does not match its checksum" in capsys.readouterr().err
    assert resolve_model_folder(None).name == "step-000010"

    with pytest.raises(UserError, match=r"step-000020 is damaged: .*model\.safetensors"):
        resolve_model_folder("runs/talk/checkpoints/step-000020")


def test_a_run_without_a_whole_checkpoint_is_passed_over_or_named(runs, capsys):
    for step in (10, 20):
        (runs / f"talk/checkpoints/step-0000{step}/config.json").unlink()
    assert resolve_model_folder(None).name == "step-000005"
    assert "config.json is missing" in capsys.readouterr().err
    with pytest.raises(UserError, match="every checkpoint of the run talk is damaged|every checkpoint .*talk"):
        resolve_model_folder("talk")
    shutil.rmtree(runs / "talk/checkpoints/step-000010")
    shutil.rmtree(runs / "talk/checkpoints/step-000020")
    assert RunFolder(runs / "talk").newest("content") is None
    with pytest.raises(UserError, match="has no checkpoint yet"):
        resolve_model_folder("talk")


def test_nothing_there_says_what_is(runs, tmp_path):
    with pytest.raises(UserError, match="did you mean 'talk'"):
        resolve_model_folder("tlak")
    with pytest.raises(UserError, match="neither a model folder .* talk, base"):
        resolve_model_folder("runs")
    with pytest.raises(UserError, match="no trained run under empty/ yet"):
        resolve_model_folder(None, run_root="empty")


def test_load_chats_in_three_lines(runs):
    model = minillm.load("runs/talk", device="cpu")
    reply = model.chat("What does len do?", max_new_tokens=12, do_sample=False)

    expected_model = tiny_model(seed=20)
    prompt = tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": "What does len do?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    output = expected_model.generate(prompt, max_new_tokens=12, do_sample=False)
    expected = tiny_tokenizer().decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
    assert reply.strip() == expected.strip() != ""


def test_device_and_dtype(runs):
    assert load_model("talk", device="cpu").dtype == torch.float32
    model = load_model("talk", device="cpu", dtype="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    with pytest.raises(UserError, match="use one of auto, fp32, bf16"):
        load_model("talk", dtype="fp16")
    with pytest.raises(UserError, match="'tpu9' is not a device"):
        load_model("talk", device="tpu9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_cuda_where_there_is_none(runs):
    with pytest.raises(UserError, match="no CUDA device"):
        load_model("talk", device="cuda")


def test_another_family_is_loaded_as_it_is_and_chats(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = minillm.load(tmp_path, device="cpu")
    assert isinstance(model, LlamaForCausalLM)
    assert model.chat("你好", max_new_tokens=8, temperature=1.5, do_sample=True)
    assert describe_model_folder(tmp_path).stage is None


def test_weights_that_do_not_fit_their_config(runs):
    folder = runs.parent / "model"
    shutil.copytree(runs / "base/checkpoints/step-000005", folder)
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    deeper = {**config, "num_hidden_layers": 3, "layer_types": None, "mlp_layer_types": None}
    (folder / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(UserError, match=r"lack \d+ of the tensors .*model\.layers\.2\."):
        load_model_folder(folder, device="cpu")
    wider = {**config, "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(wider))
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        load_model_folder(folder, device="cpu")


def test_truncated_weights_and_tokenizer(runs):
    folder = runs.parent / "model"
    shutil.copytree(runs / "base/checkpoints/step-000005", folder)
    (folder / "manifest.json").unlink()
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="a weight file in .* is damaged"):
        load_model_folder(folder, device="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors"):
        load_model_folder(folder, device="cpu")
