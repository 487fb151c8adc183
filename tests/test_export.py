"""Exported folders: the same logits as the run, readable by transformers alone, whole or not there at all."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import minillm
from minillm import export
from minillm.run_folder import describe_model_folder
from minillm.utils.errors import UserError
from tests.support.tiny_run import tiny_model, tiny_tokenizer, write_run
from tests.support.toy_presets import toy_model

TEXT = "What does len do? 你好"
END_OF_TEXT, IM_END = 0, 2


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_run(tmp_path / "runs", "talk", "sft", (20,))


def logits_of(model):
    ids = torch.tensor([tiny_tokenizer()(TEXT).input_ids])
    with torch.no_grad():
        return model(ids).logits.float().numpy()


def write_toy(folder, preset, **changes):
    """A toy of a preset as a model folder with a tokenizer; the model, in eval mode."""
    model = toy_model(preset, vocab_size=len(tiny_tokenizer()), **changes).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


SINUSOIDAL = {"position_embedding_type": "sinusoidal"}
OWN_CODE = {"dense-171m": {}, "moe-876m": {}, "residual-moe-mini": {}, "char-tiny": SINUSOIDAL}
ALONE = """
import builtins, sys, numpy, torch
def asked(prompt):
    raise SystemExit(f"asked: {prompt}")
