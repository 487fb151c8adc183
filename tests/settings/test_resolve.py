"""What a start is: the micro-batch where the machine has a GPU, whose weights, which data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.planning.micro_batch import fill_gpu
from minillm.planning.step import Setup, memory
from minillm.run_folder import RESUMABLE
from minillm.settings.presets import preset
from minillm.settings.resolve import resolve, uses_builtin_data
from minillm.utils.errors import UserError
from minillm.utils.files import write_manifest
from tests.support.launching import ROOT
from tests.support.tiny_run import tiny_tokenizer, write_checkpoint, write_run

GIB = 2**30
PLACES = {"stage": "pretrain", "configs_dir": ROOT / "launch" / "configs"}


def resolved(config: str, json_name: str, gib: float | None, ranks: int, *words: str):
    size = None if gib is None else int(gib * GIB)

    def fill(*resolved: object) -> None:
        fill_gpu(*resolved, size)

    return resolve(config, list(words), json_name, world_size=ranks, fill=fill, **PLACES)


def micro_batch(*arguments) -> int:
    return resolved(*arguments).run.train.train_micro_batch_size_per_gpu


@pytest.mark.parametrize("gib", [2, 3, 6])
def test_the_micro_batch_fills_nine_tenths_of_a_gpu_by_plan(gib):
    start = resolved("dense-26m", "zero1", gib, 1, "train.train_batch_size=256")
    values = start.deepspeed
    setup = Setup.of(start.run, start.model.architecture, values, 1)
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
    start = resolved("dense-26m", str(tmp_path / "own.json"), 80, 1, "train.train_batch_size=256")
    steps = start.deepspeed["gradient_accumulation_steps"]
    assert (start.run.train.train_micro_batch_size_per_gpu, steps) == (8, 32)


# ---- whose weights


def moe_model():
    shape = {"vocab_size": len(tiny_tokenizer()), "hidden_size": 32, "num_hidden_layers": 2}
    return MiniLLMForCausalLM(MiniLLMConfig(**preset("moe-demo", **shape)))


def fine_tuning(root, *words: str):
    overrides = [f"run_root={root}", "run_name=chat", "data.seq_len=64", *words]
    return resolve("sft-demo", overrides, "moe_zero3", stage="sft", world_size=2, configs_dir=PLACES["configs_dir"])


def test_a_fine_tuning_run_goes_on_with_its_own_model_whatever_was_pretrained_since(tmp_path):
    write_checkpoint(tmp_path / "base", 10, moe_model())
    (tmp_path / "base" / "run.yaml").write_text("stage: pretrain\n")
    first = fine_tuning(tmp_path)
    assert first.model.base == tmp_path / "base" / "checkpoints" / "step-000010"
    assert first.model.architecture.num_experts == 8 and first.run.model.moe_backend == "autoep"

    own = write_checkpoint(tmp_path / "chat", 5, moe_model())
    for name in RESUMABLE[1:]:  # what a run goes on from
        (own / name).touch()
    write_manifest(own, {"step": 5})
    write_run(tmp_path, "newer", stage="pretrain", steps=(20,))  # no experts: moe_zero3.json would be refused for it
    again = fine_tuning(tmp_path)
    assert again.model.base == own and again.model.architecture == first.model.architecture
    assert again.run.model.moe_backend == "autoep"
    with pytest.raises(UserError, match="the model has no experts"):
        fine_tuning(tmp_path, "run_name=another")


def test_weights_that_are_not_there_are_no_error_of_a_dry_run(tmp_path):
    start = fine_tuning(tmp_path)
    assert start.model.architecture is None and "no pretrain run" in start.model.missing
    assert "not there yet" in start.model.name


def test_another_librarys_weights_say_what_they_are(tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    start = fine_tuning(tmp_path, f"model.init_from={tmp_path / 'llama'}")
    assert start.model.architecture is None and "a llama model" in start.model.name
    assert start.model.base == tmp_path / "llama"


def test_without_data_it_is_the_built_in_corpus():
    start = resolve("demo", [], "zero2", world_size=1, **PLACES)
    assert start.run.data.train == "data/python-docs/shards/train" and uses_builtin_data(start.run)
    assert start.run.data.tokenizer == "data/python-docs/tokenizer"
