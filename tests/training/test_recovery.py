"""Bad losses: what is left out, that nothing of it remains, and that a resumed run leaves out the same.

The oracle of skipping and rolling back is a straight run that was told from the start which batches to leave out: the
same weights, moments and losses to the last bit.
"""

from __future__ import annotations

import json
import shutil
import statistics
import weakref

import numpy as np
import pytest

from minillm.data.loader import BatchLoader
from minillm.data.sequence_stream import build_stream
from minillm.run_folder import RunFolder
from minillm.training import loop
from minillm.training.recovery import SkippedBatches, spike_threshold
from minillm.training.step import NonFiniteError
from minillm.utils.errors import UserError
from tests.support.in_process import built_trainer, resolved, train
from tests.support.launching import checkpoint, losses, metrics, same_bits

pytestmark = pytest.mark.usefixtures("group")
STEPS = 24
JITTERY = {"faults.spike_window": 8, "faults.spike_deviations": 0.5}  # ordinary ups and downs count as spikes
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 2}}


@pytest.fixture
def settings(tiny_settings, tmp_path) -> dict:
    own = {"run_root": str(tmp_path), "run_name": "r", "train.max_steps": STEPS, "checkpoint.every": 6,
           "validation.every": 0, "train.train_micro_batch_size_per_gpu": 4, "optim.learning_rate": 1e-6,
           "optim.lr_schedule": "constant", "optim.warmup_ratio": 0, "model.hidden_dropout": 0.1}  # fmt: skip
    return {**tiny_settings, **own}


