"""The core set: what has to work with every admitted version of every package. One test is one column of the table.

`bash tests/run.sh --versions` runs this file in each of its environments (drive.py); by itself:
`python -m pytest tests/versions/core.py`. The real commands, on a corpus of a few sentences; about a minute on 2 cores.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data_tools
import minillm
from tests.support.launching import ROOT, checkpoint, command, environment, losses, run, same_bits

FEW, ALL = 6, 10  # steps of the run that is broken off, and of the whole
ZERO2 = ROOT / "ds_configs" / "zero2.json"
TOLERANCE = 1e-4
LIMIT = 1800  # seconds a command may take: the machine may be busy

GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = tokenizer("The list returns", return_tensors="pt").input_ids
made = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
whole = ids
for _ in range(5):  # without a cache
    logits = model(whole, use_cache=False).logits[:, -1]
    logits[:, model.generation_config.eos_token_id] = -torch.inf
    whole = torch.cat([whole, logits.argmax(-1, keepdim=True)], -1)
assert torch.equal(made, whole), (made, whole)
assert "minillm" not in sys.modules
print(type(model).__name__)
"""


def settings(tiny_settings: dict, root: Path, name: str, steps: int) -> dict[str, object]:
    constant = {"optim.lr_schedule": "constant", "optim.warmup_ratio": 0}  # else the steps' rates follow max_steps
    return {**tiny_settings, **constant, "run_root": str(root), "run_name": name, "train.max_steps": steps,
            "samples.every": 3, "samples.prompts": ["The list"], "samples.max_new_tokens": 8,
            "checkpoint.every": 0}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_settings, tmp_path_factory) -> Path:
    """A folder with the run `few`: 6 steps, sampled from on the way."""
    root = tmp_path_factory.mktemp("runs")
    run(command("pretrain.py", ZERO2, settings(tiny_settings, root, "few", FEW)), timeout=LIMIT)
    return root


def test_import():
    """Every module of the project."""
    modules = [found.name for package in (minillm, data_tools)
               for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]  # fmt: skip
    assert len(modules) > 90
    for name in modules:
        if not name.endswith(".__main__"):
            importlib.import_module(name)


def test_run(runs):
    assert len(losses(runs / "few")) == FEW


def test_resume(runs, tiny_settings, tmp_path):
    """6 steps, a new process, 4 steps == 10 steps, to the last bit."""
    done = run(command("pretrain.py", ZERO2, settings(tiny_settings, runs, "few", ALL)), timeout=LIMIT)
    assert f"resumed from step {FEW}" in done.stdout
    run(command("pretrain.py", ZERO2, settings(tiny_settings, tmp_path, "all", ALL)), timeout=LIMIT)
    assert losses(runs / "few") == losses(tmp_path / "all")
    assert same_bits(checkpoint(runs / "few", ALL), checkpoint(tmp_path / "all", ALL))


def test_sample(runs):
    samples = [json.loads(line) for line in (runs / "few" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples[:2]] == [3, 6]


def test_chat(runs):
    words = [sys.executable, "-m", "minillm.chat", str(runs / "few"), "--prompt", "The list", "--max-new-tokens", "8"]
    done = run([*words, "--temperature", "0"], timeout=LIMIT)
    assert done.stdout.strip()


def test_export(runs, tmp_path):
    """As transformers' own Llama, in a process that knows no minillm."""
    out = tmp_path / "exported"
    run([sys.executable, "-m", "minillm.export", str(runs / "few"), str(out)], timeout=LIMIT)
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(out)], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "LlamaForCausalLM"


@pytest.mark.parametrize("case", ["llama", "qwen3-next", "deepseek"])
def test_parity(case):
    """Ours against transformers' class with the same weights: logits, gradients, greedy generation with the cache."""
    from minillm.interop import from_transformers
    from tests.support.native_models import make_native

    theirs = make_native(case)
    ours = from_transformers(theirs).eval()
    ids = torch.randint(6, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    actual, expected = ours(ids, labels=ids), theirs(ids, labels=ids)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=TOLERANCE, atol=TOLERANCE)
    gradients = [torch.autograd.grad(output.loss, model.get_input_embeddings().weight)[0]
                 for output, model in ((actual, ours), (expected, theirs))]  # fmt: skip
    torch.testing.assert_close(*gradients, rtol=TOLERANCE, atol=TOLERANCE)
    made = [model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
            for model in (ours, theirs)]  # fmt: skip
    assert torch.equal(*made)
