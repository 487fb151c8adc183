"""A run that an older version started goes on, to the same bits (tests/golden/old_run, written at the commit it names).

The folder was stopped after step 3 of 6 and holds what it left there: settings, a checkpoint with experts, the curve.
`expected.json` is how that version went on. Bits differ between processors: they are compared where a fresh run of the
first three steps gives the recorded bits too, and elsewhere the curve is compared to 1e-5.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.support.launching import ROOT, command, metrics, run

OLD = ROOT / "tests" / "golden" / "old_run"
SETTINGS = {
    "model.vocab_size": 320, "model.hidden_size": 16, "model.intermediate_size": 32, "model.num_hidden_layers": 2,
    "model.mlp_layer_types": ["dense", "sparse"], "model.num_attention_heads": 2, "model.num_key_value_heads": 1,
    "model.head_dim": 8, "model.moe_intermediate_size": 16, "model.num_experts": 4, "model.max_position_embeddings": 64,
    "data.train": "data/train", "data.validation": "data/validation", "data.tokenizer": "data/tokenizer",
    "data.cache_dir": "data/cache", "data.seq_len": 32, "train.train_batch_size": 4, "train.max_steps": 6,
    "checkpoint.every": 3, "checkpoint.keep": 9, "validation.every": 3, "log.every": 1, "log.wandb": "disabled",
    "samples.every": 0, "optim.learning_rate": 3e-3,
}  # fmt: skip


def start(name: str, folder: Path) -> str:
    """Type the command that the folder was started with; what it prints."""
    settings = {**SETTINGS, "run_name": name}
    words = command("pretrain.py", ROOT / "ds_configs" / "zero1.json", settings, config="moe-demo")
    return run(words, cwd=folder).stdout


def test_a_run_of_an_older_version_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    expected = json.loads((OLD / "expected.json").read_text())
    printed = start("old", tmp_path)
    assert "resumed from step 3 of runs/old/checkpoints/step-000003" in printed
    resumed = metrics(tmp_path / "runs" / "old")
    for old, new in zip(expected["metrics"], resumed, strict=True):
        assert {key: new[key] for key in old} == pytest.approx(old, rel=1e-5, abs=1e-7)

    start("anew", tmp_path)
    anew = metrics(tmp_path / "runs" / "anew")
    if any(anew[step]["loss"] != expected["metrics"][step]["loss"] for step in range(3)):
        return  # another processor
    last = tmp_path / "runs" / "old" / "checkpoints" / "step-000006"
    digests = {name: hashlib.sha256((last / name).read_bytes()).hexdigest() for name in expected["sha256"]}
    assert digests == expected["sha256"]
