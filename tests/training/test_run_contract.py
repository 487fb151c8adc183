"""The run contract: what a run leaves behind, what may change on resume and what may not, one writer, signals."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist
import yaml

from data_tools.shards import build_shards
from minillm.run_folder import RunFolder
from minillm.training.checkpoint import read_state
from minillm.training.engine import group_timeout
from minillm.training.metrics import Meter
from minillm.training.step import NonFiniteError
from minillm.utils.errors import UserError
from minillm.utils.files import write_manifest
from tests.support.in_process import built_trainer, train
from tests.support.launching import checkpoint, environment, losses, metrics, same_bits
from tests.support.tiny_data import sentences

pytestmark = pytest.mark.usefixtures("group")


class NoSignal:
    number = 0


def test_the_ranks_agree_on_a_step_in_one_collective(settings, monkeypatch):
    found = []

    def counted(name):
        collective = getattr(dist, name)
        return lambda *args, **kwargs: found.append(name) or collective(*args, **kwargs)

    trainer = built_trainer({**settings, "run_name": "counted"})
    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast_object_list", "barrier"):
        monkeypatch.setattr(dist, name, counted(name))
    assert trainer.begin_step(NoSignal) == 0
    trainer.close(0)
    assert found == ["all_gather"]
    assert trainer.num_targets == sum(
        int((batch["shift_labels"] != -100).sum()) for batch in trainer.batch.micro_batches
    )


def test_run_folder_and_metrics(settings, tmp_path, capsys):
    settings["samples.every"], settings["samples.prompts"] = 4, ["The list", "你好"]
    assert train(settings) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "validation at step" in line]
    assert ["step 0:" in said[0], "step 4:" in said[-1]] == [True, True], said
    run_dir = tmp_path / "r"
    assert {"run.yaml", "ds_config.json", "env.json", "metrics.jsonl", "samples.jsonl", "checkpoints"} <= {
        p.name for p in run_dir.iterdir()
    }
    records = [r for r in metrics(run_dir) if "loss" in r]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    for record in records:
        assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu"} <= set(record)
    validations = [r for r in metrics(run_dir) if "val_loss" in r]
    assert [r["step"] for r in validations] == [4] and {"loss", "val_ppl", "val_bpb"} <= set(validations[0])
    assert validations[0]["val_ppl"] == pytest.approx(math.exp(validations[0]["val_loss"]))
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [s["prompt"] for s in samples] == ["The list", "你好"] and all(s["step"] == 4 for s in samples)
    assert yaml.safe_load((run_dir / "run.yaml").read_text())["train"]["max_steps"] == 4
    assert json.loads((run_dir / "ds_config.json").read_text())["train_batch_size"] == 8
    assert json.loads((run_dir / "env.json").read_text())["packages"]["deepspeed"]


def test_several_sources_with_weights_are_validated_apart(settings, tmp_path):
    """Two sources 3 : 1; the whole validation loss is the token-weighted mean of the parts."""
    train_path, validation_path = settings["data.train"], settings["data.validation"]
    mixed = [{"name": "a", "path": train_path, "weight": 3}, {"name": "b", "path": validation_path}]
    apart = [{"name": "long", "path": train_path}, {"name": "short", "path": validation_path}]
    settings = {**settings, "data.train": mixed, "data.validation": apart, "train.max_steps": 2}
    assert train(settings) == 0
    record = next(r for r in metrics(tmp_path / "r") if "val_loss" in r)
    assert record["val_loss/long"] != record["val_loss/short"]
    low, high = sorted((record["val_loss/long"], record["val_loss/short"]))
    assert low < record["val_loss"] < high
    assert yaml.safe_load((tmp_path / "r" / "run.yaml").read_text())["data"]["train"][0]["weight"] == 3


def test_epochs_end_with_the_last_sequence(settings, tmp_path):
    """num_epochs trains on every target token of the data exactly so often; the last batch is filled with nothing."""
    settings = {**settings, "train.max_steps": None, "train.num_epochs": 2, "log.every": 1000, "validation.every": 0}
    trainer = built_trainer({**settings, "checkpoint.every": 0})
    stream = trainer.loader.stream
    targets = int((stream.rows(0, stream.num_sequences)["shift_labels"] != -100).sum())
    assert trainer.run_to_end(NoSignal) == 0
    trainer.close(0)
    assert trainer.state.tokens == 2 * targets


def test_mfu_is_operations_over_peak_and_time():
    """1,000 computed tokens of 2 GFLOP in 4 seconds on 1 TFLOP/s: half of the peak; 300 of them are targets."""
    now = iter([10.0, 14.0])
    meter = Meter(flops_per_token=2e9, peak=1e12, max_steps=10, clock=lambda: next(now))
    meter.start_step()
    meter.end_step(targets=300, computed=1000)
    assert meter.read() == {"tokens_per_s": 75.0, "mfu": 0.5}


def test_the_same_command_again_is_complete(settings, tmp_path, capsys):
    train(settings)
    before = (tmp_path / "r" / "metrics.jsonl").read_text()
    assert train(settings) == 0
    assert "is complete" in capsys.readouterr().out
    assert (tmp_path / "r" / "metrics.jsonl").read_text() == before


def test_resume_announces_itself_and_may_change_what_it_may(settings, tmp_path, capsys):
    train(settings)
    changed = {"train.max_steps": 6, "train.train_micro_batch_size_per_gpu": 2, "log.every": 1, "checkpoint.every": 3}
    assert train({**settings, **changed}, {"zero_optimization": {"stage": 3}}) == 0
    out = capsys.readouterr().out
    assert "fresh start in" in out and "resumed from step 4 of" in out
    assert len(losses(tmp_path / "r")) == 6


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", 7),
        ("data.seq_len", 32),
        ("data.stride", 16),
        ("train.train_batch_size", 16),
        ("model.hidden_size", 96),
    ],
)
def test_resume_refuses_what_defines_the_run(settings, tmp_path, key, value):
    train(settings)
    weights = checkpoint(tmp_path / "r", 4)
    before = settings.get(key, {"seed": 42, "data.stride": 64}.get(key))
    with pytest.raises(UserError) as error:
        train({**settings, key: value, "train.max_steps": 8})
    assert f"{key}: was {before}, now {value}" in str(error.value)
    assert same_bits(checkpoint(tmp_path / "r", 4), weights)


def test_resume_refuses_other_data_under_the_same_path(settings, tmp_path):
    def write(seed: int) -> None:
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)
        lines = [json.dumps({"id": str(i), "text": text}) for i, text in enumerate(sentences(seed, 60))]
        (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
        build_shards([tmp_path / "corpus.jsonl"], tmp_path / "shards")

    write(5)
    train({**settings, "data.train": str(tmp_path / "shards")})
    write(6)
    with pytest.raises(UserError, match="trained on other data"):
        train({**settings, "data.train": str(tmp_path / "shards"), "train.max_steps": 8})


def test_one_writer_a_run_folder(settings, tmp_path):
    with RunFolder(tmp_path / "r").only_writer():
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()}"):
            train(settings)


def test_a_signal_finishes_the_step_and_saves(settings, tmp_path):
    """From another thread, as a scheduler would, in the middle of the run."""
    settings = {**settings, "train.max_steps": 4000, "checkpoint.every": 0, "validation.every": 0}

    def send_when_training() -> None:
        deadline = time.monotonic() + 120
        while len(metrics(tmp_path / "r")) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send_when_training)
    sender.start()
    assert train(settings) == 128 + signal.SIGTERM
    sender.join()
    step = len(losses(tmp_path / "r"))
    assert checkpoint(tmp_path / "r", step) and step < 4000
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_non_finite_loss_stops_before_the_update(settings, tmp_path, stage):
    deepspeed = {"zero_optimization": {"stage": stage}}
    settings = {**settings, "optim.learning_rate": 1e30, "optim.gradient_clipping": 0, "optim.warmup_ratio": 0}
    settings["checkpoint.every"] = 1
    with pytest.raises(NonFiniteError, match=r"step \d: .* Nothing was updated; the last checkpoint is step \d"):
        train(settings, deepspeed)
    last = len(losses(tmp_path / "r"))
    assert checkpoint(tmp_path / "r", last)  # the last finite step's


def rotten(settings: dict, tmp_path) -> dict:
    """Settings whose compiled shards have a chunk that rotted on disk since."""
    cache = tmp_path / "cache"
    settings = {**settings, "data.cache_dir": str(cache), "validation.every": 0}
    train({**settings, "run_name": "first", "train.max_steps": 1})
    shard = max(cache.glob("*/*.tar"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[2000] ^= 0xFF
    shard.chmod(0o644)
    shard.write_bytes(content)
    return settings


def test_too_many_unreadable_sequences_stop_the_run(settings, tmp_path):
    settings = {**rotten(settings, tmp_path), "train.max_steps": 60}
    with pytest.raises(UserError, match="unreadable sequences so far, data.max_bad_samples = 0"):
        train({**settings, "run_name": "second"})
    assert train({**settings, "run_name": "third", "train.max_steps": 4, "data.max_bad_samples": 10_000}) == 0
    assert metrics(tmp_path / "third")[-1].get("bad_rows") or any("bad_rows" in r for r in metrics(tmp_path / "third"))


def test_unreadable_sequences_count_once_around_a_signal(settings, tmp_path):
    """The batch that was loaded when the signal came is trained on by the next start, and counts there."""
    allowed = {**rotten(settings, tmp_path), "train.max_steps": 4, "log.every": 1, "data.max_bad_samples": 10_000}
    assert train({**allowed, "run_name": "unbroken"}) == 0
    counts = [record.get("bad_rows", 0) for record in metrics(tmp_path / "unbroken") if "loss" in record]
    step = next(step for step in (2, 3, 4) if counts[step - 1] > counts[step - 2])  # its batch holds some
    broken = built_trainer({**allowed, "run_name": "broken"})
    assert broken.run_to_end(SignalBeforeStep(step)) == 128 + 15
    broken.close(0)
    assert train({**allowed, "run_name": "broken"}) == 0
    assert bad_rows(tmp_path / "broken", 4) == bad_rows(tmp_path / "unbroken", 4) == counts[-1] > 0
    assert losses(tmp_path / "unbroken") == losses(tmp_path / "broken")


class SignalBeforeStep:
    """A stop request that arrives while the batch of a step is loaded."""

    def __init__(self, step: int):
        self.left = step

    @property
    def number(self) -> int:
        self.left -= 1
        return 15 if self.left <= 0 else 0


def bad_rows(run_dir, step: int) -> int:
    return read_state(RunFolder(run_dir).checkpoint(step))[0].bad_rows


def test_validation_data_that_were_written_anew_are_refused(settings, tiny_data, tmp_path):
    copied = tmp_path / "validation"
    shutil.copytree(tiny_data["data.validation"], copied)
    own = {**settings, "data.validation": str(copied)}
    assert train(own) == 0
    shutil.rmtree(copied)
    shutil.copytree(tiny_data["data.train"], copied)
    with pytest.raises(UserError, match="step-000004 was validated on other data.*Put the shards back"):
        train({**own, "train.max_steps": 6})


def test_a_checkpoint_that_does_not_say_what_it_was_validated_on_is_resumed(settings, tmp_path):
    assert train(settings) == 0
    folder = tmp_path / "r" / "checkpoints" / "step-000004"
    state = json.loads((folder / "trainer_state.json").read_text())
    del state["data"]["validation"]  # as older versions wrote it
    (folder / "trainer_state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, {name: value for name, value in manifest.items() if name != "files"})
    assert train({**settings, "train.max_steps": 5}) == 0


@pytest.mark.parametrize("timeout", [60, 1800, 7200])
def test_a_collective_waits_longer_than_the_watch_does(timeout):
    """So that the rank that hangs is named before NCCL or gloo gives up."""
    assert group_timeout(timeout).total_seconds() >= max(1800, timeout) + 60


def test_the_group_of_a_run_has_the_runs_timeout(settings, tmp_path):
    """In a process of its own, since this one is in a group already."""
    code = (
        "import sys, torch; from minillm.training import engine; "
        "\nwith engine.process_group(engine.group_timeout(7200)):\n"
        "    group = torch.distributed.group.WORLD._get_backend(torch.device('cpu'))\n"
        "    print(int(group.options._timeout.total_seconds()))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["7500"], done.stderr[-2000:]
