"""Disks that fill and folders that cannot be written, on a tmpfs of the test's own.

Contract: the run says what could not be written and stops with one error; the previous checkpoint is whole and its bits
are the same; when there is room again, the same command ends with the bits of a run that never met a full disk.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from minillm.data.sources import open_sources, tokenize_shards
from minillm.training.loop import Trainer
from minillm.utils.errors import UserError
from minillm.utils.files import manifest_problems
from tests.faults.damage_disk import small_disk
from tests.faults.damage_files import contents, group_of_one
from tests.support.in_process import train
from tests.support.launching import checkpoint, command, losses, run, same_bits

pytestmark = pytest.mark.faults
SECTION = "Full disks and folders that cannot be written"
STEPS = 6
BOTH = pytest.mark.parametrize("asynchronous", [True, False], ids=["in the background", "at once"])


@pytest.fixture(scope="module", autouse=True)
def group():
    with group_of_one():
        yield


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        yield disk


@pytest.fixture
def begun(straight, disk) -> dict:
    """On the small disk: the run as it was after step 2."""
    shutil.copytree(Path(straight["run_root"]) / "r", disk.path / "r")
    for step in (4, STEPS):
        shutil.rmtree(disk.path / "r" / "checkpoints" / f"step-{step:06d}")
    recorded = disk.path / "r" / "run.yaml"
    recorded.write_text(recorded.read_text().replace(straight["run_root"], str(disk.path)))
    return {**straight, "run_root": str(disk.path)}


def checkpoints(settings: dict) -> list[str]:
    return sorted(path.name for path in (Path(settings["run_root"]) / "r" / "checkpoints").glob("*"))


def step_2_is_whole(settings: dict, straight: dict) -> None:
    run_dir = Path(settings["run_root"]) / "r"
    assert checkpoints(settings) == ["step-000002"]
    assert manifest_problems(run_dir / "checkpoints" / "step-000002") == []
    assert same_bits(checkpoint(run_dir, 2), checkpoint(Path(straight["run_root"]) / "r", 2))


def goes_on(settings: dict, straight: dict) -> None:
    """The same command again, with room: the bits and losses of the unbroken run."""
    assert train(settings) == 0
    run_dir, other = Path(settings["run_root"]) / "r", Path(straight["run_root"]) / "r"
    assert same_bits(checkpoint(run_dir, STEPS), checkpoint(other, STEPS))
    assert losses(run_dir) == losses(other)


def before_step(monkeypatch, step: int, action) -> None:
    """Call `action` once, before the batch of step `step` + 1 is loaded."""
    begin = Trainer.begin_step

    def begin_step(self, stop):
        if self.state.step == step and not done:
            done.append(step)
            action()
        return begin(self, stop)

    done: list[int] = []
    monkeypatch.setattr(Trainer, "begin_step", begin_step)


@BOTH
@pytest.mark.parametrize("room", [48 << 10, 240 << 10, 600 << 10], ids=["the tokenizer", "the weights", "the moments"])
def test_the_disk_fills_in_a_save(begun, straight, disk, fault_table, request, asynchronous, room):
    settings = {**begun, "checkpoint.asynchronous": asynchronous}
    disk.leave(room)
    with pytest.raises(UserError, match="step-000004 could not be written .*No space left.*step 2, is untouched.*run"):
        train(settings)
    step_2_is_whole(settings, straight)
    disk.free()
    goes_on(settings, straight)
    name = request.node.callspec.id.replace("-", ", ")
    fault_table.row(SECTION, f"full while writing {name}", "one error, the previous one whole; with room: same bits")


@BOTH
def test_the_disk_fills_in_the_first_save(straight, disk, fault_table, asynchronous):
    settings = {**straight, "run_root": str(disk.path), "checkpoint.asynchronous": asynchronous}
    disk.leave(300 << 10)
    with pytest.raises(UserError, match="step-000002 could not be written .*there is no earlier one"):
        train(settings)
    assert checkpoints(settings) == []
    disk.free()
    goes_on(settings, straight)
    fault_table.row(SECTION, "full in the first save", "one error; with room a fresh start, same bits")


def test_a_disk_for_one_checkpoint_and_a_half(straight, disk, fault_table):
    """keep=1: the old one goes only when the new one is whole, so that the disk needs room for two."""
    settings = {**straight, "run_root": str(disk.path), "checkpoint.keep": 1}
    size = sum(p.stat().st_size for p in (Path(straight["run_root"]) / "r" / "checkpoints" / "step-000002").iterdir())
    disk.leave(size * 3 // 2)
    with pytest.raises(UserError, match="step-000004 could not be written .*step 2, is untouched"):
        train(settings)
    step_2_is_whole(settings, straight)
    disk.free()
    goes_on(settings, straight)
    fault_table.row(SECTION, "room for one checkpoint and a half, keep=1", "one error, the old one is never given up")


def test_no_inode_is_left(begun, straight, disk, fault_table):
    disk.leave_inodes(4)
    with pytest.raises(UserError, match="could not be written .*No space left|No space left"):
        train(begun)
    step_2_is_whole(begun, straight)
    disk.free()
    goes_on(begun, straight)
    fault_table.row(SECTION, "no inode left", "one error, the previous one whole; with room: same bits")


def test_the_disk_is_full_at_the_start(begun, straight, disk, fault_table):
    disk.leave(0)
    disk.fill()
    with pytest.raises(UserError, match=r"No space left on device: '.*/r/.*run again") as error:
        train(begun)
    assert "\n" not in str(error.value)
    step_2_is_whole(begun, straight)
    disk.free()
    goes_on(begun, straight)
    fault_table.row(SECTION, "full before the start", "one error names the file; with room: same bits")


def test_metrics_cannot_be_written(begun, straight, disk, tmp_path, fault_table, monkeypatch):
    def fill() -> None:
        disk.leave(0)
        disk.fill()

    before_step(monkeypatch, 2, fill)
    # put aside meanwhile, because the page its end lies on still has room
    metrics = shutil.move(disk.path / "r" / "metrics.jsonl", tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="metrics.jsonl cannot be written .*No space left"):
        train(begun)
    step_2_is_whole(begun, straight)
    disk.free()
    shutil.move(metrics, disk.path / "r" / "metrics.jsonl")
    goes_on(begun, straight)
    fault_table.row(SECTION, "full when metrics are written", "one error names the file; with room: same bits")


def test_samples_cannot_be_written(begun, straight, disk, fault_table, monkeypatch):
    def fill() -> None:
        disk.leave(0)
        disk.fill()

    settings = {**begun, "samples.every": 1, "samples.prompts": ["The list"], "samples.max_new_tokens": 4}
    samples = disk.path / "r" / "samples.jsonl"
    samples.unlink(missing_ok=True)
    sample = Trainer.sample
    monkeypatch.setattr(Trainer, "sample", lambda self: (fill(), sample(self)))
    with pytest.raises(UserError, match="samples.jsonl cannot be written .*No space left.*run again"):
        train(settings)
    monkeypatch.setattr(Trainer, "sample", sample)
    step_2_is_whole(begun, straight)
    disk.free()
    goes_on(begun, straight)
    fault_table.row(SECTION, "full when samples are written", "one error names the file; with room: same bits")


def test_a_signal_on_a_full_disk(begun, straight, disk, fault_table, monkeypatch):
    """SLURM's warning arrives, and there is no room for the checkpoint it asks for."""

    def fill_and_signal() -> None:
        disk.leave(64 << 10)
        os.kill(os.getpid(), signal.SIGUSR1)

    before_step(monkeypatch, 3, fill_and_signal)
    with pytest.raises(UserError, match="step-000003 could not be written .*step 2, is untouched"):
        train(begun)
    step_2_is_whole(begun, straight)
    disk.free()
    goes_on(begun, straight)
    fault_table.row(SECTION, "a signal to save, the disk full", "one error, the previous one whole; same bits")


