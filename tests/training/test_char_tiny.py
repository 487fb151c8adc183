"""The whole stack learns: char-tiny on the synthetic tasks, against the lowest loss there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.corpus import build_synthetic
from data_tools.shards import build_shards
from data_tools.tokenizer import build_tokenizer
from minillm.config import load_run_config
from tests.launching import ROOT, losses, metrics
from tests.training.in_process import train

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
        "model.preset": "char-tiny", "run_root": str(folder), "run_name": "r", "train.train_batch_size": 16,
        "train.train_micro_batch_size_per_gpu": 16, "optim.learning_rate": 4e-3, "optim.warmup_ratio": 0.05,
        "validation.every": 0, "validation.max_sequences": 32, "samples.every": 0, "checkpoint.every": 0,
        "log.every": 1, "log.wandb": "disabled",
    }  # fmt: skip
    summary = json.loads((corpus / "summary.json").read_text())
    return settings, summary["validation"]["entropy_floor_nats_per_token"]


def validation_loss(run_dir: Path) -> float:
    return [record["val_loss"] for record in metrics(run_dir) if "val_loss" in record][-1]


def test_it_learns_to_count_and_copy_within_a_hundred_steps(tmp_path):
    """Quick: from ln(384) = 5.95 to below half of what the characters' frequencies alone allow (about 2.3)."""
    settings, floor = prepare(tmp_path, ["repetition"], 1500)
    assert train({**settings, "train.max_steps": QUICK_STEPS}) == 0
    assert 5 < losses(tmp_path / "r")[0] < 7
    assert floor < validation_loss(tmp_path / "r") < floor + QUICK_ABOVE_FLOOR


@pytest.mark.slow
def test_it_comes_close_to_the_entropy_of_all_tasks(tmp_path):
    settings, floor = prepare(tmp_path, ["repetition", "counting", "copying", "brackets", "addition"], 20_000)
    assert train({**settings, "train.max_steps": SLOW_STEPS}) == 0
    assert floor - 0.005 < validation_loss(tmp_path / "r") < floor + SLOW_ABOVE_FLOOR
