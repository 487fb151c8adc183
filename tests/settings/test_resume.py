"""What may be spelled otherwise when a run is resumed, and what may not be changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from minillm.settings.reading import load_run_config
from minillm.settings.resume import check_resumable
from minillm.settings.run import dump_run_config
from minillm.utils.errors import UserError
from tests.support.launching import ROOT


def run_of(*words: str, stage: str = "pretrain"):
    places = {"stage": stage, "configs_dir": ROOT / "launch" / "configs"}
    run, problems = load_run_config("demo" if stage == "pretrain" else "sft-demo", list(words), **places)
    assert not problems
    return run


def recorded(*words: str, stage: str = "pretrain") -> dict:
    return yaml.safe_load(dump_run_config(run_of(*words, stage=stage)))


DATA = ("data.train=data/a", "data.tokenizer=data/t")


@pytest.mark.parametrize(
    "before, now",
    [
        ((), ("data.packing=concat",)),
        (("data.packing=concat",), ()),
        ((), ("data.seq_len=128", "data.stride=128")),
        (DATA, (f"data.train={Path.cwd()}/data/a", "data.tokenizer=./data/t")),
        (("data.train=[{name: a, path: data/a}]", DATA[1]),
         (f"data.train=[{{name: a, path: {Path.cwd()}/data/a}}]", DATA[1])),
        ((), ("model.hidden_size=256", f"model.layer_types={['full_attention'] * 4}")),
        (("model.preset=deepseek-v3-mini", "model.num_hidden_layers=4"),
         ("model.preset=deepseek-v3-mini", "model.num_hidden_layers=4",
          "model.mlp_layer_types=[dense, dense, dense, sparse]")),
        ((), ("train.max_steps=7", "train.train_micro_batch_size_per_gpu=1", "log.every=3", "model.moe_backend=torch")),
    ],
)  # fmt: skip
def test_the_same_in_other_words_goes_on(before, now):
    check_resumable(run_of(*now), recorded(*before))


def test_fine_tuning_takes_documents_apart_whether_or_not_it_says_so():
    check_resumable(run_of("data.packing=none", stage="sft"), recorded(stage="sft"))


@pytest.mark.parametrize(
    "before, now, said",
    [
        ((), ("data.packing=none",), "data.packing: was 'concat', now 'none'"),
        ((), ("data.stride=64",), "data.stride: was 128, now 64"),
        (DATA, ("data.train=data/b", DATA[1]), "data.train: was '/"),
        ((), ("model.hidden_size=128",), "model.hidden_size: was 256, now 128"),
        ((), ("seed=7",), "seed: was 42, now 7"),
        ((), ("optim.name=muon",), "optim.name: was 'adamw', now 'muon'"),
        (("model.preset=moe-demo",), ("model.preset=demo",), "model.preset: was 'moe-demo', now 'demo'"),
    ],
)
def test_what_defines_the_curve_may_not_change(before, now, said):
    with pytest.raises(UserError) as error:
        check_resumable(run_of(*now), recorded(*before))
    assert said in str(error.value) and "choose another run_name" in str(error.value)
