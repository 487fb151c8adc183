"""Bad configurations on the real command line: one error before torch is imported, and nothing on disk.

Contract: exit code 2, one `error:` that names the key, the rule and the fix, no traceback, no torch imported, nothing
written to the run root or to where the command was given. Every mistake there is stands in tests/settings/mistakes.py
and is tried in process by tests/settings/test_mistakes.py; here are one of each kind, and what only a start can see.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.damage_files import contents
from tests.support.launching import ROOT, command, environment, run

pytestmark = pytest.mark.faults
SECTION = "Bad configurations"
FP32 = '{"zero_optimization": {"stage": 2}}'
BATCH = ("train.train_batch_size=10", "train.train_micro_batch_size_per_gpu=4")
DOES_NOT_DIVIDE = "train.train_batch_size = 10 does not divide"
# what is wrong -> (words, JSON, YAML, what the error says)
REAL = {
    "an unknown key": (["optim.learning_rat=1"], FP32, None, ["optim.learning_rat: unknown key", "`learning_rate`"]),
    "a learning rate of nan": (["optim.learning_rate=.nan"], FP32, None, ["optim.learning_rate", "finite"]),
    "a batch that does not divide": (BATCH, FP32, None, [DOES_NOT_DIVIDE, "micro_batch_size_per_gpu=2"]),
    "a training folder that is not there": (
        ["data.train=/nowhere/shards", "data.tokenizer=/nowhere/t"], FP32, None, ["data.train = ", "not there"],
    ),
    "ZeRO-3 with DeepSpeed's experts": (
        ["model.preset=moe-876m", "model.moe_backend=deepspeed"],
        '{"bf16": {"enabled": true}, "zero_optimization": {"stage": 3}}', None, ["cannot run under ZeRO-3"],
    ),
    "a key twice in the YAML": ([], FP32, "train:\n  max_steps: 3\ntrain:\n  max_steps: 4\n", ["train", " twice"]),
}  # fmt: skip
LATER = {
    "fp16 on a CPU": (
        [], '{"fp16": {"enabled": true}, "zero_optimization": {"stage": 2}}', ["fp16 needs a GPU", "use a bf16 JSON"],
    ),
    "another model's weights": (["model.init_from=/work"], FP32, ["/work is neither a model folder", "nor a run"]),
    "a run as init_from that is not there": (["model.init_from=nobody"], FP32, ["there is no run or folder 'nobody'"]),
    "a tokenizer that is none": (["data.tokenizer={shards}"], FP32, ["tokenizer"]),
    "a training folder without shards": (["data.train={tokenizer}"], FP32, ["holds no shards"]),
    "sequences without a document": (["data.train={tokenizer}/*.tar"], FP32, ["matches no shard"]),
}  # fmt: skip


def check(stderr: str, expected: list[str]) -> None:
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in stderr, stderr
    for part in expected:
        assert part in stderr, stderr


@pytest.mark.parametrize("what", REAL)
def test_the_real_command_answers_before_it_imports_torch(tmp_path, fault_table, what):
    words, json_text, yaml, said = REAL[what]
    (tmp_path / "ds.json").write_text(json_text)
    (tmp_path / "bad.yaml").write_text(yaml or "")
    config = "demo" if yaml is None else str(tmp_path / "bad.yaml")
    script = str(ROOT / "launch" / "pretrain.py")
    given = ["--deepspeed", str(tmp_path / "ds.json"), "--config", config, f"run_root={tmp_path / 'runs'}", *words]
    before = contents(tmp_path)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", script, *given],  # it names every imported module on stderr
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    check(done.stderr, said)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "minillm.settings.run" in imported and not {"torch", "transformers", "deepspeed"} & imported
    assert contents(tmp_path) == before
    fault_table.row(SECTION, f"{what}, as a command", "one error, exit code 2, torch not imported, nothing written")


def start(tiny_settings: dict, folder: Path, changed: dict[str, str], json_text: str) -> list[str]:
    """The command line of a tiny run with these changes."""
    (folder / "ds.json").write_text(json_text)
    settings = {**tiny_settings, "run_root": str(folder / "runs"), "run_name": "r", **changed}
    if "model.init_from" in changed:
        settings = {key: value for key, value in settings.items() if not key.startswith("model.") or key in changed}
    return command("pretrain.py", folder / "ds.json", settings)


@pytest.mark.parametrize("what", LATER)
def test_what_only_the_start_can_see(tiny_settings, tmp_path, monkeypatch, capsys, fault_table, what):
    """These need torch or the data: some seconds, but before anything of the run is written."""
    words, json_text, said = LATER[what]
    places = {"shards": tiny_settings["data.train"], "tokenizer": tiny_settings["data.tokenizer"]}
    changed = dict(word.format(**places).split("=", 1) for word in words)
    monkeypatch.syspath_prepend(str(ROOT / "launch"))  # as `python launch/pretrain.py` does
    monkeypatch.setattr(sys, "argv", start(tiny_settings, tmp_path, changed, json_text)[1:])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert end.value.code == 2
    check(capsys.readouterr().err, said)
    assert not (tmp_path / "runs").exists()
    fault_table.row(SECTION, what, "one error before the run folder is made, exit code 2")


def test_a_vocabulary_below_the_tokenizers(tiny_settings, tmp_path, fault_table):
    """It is found with the process group open, which the process of the tests may have as well: a command."""
    done = run(start(tiny_settings, tmp_path, {"model.vocab_size": "300"}, FP32), check=False)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    check(done.stderr, ["model.vocab_size = 300: the tokenizer", "has 384 tokens; set model.vocab"])
    fault_table.row(SECTION, "a vocabulary below the tokenizer's", "one error before the run folder is made")


def test_two_ranks_under_the_launcher(tmp_path, fault_table):
    (tmp_path / "ds.json").write_text(FP32)
    settings = {"run_root": str(tmp_path / "runs"), **dict(word.split("=") for word in BATCH)}
    done = run(command("pretrain.py", tmp_path / "ds.json", settings, ranks=2), check=False)
    text = done.stdout + done.stderr
    said = [line for line in text.splitlines() if line.startswith(("error: ", "error (rank 1)"))]
    assert done.returncode != 0 and not (tmp_path / "runs").exists()
    assert said and sum(line.startswith("error: ") for line in said) <= 1, text
    assert DOES_NOT_DIVIDE in text or any("error (rank 1)" in line for line in said)
    fault_table.row(SECTION, "a batch that does not divide, two ranks", "each rank says it once, nothing written")
