"""What `auto` becomes where the machine has a GPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from minillm.planning.micro_batch import fill_gpu
from minillm.planning.step import Setup, memory
from minillm.settings.resolve import architecture_of, resolve_run
from tests.support.launching import ROOT

GIB = 2**30
PLACES = {"stage": "pretrain", "configs_dir": ROOT / "launch" / "configs"}


def resolved(config: str, json_name: str, gib: float | None, ranks: int, *words: str):
    size = None if gib is None else int(gib * GIB)

    def fill(*resolved: object) -> None:
        fill_gpu(*resolved, size)

    return resolve_run(config, list(words), json_name, world_size=ranks, fill=fill, **PLACES)


def micro_batch(*arguments) -> int:
    return resolved(*arguments)[0].train.train_micro_batch_size_per_gpu


@pytest.mark.parametrize("gib", [2, 3, 6])
def test_the_micro_batch_fills_nine_tenths_of_a_gpu_by_plan(gib):
    run, values = resolved("dense-26m", "zero1", gib, 1, "train.train_batch_size=256")
    setup = Setup.of(run, architecture_of(run)[0], values, 1)
    assert memory(setup).total <= 0.9 * gib * GIB < memory(replace(setup, micro=2 * setup.micro)).total
    assert setup.micro * values["gradient_accumulation_steps"] == 256
    assert values["train_micro_batch_size_per_gpu"] == setup.micro and values["train_batch_size"] == 256


def test_it_divides_the_batch_and_stays_within_its_bounds():
    assert micro_batch("dense-26m", "zero1", 80, 1, "train.train_batch_size=256") == 64
    assert micro_batch("dense-26m", "zero1", 80, 8, "train.train_batch_size=256") == 32  # a rank's share
    assert micro_batch("dense-26m", "zero1", 80, 1, "train.train_batch_size=100") == 50
    assert micro_batch("demo", "zero2", 80, 1) == 8  # the whole batch
    assert micro_batch("dense-171m", "zero1", 0.5, 1, "train.train_micro_batch_size_per_gpu=auto") == 1  # nothing fits


def test_without_a_gpu_and_where_somebody_has_said_it_nothing_changes(tmp_path):
    assert micro_batch("dense-26m", "zero1", None, 1, "train.train_batch_size=256") == 8
    own = "train.train_micro_batch_size_per_gpu=4"
    assert micro_batch("dense-26m", "zero1", 80, 1, "train.train_batch_size=256", own) == 4
    given = {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 32}
    (tmp_path / "own.json").write_text(json.dumps(given))
    run, values = resolved("dense-26m", str(tmp_path / "own.json"), 80, 1, "train.train_batch_size=256")
    assert (run.train.train_micro_batch_size_per_gpu, values["gradient_accumulation_steps"]) == (8, 32)
