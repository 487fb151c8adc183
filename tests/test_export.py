"""Exported folders: the same logits as the run, readable by transformers alone, whole or not there at all."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch

import minillm
from minillm import export
from minillm.interop.load import describe_model_folder
from minillm.utils.errors import UserError
from tests.tiny_run import tiny_model, tiny_tokenizer, write_run

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


def test_transformers_alone_loads_the_default_export(run, tmp_path, capsys):
    """DESIGN 9, law 6: a fresh process, no minillm on its path, the same logits, and generate ends at <|im_end|>."""
    assert export.main(["runs/talk", "out/hf"]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM" in printed
    assert 'AutoModelForCausalLM.from_pretrained("out/hf")' in printed

    code = """
import sys, numpy, torch
sys.modules["minillm"] = None  # importing it is an error from here on, installed or not
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("out/hf"); tokenizer = AutoTokenizer.from_pretrained("out/hf")
ids = tokenizer(sys.argv[1], return_tensors="pt").input_ids
numpy.save("logits.npy", model(ids).logits.detach().numpy())
messages = [{"role": "user", "content": "hi"}]
chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
assert model.generate(**chat, max_new_tokens=5, do_sample=False).shape[1] == chat["input_ids"].shape[1] + 5
print(type(model).__name__, model.generation_config.eos_token_id)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code, TEXT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == f"LlamaForCausalLM [{END_OF_TEXT}, {IM_END}]"
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits_of(tiny_model(seed=20)), atol=1e-4, rtol=0)


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
