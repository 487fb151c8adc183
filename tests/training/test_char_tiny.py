"""The whole stack learns: char-tiny on the synthetic tasks, against the lowest loss there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.corpus import build_synthetic
from data_tools.shards import build_shards
from data_tools.tokenizer import build_tokenizer
from tests.support.in_process import train
from tests.support.launching import losses, metrics

pytestmark = pytest.mark.usefixtures("group")


def prepare(folder: Path, tasks: list[str], documents: int) -> tuple[dict[str, object], float]:
    """Settings of char-tiny on a synthetic corpus, and the validation half's entropy floor."""
    corpus = folder / "corpus"
    build_synthetic(corpus, documents, tasks=tasks)
    build_tokenizer([corpus / "train.jsonl"], folder / "tokenizer", 384, "char")
    for half in ("train", "validation"):
        build_shards([corpus / f"{half}.jsonl"], folder / "shards" / half)
    settings = {
        "data.train": str(folder / "shards" / "train"), "data.validation": str(folder / "shards" / "validation"),
        "data.tokenizer": str(folder / "tokenizer"), "data.cache_dir": str(folder / "cache"), "data.seq_len": 128,
        "model.preset": "char-tiny", "run_root": str(folder), "run_name": "r", "train.train_batch_size": 8,
        "train.train_micro_batch_size_per_gpu": 8, "optim.learning_rate": 4e-3, "optim.warmup_ratio": 0.03,
        "validation.every": 0, "validation.max_sequences": 32, "samples.every": 0, "checkpoint.every": 0,
        "log.every": 1, "log.wandb": "disabled",
    }  # fmt: skip
    summary = json.loads((corpus / "summary.json").read_text())
    return settings, summary["validation"]["entropy_floor_nats_per_token"]


def validation_loss(run_dir: Path) -> float:
    return [record["val_loss"] for record in metrics(run_dir) if "val_loss" in record][-1]


def test_it_repeats_patterns_within_eighty_steps(tmp_path):
    """Measured: 6.14 at the start, 0.173 at the end, on texts it has not seen; the floor is 0.053."""
    settings, floor = prepare(tmp_path, ["repetition"], 1500)
    assert train({**settings, "train.max_steps": 80}) == 0
    assert 5 < losses(tmp_path / "r")[0] < 8
    assert floor < validation_loss(tmp_path / "r") < 0.25