builtins.input = asked
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "minillm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())  # installed or not, it is not there from here on
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[2:]:
    own = folder.startswith("own/")
    options = {"trust_remote_code": True} if own else {}
    config = AutoConfig.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    ids = tokenizer(sys.argv[1], return_tensors="pt").input_ids
    numpy.save(f"{folder}.npy", model(ids).logits.detach().numpy())
    messages = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    made = model.generate(**chat, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert made.shape[1] == chat["input_ids"].shape[1] + 5
    print(type(model).__name__, type(config).__name__, model.generation_config.eos_token_id)
    if own:
        assert isinstance(model.chat("hi", max_new_tokens=4), str)
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        try:
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code" in str(error) or "minillm" in str(error), error
        else:
            raise AssertionError("code ran without consent")
assert not [name for name in sys.modules if name.split(".")[0] == "minillm"]
"""


def test_transformers_alone_loads_every_default_export(run, tmp_path, capsys):
    """DESIGN 9, law 6: a fresh process, no minillm to import, the same logits, and generate ends at <|im_end|>."""
    assert export.main(["runs/talk", "out/hf"]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM (family llama, no trust_remote_code needed)" in printed
    assert 'AutoModelForCausalLM.from_pretrained("out/hf")' in printed
    expected = {"out/hf": logits_of(tiny_model(seed=20))}
    for preset in ("gpt2-124m", "deepseek-v3-mini"):
        expected[f"out/{preset}"] = logits_of(write_toy(tmp_path / preset, preset))
        export.export(tmp_path / preset, Path(f"out/{preset}"))
    capsys.readouterr()
    for preset, changes in OWN_CODE.items():
        expected[f"own/{preset}"] = logits_of(write_toy(tmp_path / preset, preset, **changes))
        assert export.main([str(tmp_path / preset), f"own/{preset}"]) == 0
        printed = capsys.readouterr().out
        assert "trust_remote_code is needed" in printed
        assert f'AutoModelForCausalLM.from_pretrained("own/{preset}", trust_remote_code=True)' in printed

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", ALONE, TEXT, *expected],
        cwd=tmp_path, env={**environment, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    ends = [END_OF_TEXT, IM_END]
    classes = ["LlamaForCausalLM LlamaConfig", "GPT2LMHeadModel GPT2Config", "DeepseekV3ForCausalLM DeepseekV3Config"]
    classes += ["MiniLLMForCausalLM MiniLLMConfig"] * len(OWN_CODE)
    assert result.stdout.splitlines() == [f"{name} {ends}" for name in classes]
    for folder, logits in expected.items():
        np.testing.assert_allclose(np.load(tmp_path / f"{folder}.npy"), logits, atol=1e-4, rtol=0)
    # The same folder, with minillm at hand: its own class, and nothing from the folder is run.
    model = minillm.load(tmp_path / "own/moe-876m", device="cpu")
    assert type(model).__module__ == "minillm.models.modeling_minillm"
    np.testing.assert_allclose(logits_of(model), expected["own/moe-876m"], atol=1e-4, rtol=0)


NATIVE = {
    "char-tiny": "GPT2LMHeadModel",
    "mistral-mini": "MistralForCausalLM",
    "qwen3-moe-mini": "Qwen3MoeForCausalLM",
    "deepseek-v3-mini": "DeepseekV3ForCausalLM",
    "qwen3-next-mini": "Qwen3NextForCausalLM",
}


@pytest.mark.parametrize("preset", NATIVE)
def test_a_family_of_transformers_is_exported_as_its_class(tmp_path, preset, capsys):
    model = write_toy(tmp_path / "toy", preset, hidden_dropout=0.1)
    export.export(tmp_path / "toy", tmp_path / "out")
    printed = capsys.readouterr().out
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(native).__name__ == NATIVE[preset]
    assert not list((tmp_path / "out").glob("*.py"))
    np.testing.assert_allclose(logits_of(native), logits_of(model), atol=1e-4, rtol=0)
    assert ("left out, because" in printed and "hidden_dropout" in printed) == (preset != "char-tiny")
    assert ("multi-token prediction" in printed) == (preset == "deepseek-v3-mini")
    if preset == "deepseek-v3-mini":
        assert "router_bias_update_speed" in printed
    export.export(tmp_path / "out", tmp_path / "back", format="minillm")
    back = minillm.load(tmp_path / "back", device="cpu")
    assert type(back).__name__ == "MiniLLMForCausalLM"
    np.testing.assert_allclose(logits_of(back), logits_of(model), atol=1e-4, rtol=0)


def test_bf16_keeps_router_biases_whole(tmp_path):
    """They move by 0.001 a step, less than bf16 can tell apart at 1."""
    model = toy_model("deepseek-v3-mini", vocab_size=len(tiny_tokenizer()))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.state_dict()[name].copy_(1 + torch.arange(8) / 1000)
    model.save_pretrained(tmp_path / "toy")
    tiny_tokenizer().save_pretrained(tmp_path / "toy")
    for format in export.FORMATS:
        export.export(tmp_path / "toy", tmp_path / format, format, "bf16")
        stored = load_file(tmp_path / format / "model.safetensors")
        assert torch.equal(stored[name], model.state_dict()[name])
        assert stored["lm_head.weight"].dtype == torch.bfloat16
        assert json.loads((tmp_path / format / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_model_card_has_the_run_in_numbers(run, tmp_path):
    settings = {
        "run_name": "talk",
        "stage": "sft",
        "data": {
            "train": [
                {"name": "a", "path": "data/a/*.tar"},
                {"name": "b", "path": "https://me:secret@host/b.tar?key=k"},
            ],
            "validation": "data/v.tar",
        },
    }
    (run / "run.yaml").write_text(yaml.safe_dump(settings))
    state = {"format": "minillm-checkpoint-1", "state": {"step": 20, "tokens": 12_345}}
    (run / "checkpoints/step-000020/trainer_state.json").write_text(json.dumps(state))
    records = [
        {"step": 10, "loss": 3.0, "val_loss": 2.5, "val_ppl": 12.18, "val_bpb": 1.1},
        {"step": 20, "loss": 2.25},
        {"step": 21, "loss": 1.0, "val_loss": 1.0},  # after this checkpoint
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"step": 22, "lo')
    export.export("talk", tmp_path / "mine")
    text = (tmp_path / "mine/README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    expected = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["minillm", "llama"]}
    assert front == expected
    parameters = sum(p.numel() for p in tiny_model().parameters())
    for row in (
        f"| parameters | {parameters:,} |",
        "| class | `LlamaForCausalLM` |",
        "| `hidden_size` | 32 |",
        "| run | talk |",
        "| steps | 20 |",
        "| tokens | 12,345 |",
        "| training loss | 2.2500 |",
        "| validation loss | 2.5000 (step 10) |",
        "| validation perplexity | 12.1800 (step 10) |",
        "| validation bits per byte | 1.1000 (step 10) |",
        "| train data | `data/a/*.tar`, `https://host/b.tar` |",
        "| validation data | `data/v.tar` |",
        'AutoModelForCausalLM.from_pretrained("mine")',
    ):
        assert row in text, row
    assert "secret" not in text and "trust_remote_code" not in text


def test_minillm_format_keeps_the_class_the_logits_and_the_origin(run, tmp_path):
    out = tmp_path / "own"
    export.export("talk", out, format="minillm")
    model = minillm.load(out, device="cpu")
    assert type(model).__name__ == "MiniLLMForCausalLM"
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # whoever may read the config may read the weights
    np.testing.assert_array_equal(logits_of(model), logits_of(tiny_model(seed=20)))
    assert model.chat("hi", max_new_tokens=4, do_sample=False)
    origin = describe_model_folder(out)
    assert (origin.run, origin.step, origin.stage) == ("talk", 20, "sft")
    # and from there to Llama and back
    export.export(out, tmp_path / "llama")
    export.export(tmp_path / "llama", tmp_path / "back", format="minillm")
    np.testing.assert_array_equal(
        logits_of(minillm.load(tmp_path / "back", device="cpu")), logits_of(tiny_model(seed=20))
    )


@pytest.mark.parametrize("format", export.FORMATS)
def test_bf16_halves_the_weights(run, tmp_path, format):
    export.export("talk", tmp_path / "fp32", format)
    export.export("talk", tmp_path / "bf16", format, "bf16")
    header = 8 + int.from_bytes((tmp_path / "fp32/model.safetensors").read_bytes()[:8], "little")
    sizes = [(tmp_path / dtype / "model.safetensors").stat().st_size - header for dtype in ("fp32", "bf16")]
    assert sizes[1] == pytest.approx(sizes[0] / 2, abs=64)  # the header's length depends on the numbers in it
    assert json.loads((tmp_path / "bf16/config.json").read_text())["dtype"] == "bfloat16"
    assert minillm.load(tmp_path / "bf16", device="cpu", dtype="bf16").dtype == torch.bfloat16


def test_out_is_never_overwritten(run, tmp_path, capsys):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("keep me")
    with pytest.raises(SystemExit) as end:
        export.main(["talk", str(out)])
    assert end.value.code == 2
    assert "mine exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="not empty"):
        export.export("talk", out / "notes.txt")
    empty = tmp_path / "empty"
    empty.mkdir()
    export.export("talk", empty)
    assert (empty / "config.json").is_file()


def test_a_failed_export_leaves_nothing(run, tmp_path):
    parent = tmp_path / "file"
    parent.write_text("not a folder")
    with pytest.raises(UserError, match="could not be written"):
        export.export("talk", parent / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, limits[1]))  # like a disk that fills up under the weights
    try:
        with pytest.raises(UserError, match="out could not be written .*nothing was left there"):
            export.export("talk", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (run / "checkpoints/step-000020/tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json is missing|is damaged"):
        export.export("talk", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "runs"]


@pytest.mark.parametrize("rope_type", ["yarn", "llama3"])
def test_a_stretched_model_exports_and_chats_in_a_fresh_process(tmp_path, rope_type):
    """transformers reads config.json before our classes are known to it, unless they are registered first."""
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope_type == "llama3" else {}
    scaling = {"rope_type": rope_type, "factor": 4.0, "original_max_position_embeddings": 64, **more}
    write_toy(tmp_path / "ours", "llama3-mini", max_position_embeddings=256, rope_scaling=scaling)
    code = (
        "import sys; from minillm import chat, export; export.main(['ours', 'native']); "
        "sys.exit(chat.main(['native', '--prompt', 'hi', '--max-new-tokens', '4', '--device', 'cpu']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["rope_parameters"]["rope_type"] == rope_type