def events(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").open()]


def test_the_step_th_batch_that_is_not_left_out(tmp_path):
    skipped = SkippedBatches(RunFolder(tmp_path))
    skipped.add(3, 4)
    skipped.add(7, 7)
    kept = [batch for batch in range(40) if batch not in (3, 4, 7)]
    assert [skipped.batch_of(step) for step in range(30)] == kept[:30]
    assert [SkippedBatches(RunFolder(tmp_path)).batch_of(step) for step in range(30)] == kept[:30]  # read back
    assert (skipped.occasions, skipped.num_batches) == (2, 3)
    (tmp_path / "skipped.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="skipped.json is damaged"):
        SkippedBatches(RunFolder(tmp_path))


def test_the_threshold_is_the_median_and_its_deviation():
    found = [3.0, 3.2, 2.9, 3.1, 50.0, 3.0, 3.3, 2.8]
    middle = statistics.median(found)
    deviation = 1.4826 * statistics.median(abs(x - middle) for x in found)
    assert spike_threshold(found, 8, 6.0) == pytest.approx(middle + 6 * deviation) and deviation < 0.5
    assert spike_threshold(found[:7], 8, 6.0) is None
    assert spike_threshold([2.0] * 8, 8, 10.0) == pytest.approx(2.02)  # a flat curve: at least 0.1 % each


@pytest.mark.parametrize(
    "deepspeed",
    [
        pytest.param({"zero_optimization": {"stage": 0}}, id="zero0", marks=pytest.mark.slow),
        pytest.param({"zero_optimization": {"stage": 2}}, id="zero2", marks=pytest.mark.slow),
        pytest.param({"zero_optimization": {"stage": 3}}, id="zero3"),
        pytest.param(BF16, id="bf16"),
    ],
)
def test_a_skipped_update_leaves_no_trace(settings, tmp_path, deepspeed):
    skipping = {**settings, **JITTERY, "faults.on_loss_spike": "skip", "faults.max_recoveries": 1000}
    assert train(skipping, deepspeed) == 0
    left_out = json.loads((tmp_path / "r" / "skipped.json").read_text())
    assert 1 <= len(left_out) < STEPS and len(losses(tmp_path / "r")) == STEPS
    found = [event for event in events(tmp_path / "r") if event["event"] == "loss_spike"]
    assert [event["batch"] for event in found] == [first for first, _ in left_out]
    assert all(event["loss"] > event["limit"] and len(event["documents"]) == 8 for event in found)

    told = tmp_path / "told"
    told.mkdir()
    shutil.copy(tmp_path / "r" / "skipped.json", told)
    assert train({**settings, "run_name": "told", "faults.on_loss_spike": "ignore"}, deepspeed) == 0
    assert losses(told) == losses(tmp_path / "r")
    assert same_bits(*({k: v for k, v in checkpoint(run, STEPS).items()} for run in (told, tmp_path / "r")))

    shutil.copytree(tmp_path / "r", tmp_path / "broken")  # resumed after the skips are known
    for step in range(12, STEPS + 1, 6):
        shutil.rmtree(tmp_path / "broken" / "checkpoints" / f"step-{step:06d}")
    assert train({**skipping, "run_name": "broken"}, deepspeed) == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "r")
    assert same_bits(checkpoint(tmp_path / "broken", STEPS), checkpoint(tmp_path / "r", STEPS))


def test_rolling_back_goes_past_the_batches_since_the_checkpoint(settings, tmp_path, capsys, monkeypatch):
    """And there is never a second engine in memory beside the first."""
    masters, alive = [], []

    def build_engine(*arguments):
        alive.append(sum(master() is not None for master in masters))
        engine = real_build_engine(*arguments)
        masters.append(weakref.ref(engine.optimizer.single_partition_of_fp32_groups[0]))
        return engine

    real_build_engine = loop.build_engine
    monkeypatch.setattr(loop, "build_engine", build_engine)
    fewer = {"faults.spike_deviations": 0.8, "faults.spike_window": 12}  # at JITTERY's own values 79 times back
    rolling = {**settings, **JITTERY, **fewer, "faults.on_loss_spike": "rollback", "faults.max_recoveries": 1000}
    assert train(rolling) == 0
    left_out = json.loads((tmp_path / "r" / "skipped.json").read_text())
    assert left_out and len(losses(tmp_path / "r")) == STEPS
    assert len(alive) > 2 and set(alive) == {0}
    assert "back to step" in capsys.readouterr().err
    told = tmp_path / "told"
    told.mkdir()
    shutil.copy(tmp_path / "r" / "skipped.json", told)
    assert train({**settings, "run_name": "told", "faults.on_loss_spike": "ignore"}) == 0
    assert losses(told) == losses(tmp_path / "r")
    assert same_bits(checkpoint(told, STEPS), checkpoint(tmp_path / "r", STEPS))


def test_a_spike_is_logged_and_changes_nothing_by_default(settings, tmp_path, capsys):
    assert train({**settings, **JITTERY}) == 0
    assert [event for event in events(tmp_path / "r") if event["event"] == "loss_spike"]
    assert "see events.jsonl" in capsys.readouterr().err
    assert train({**settings, "run_name": "quiet"}) == 0
    assert same_bits(checkpoint(tmp_path / "quiet", STEPS), checkpoint(tmp_path / "r", STEPS))
    with pytest.raises(UserError, match="Nothing was updated"):
        train({**settings, **JITTERY, "run_name": "stopped", "faults.on_loss_spike": "stop"})
    assert len(losses(tmp_path / "stopped")) < STEPS


def test_what_every_batch_spoils_stops_at_the_limit(settings, tmp_path):
    """A learning rate that ruins the weights: each batch gives nan, and nobody skips for ever."""
    ruined = {**settings, "optim.learning_rate": 1e30, "optim.gradient_clipping": 0, "faults.max_recoveries": 3,
              "faults.on_non_finite": "skip", "checkpoint.every": 1}  # fmt: skip
    with pytest.raises(UserError, match="all 3 recoveries of faults.max_recoveries are used up"):
        train(ruined)
    assert [event["policy"] for event in events(tmp_path / "r") if event["event"] == "non_finite"] == ["skip"] * 4
    assert checkpoint(tmp_path / "r", len(losses(tmp_path / "r")))
    with pytest.raises(NonFiniteError, match="set faults.on_non_finite"):
        train({**ruined, "run_name": "other", "faults.on_non_finite": "stop"})
    with pytest.raises(NonFiniteError, match="step-00000. are ruined.*move that folder away"):
        train({**ruined, "run_name": "third", "faults.on_non_finite": "rollback"})


def test_rolling_back_ends_too(settings, tmp_path):
    rolling = {**settings, **JITTERY, "faults.on_loss_spike": "rollback", "faults.max_recoveries": 0}
    with pytest.raises(UserError, match="all 0 recoveries of faults.max_recoveries are used up"):
        train(rolling)


def test_an_epoch_stays_as_long_where_batches_are_left_out(settings, tmp_path):
    epoch = {**settings, "train.max_steps": None, "train.num_epochs": 0.2, "checkpoint.every": 0}
    trainer = built_trainer(epoch)
    steps, trainer_loader = trainer.max_steps, trainer.loader
    assert trainer_loader.batch_at(steps).num_target_tokens == 0
    trainer.close(0)
    told = tmp_path / "told"
    told.mkdir()
    (told / "skipped.json").write_text("[[1, 2]]")
    trainer = built_trainer({**epoch, "run_name": "told"})
    assert trainer.max_steps == steps
    assert trainer.loader.batch_at(trainer.guard.skipped.batch_of(steps - 1)).num_target_tokens > 0
    trainer.close(0)


def test_the_documents_of_a_batch_are_those_whose_tokens_it_holds(settings):
    from minillm.training.build import open_data

    sources = open_data(resolved(settings)).train
    for packing in ("concat", "none"):
        stream = build_stream(sources, seq_len=64, packing=packing, seed=42)
        loader = BatchLoader(stream, train_batch_size=8, micro_batch_size=8, rank=0, world_size=1)
        (batch,) = loader.batch_at(5).micro_batches
        for row, place in zip(batch["input_ids"].numpy(), loader.places_of(5), strict=True):
            (shard,) = [s for s in sources[0].shards if s.path.name == place["shard"]]
            first, last = place["documents"]
            start, end = shard.document(first)[0], shard.document(last)[1]
            tokens = np.empty(end - start, shard.dtype)
            assert shard.read(start, tokens) is None
            wanted = row[: int(batch["lengths"][0]) if "lengths" in batch else 64]
            text = tokens.astype(np.int64).tolist()
            beginnings = range(shard.document(first)[1] - start)  # the row begins in the first document
            assert any(text[i : i + 8] == wanted[:8].tolist() for i in beginnings), place
        loader.close()


def test_stalls_and_starts_are_recorded(settings, tmp_path):
    assert train(settings) == 0
    stalls = [r["checkpoint_stall_s"] for r in metrics(tmp_path / "r") if "checkpoint_stall_s" in r]
    assert len(stalls) == STEPS // 6 - 1 and all(0 <= stall < 60 for stall in stalls)  # the last has no record after it
    assert [event["event"] for event in events(tmp_path / "r")] == ["started", "finished"]
    assert train({**settings, "train.max_steps": STEPS + 2}) == 0
    assert [e["step"] for e in events(tmp_path / "r")] == [0, STEPS, STEPS, STEPS + 2]
