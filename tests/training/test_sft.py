"""Fine-tuning: starts from the newest pretraining run, supervises assistant tokens only, and learns them."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml

import minillm
from minillm.data.tokenizer import save_tokenizer, train_bpe_tokenizer
from minillm.run_folder import RunFolder
from minillm.utils.errors import UserError
from tests.support.in_process import built_trainer, train
from tests.support.launching import checkpoint, metrics

pytestmark = pytest.mark.usefixtures("group")


def test_sft_continues_the_newest_pretraining_run(settings, tiny_data, tmp_path, capsys):
    train({**settings, "run_name": "older"})
    train({**settings, "run_name": "base", "seed": 5})
    shape = {k for k in settings if k.startswith("model.")}
    chat = {k: v for k, v in settings.items() if k not in shape}
    chat |= {"data.train": tiny_data["chat.train"], "data.validation": tiny_data["chat.validation"]}
    chat |= {"run_name": "chat", "train.max_steps": 30, "checkpoint.every": 0, "log.every": 10}
    assert train(chat, stage="sft") == 0
    base = RunFolder(tmp_path / "base").newest().path
    assert f"weights from {base}" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "chat" / "run.yaml").read_text())["model"]["init_from"] == "newest"
    records = [r for r in metrics(tmp_path / "chat") if "loss" in r]
    assert records[-1]["loss"] < records[0]["loss"]
    reply = minillm.load(str(tmp_path / "chat")).chat("The list returns a tuple in order?", max_new_tokens=8)
    assert isinstance(reply, str)

    # Neither a newer base nor the loss of the old one disturbs the resumed run.
    train({**settings, "run_name": "newer"})
    shutil.rmtree(tmp_path / "base")
    assert train({**chat, "train.max_steps": 31}, stage="sft") == 0
    assert "resumed from step 30" in capsys.readouterr().out


def test_another_tokenizer_than_the_weights_is_refused(settings, tmp_path):
    train({**settings, "run_name": "base"})
    other = tmp_path / "other"
    save_tokenizer(train_bpe_tokenizer(["another text " * 9], 300), other)
    shape = {k for k in settings if k.startswith("model.")}
    own = {"run_name": "next", "model.init_from": "base", "data.tokenizer": str(other)}
    with pytest.raises(UserError, match="not the tokenizer of the weights in .*leave data.tokenizer out"):
        train({**{k: v for k, v in settings.items() if k not in shape}, **own})


def test_the_first_step_starts_from_the_exact_weights(settings, tmp_path):
    """bf16 training rounds a copy; the fp32 master has to hold the checkpoint's weights to the last bit."""
    train({**settings, "run_name": "base"})
    shape = {k for k in settings if k.startswith("model.")}
    own = {"run_name": "next", "model.init_from": "base"}
    bf16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    trainer = built_trainer({**{k: v for k, v in settings.items() if k not in shape}, **own}, bf16)
    trainer.save()
    trainer.writer.wait()
    before, after = checkpoint(tmp_path / "base", 4), checkpoint(tmp_path / "next", 0)
    weights = [name for name in before if not name.startswith("exp_avg")]
    assert weights and all(torch.equal(before[name], after[name]) for name in weights)
    assert all(not after[name].any() for name in after if name.startswith("exp_avg"))
    trainer.close(0)
