"""One owner of a run folder's names, and how often a checkpoint's bytes are read."""

from __future__ import annotations

import ast

import pytest

from minillm import run_folder
from minillm.run_folder import RunFolder
from minillm.settings.resolve import resolve
from minillm.utils import files
from minillm.utils.errors import UserError
from tests.support.in_process import train
from tests.support.launching import ROOT
from tests.support.tiny_run import write_run

NAMES = {
    "run.yaml", "ds_config.json", "model_config.json", "env.json", "metrics.jsonl", "experts.jsonl", "samples.jsonl",
    "events.jsonl", "skipped.json", "threads.json", "checkpoints", "model.safetensors", "optimizer.safetensors",
    "trainer_state.json", "rng.json", "loss.png", "experts.png",
}  # fmt: skip


def test_the_names_in_a_run_folder_are_spelled_in_one_file():
    for path in sorted(p for folder in ("minillm", "launch", "data_tools") for p in (ROOT / folder).rglob("*.py")):
        if path == ROOT / "minillm" / "run_folder.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not strings & NAMES, path


def test_a_run_folder_is_where_it_always_was(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.checkpoint(500).weights == tmp_path / "checkpoints" / "step-000500" / "model.safetensors"
    assert folder.settings == tmp_path / "run.yaml" and folder.metrics == tmp_path / "metrics.jsonl"
    assert folder.loss_picture == tmp_path / "plots" / "loss.png"
    assert folder.newest() is None and folder.checkpoints() == []


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of files whose every byte was read."""
    names = []
    digest = files.sha256_file

    def sha256_file(path):
        names.append(path.name)
        return digest(path)

    monkeypatch.setattr(files, "sha256_file", sha256_file)
    monkeypatch.setattr(run_folder, "SMALL", 20_000)  # as if the tiny weights were large
    return names


def test_looking_reads_no_weights(tmp_path, hashed):
    """A dry run, a job's time limit and preflight resolve so; 876M parameters are 10.5 GB."""
    write_run(tmp_path, "base", stage="pretrain", steps=(10, 20))
    hashed.clear()
    start = resolve(
        "sft-demo", [f"run_root={tmp_path}", "data.seq_len=64"], "zero2", stage="sft", world_size=1,
        configs_dir=ROOT / "launch" / "configs",
    )  # fmt: skip
    assert start.model.base == tmp_path / "base" / "checkpoints" / "step-000020"
    assert "model.safetensors" not in hashed and "config.json" in hashed


def test_small_files_are_compared_wherever_one_looks(tmp_path, capsys):
    run = RunFolder(write_run(tmp_path, "base", stage="pretrain", steps=(10, 20)))
    config = run.checkpoint(20).path / "config.json"
    config.write_text(config.read_text().replace("32", "23", 1))  # the same size
    assert run.newest().step == 10 and "config.json does not match its checksum" in capsys.readouterr().err


@pytest.mark.usefixtures("group")
def test_loading_reads_each_file_once(tiny_settings, tmp_path, hashed):
    settings = {**tiny_settings, "run_root": str(tmp_path), "train.max_steps": 2, "checkpoint.every": 0}
    assert train({**settings, "run_name": "base"}) == 0
    hashed.clear()
    assert train({**settings, "run_name": "base", "train.max_steps": 3}) == 0
    assert (hashed.count("model.safetensors"), hashed.count("optimizer.safetensors")) == (1, 1)
    own = {key: value for key, value in settings.items() if not key.startswith("model.")}
    hashed.clear()
    assert train({**own, "run_name": "next", "model.init_from": "base"}) == 0
    assert hashed.count("model.safetensors") == 1


@pytest.mark.usefixtures("group")
def test_a_flipped_byte_in_the_weights_is_found_before_they_are_loaded(tiny_settings, tmp_path, hashed):
    settings = {**tiny_settings, "run_root": str(tmp_path), "train.max_steps": 1, "checkpoint.every": 0}
    assert train({**settings, "run_name": "base"}) == 0
    weights = RunFolder(tmp_path / "base").checkpoint(1).weights
    content = bytearray(weights.read_bytes())
    content[-9] ^= 0xFF
    weights.write_bytes(content)
    own = {key: value for key, value in settings.items() if not key.startswith("model.")}
    with pytest.raises(UserError, match="model.safetensors does not match its checksum.*move that folder away"):
        train({**own, "run_name": "next", "model.init_from": "base"})
    assert not (tmp_path / "next" / "checkpoints").exists()