def test_pictures_cannot_be_written(begun, straight, disk, fault_table, monkeypatch, capfd):
    draw = Trainer.draw

    def full(self) -> None:
        disk.leave(0)
        disk.fill()
        draw(self)

    shutil.rmtree(disk.path / "r" / "plots", ignore_errors=True)
    monkeypatch.setattr(Trainer, "draw", full)
    assert train(begun) == 0
    assert "no picture could be written" in capfd.readouterr().err
    assert same_bits(checkpoint(disk.path / "r", STEPS), checkpoint(Path(straight["run_root"]) / "r", STEPS))
    fault_table.row(SECTION, "full when the picture is drawn", "a warning: the run is done and saved")


@BOTH
def test_checkpoints_become_read_only_in_the_run(begun, straight, disk, fault_table, monkeypatch, asynchronous):
    settings = {**begun, "checkpoint.asynchronous": asynchronous}
    with disk.read_only(disk.path / "r" / "checkpoints"):
        with pytest.raises(UserError, match="step-000004 could not be written .*Read-only file system.*is untouched"):
            train(settings)
        step_2_is_whole(settings, straight)
    goes_on(settings, straight)
    fault_table.row(SECTION, "checkpoints/ read-only", "one error, the previous one whole; writable again: same bits")


def test_the_run_folder_is_read_only(begun, straight, disk, tmp_path, fault_table):
    before = contents(disk.path)
    with disk.read_only(disk.path):
        with pytest.raises(UserError, match="Read-only file system: '.*/r/.lock'"):
            train(begun)
        (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
        done = run(command("pretrain.py", tmp_path / "ds.json", begun), check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search("error: .*\n.*run_root = .* cannot be written; make it writable, or name another", done.stderr)
    assert contents(disk.path) == before
    goes_on(begun, straight)
    fault_table.row(SECTION, "the run folder read-only", "one error in a second, nothing changed; writable: same bits")


def test_the_cache_is_full(straight, disk, fault_table):
    cache = disk.path / "cache"
    options = {"tokenizer_path": Path(straight["data.tokenizer"]), "cache_dir": cache}
    disk.leave(16 << 10)
    with pytest.raises(UserError, match=f"no space left for token shards in {cache}: free some, or name"):
        open_sources(straight["data.train"], **options)
    assert [name for name in contents(disk.path) if not name.endswith(".lock")] == ["cache"]
    with pytest.raises(UserError, match="no space left for token shards"):
        tokenize_shards(straight["data.train"], tokenizer_path=options["tokenizer_path"], out=disk.path / "tokens")
    assert not (disk.path / "tokens").exists() and not list(disk.path.glob(".*.tmp"))
    disk.free()
    (source,) = open_sources(straight["data.train"], **options)
    (reference,) = open_sources(
        straight["data.train"], **{**options, "cache_dir": Path(straight["data.cache_dir"])}
    )
    assert [shard.sha256 for shard in source.shards] == [shard.sha256 for shard in reference.shards]
    fault_table.row(SECTION, "the cache full while shards are compiled", "one error, nothing left; with room: the same")


def test_the_cache_is_read_only(straight, disk, fault_table):
    options = {"tokenizer_path": Path(straight["data.tokenizer"]), "cache_dir": disk.path / "cache"}
    (disk.path / "cache").mkdir()
    with disk.read_only(disk.path):
        with pytest.raises(UserError, match="cannot be compiled to .*Read-only file system.*data.cache_dir"):
            open_sources(straight["data.train"], **options)
    open_sources(straight["data.train"], **options)
    with disk.read_only(disk.path):  # what is compiled already is read where it is
        assert open_sources(straight["data.train"], **options)[0].num_documents == 400
    fault_table.row(SECTION, "the cache read-only", "one error names it; what it holds already is used")


def test_through_the_real_command(straight, begun, disk, tmp_path, fault_table):
    """A full disk, then room: exit code 2 and one error, then the bits of the unbroken run."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    one_thread = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]  # as in this process: the bits are compared
    line = [*one_thread, *command("pretrain.py", tmp_path / "ds.json", begun)]
    disk.leave(400 << 10)
    done = run(line, check=False)
    errors = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "step-000004 could not be written" in errors[0] and "step 2, is untouched" in errors[0]
    step_2_is_whole(begun, straight)
    disk.free()
    run(line)
    run_dir, other = disk.path / "r", Path(straight["run_root"]) / "r"
    assert same_bits(checkpoint(run_dir, STEPS), checkpoint(other, STEPS))
    fault_table.row(SECTION, "full in a save, launch/pretrain.py", "exit code 2, one error; with room: same bits")
