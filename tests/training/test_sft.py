"""Fine-tuning: starts from the newest pretraining run, supervises assistant tokens only, and learns them."""

from __future__ import annotations

import pytest
import torch
import yaml

import minillm
from minillm.interop.load import newest_checkpoint
from tests.launching import checkpoint, losses, metrics
from tests.training.in_process import built_trainer, train

pytestmark = pytest.mark.usefixtures("group")


def test_sft_continues_the_newest_pretraining_run(settings, tiny_data, tmp_path, capsys):
    train({**settings, "run_name": "older"})
    train({**settings, "run_name": "base", "seed": 5})
    shape = {k for k in settings if k.startswith("model.")}
    chat = {k: v for k, v in settings.items() if k not in shape}
    chat |= {"data.train": tiny_data["chat.train"], "data.validation": tiny_data["chat.validation"]}
    chat |= {"run_name": "chat", "train.max_steps": 30, "checkpoint.every": 0, "log.every": 10}
    assert train(chat, stage="sft") == 0
    base = newest_checkpoint(tmp_path / "base")
    assert f"weights from {base}" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "chat" / "run.yaml").read_text())["model"]["init_from"] == str(base)

    # Supervised tokens: those of the answers and the <|im_end|> after each, counted with the tokenizer alone.
    records = [r for r in metrics(tmp_path / "chat") if "loss" in r]
    assert records[-1]["loss"] < records[0]["loss"]
    reply = minillm.load(str(tmp_path / "chat")).chat("The list returns a tuple in order?", max_new_tokens=8)
    assert isinstance(reply, str)

    train({**settings, "run_name": "newer"})  # a newer base does not disturb the resumed run
    assert train({**chat, "train.max_steps": 31}, stage="sft") == 0
    assert "resumed from step 30" in capsys.readouterr().out


def test_the_first_step_starts_from_the_exact_weights(settings, tmp_path):
    """bf16 training rounds a copy; the fp32 master has to hold the checkpoint's weights to the last bit."""
    train({**settings, "run_name": "base"})
    shape = {k for k in settings if k.startswith("model.")}
    own = {"run_name": "next", "model.init_from": "base"}
    bf16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    trainer = built_trainer({**{k: v for k, v in settings.items() if k not in shape}, **own}, bf16)
    trainer.save()
    before, after = checkpoint(tmp_path / "base", 4), checkpoint(tmp_path / "next", 0)
    weights = [name for name in before if not name.startswith("exp_avg")]
    assert weights and all(torch.equal(before[name], after[name]) for name in weights)
    assert all(not after[name].any() for name in after if name.startswith("exp_avg"))
    trainer.loader.close()
    assert losses(tmp_path / "base")
