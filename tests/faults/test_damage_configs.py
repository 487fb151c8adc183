"""Bad configurations through the real launch/pretrain.py: one error in about a second, and nothing on disk.

Contract: exit code 2, one `error:` that names the key, the rule and the fix, no traceback, no torch imported, nothing
written to the run root or to where the command was given.
"""

from __future__ import annotations

import json
import re
import resource
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.damage_configs import ALL, FP32, Bad
from tests.faults.damage_files import contents
from tests.support.launching import ROOT, command, environment, run

pytestmark = pytest.mark.faults
SECTION = "Bad configurations"
CASES = [pytest.param(group, what, id=f"{group}: {what}") for group, cases in ALL.items() for what in cases]
DEMO = (ROOT / "launch" / "configs" / "demo.yaml").read_text()


def arguments(bad: Bad, folder: Path, root: Path) -> list[str]:
    """The files of a case in `folder`, and the command's words; run_root is `root`."""
    folder.mkdir()
    (folder / "ds.json").write_bytes(bad.json.encode("utf-8", "surrogateescape"))
    config = "demo"
    if bad.yaml is not None:
        (folder / "bad.yaml").write_bytes(bad.yaml.encode("utf-8", "surrogateescape"))
        config = str(folder / "bad.yaml")
    words = [word for word in bad.words if not word.startswith("run_root")]
    own = [word for word in bad.words if word.startswith("run_root")] or [f"run_root={json.dumps(str(root))}"]
    return ["--deepspeed", str(folder / "ds.json"), "--config", config, *own, *words]


def check(bad: Bad, stderr: str) -> None:
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in stderr, stderr
    for expected in bad.says:
        assert re.search(expected, stderr), f"{expected!r} is not in {stderr}"


@pytest.fixture
def started(monkeypatch):
    """launch/ as the script's own folder; a start that gets past its checks fails instead of training."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import entry

    def refuse(run) -> None:
        assert not entry.uses_builtin_data(run), "it was accepted"

    monkeypatch.setattr(entry, "prepare_builtin_data", refuse)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "launch" / "pretrain.py")])


@pytest.mark.parametrize("group, what", CASES)
def test_it_is_refused_at_once(started, tmp_path, monkeypatch, capsys, fault_table, group, what):
    bad = ALL[group][what]
    monkeypatch.chdir(tmp_path)
    given = arguments(bad, tmp_path / "given", tmp_path / "runs")
    before = contents(tmp_path)
    monkeypatch.setattr(sys, "argv", [*sys.argv, *given])
    began = time.process_time()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert end.value.code == 2 and time.process_time() - began < 1
    check(bad, capsys.readouterr().err)
    assert contents(tmp_path) == before
    fault_table.row(SECTION, f"{group}: {what}", "one error with key, rule and fix; exit code 2; nothing written")


def test_many_mistakes_are_one_error(started, tmp_path, monkeypatch, capsys, fault_table):
    """One of each group at once: every one is in the list."""
    monkeypatch.chdir(tmp_path)
    bad = Bad(
        ("5 problems", "learning_rat:", "max_steps = 0", "did you mean `dense-26m`", "stage = 9", "does not divide"),
        words=("optim.learning_rat=1", "train.max_steps=0", "model.preset=dense-26", "train.train_batch_size=7",
               "train.train_micro_batch_size_per_gpu=2"),
        json='{"zero_optimization": {"stage": 9}}',
    )  # fmt: skip
    given = arguments(bad, tmp_path / "given", tmp_path / "runs")
    # a section with a mistake holds defaults while the rest is checked, so train's second one comes at the next try
    monkeypatch.setattr(sys, "argv", [*sys.argv, *[word for word in given if "max_steps" not in word]])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(sys.argv[0], run_name="__main__")
    err = capsys.readouterr().err
    assert end.value.code == 2 and "4 problems" in err
    assert all(re.search(expected, err) for expected in (bad.says[1], *bad.says[3:])), err
    fault_table.row(SECTION, "four mistakes at once", "one error lists all four")


def test_a_run_root_inside_a_file(started, tmp_path, monkeypatch, capsys, fault_table):
    monkeypatch.chdir(tmp_path)
    what = "/proc/version/runs"
    given = arguments(Bad((), words=(f"run_root={what}",)), tmp_path / "given", tmp_path)
    monkeypatch.setattr(sys, "argv", [*sys.argv, *given])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert end.value.code == 2
    check(Bad((f"run_root = '{what}'", "/proc/version is no folder", "name another")), capsys.readouterr().err)
    fault_table.row(SECTION, f"run_root={what}", "one error with key, rule and fix; exit code 2; nothing written")


REAL = [
    ("overrides and keys", "an unknown key"), ("values", "a learning rate that is no number"),
    ("what fits what", "a batch that does not divide"), ("what fits what", "a training folder that is not there"),
    ("DeepSpeed's JSON", "ZeRO-3 with DeepSpeed's experts"), ("YAML", "a key twice"),
]  # fmt: skip


@pytest.mark.parametrize("group, what", REAL, ids=[what for _, what in REAL])
def test_the_real_command_answers_at_once(tmp_path, fault_table, group, what):
    bad = ALL[group][what]
    given = arguments(bad, tmp_path / "given", tmp_path / "runs")
    before = contents(tmp_path)
    code = "import sys, runpy; sys.path.insert(0, sys.argv[1]); del sys.argv[1]\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    script = str(ROOT / "launch" / "pretrain.py")
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, script, *given], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    assert done.returncode == 2 and done.stdout == ""
    check(bad, done.stderr)
    assert contents(tmp_path) == before
    assert seconds < 3, "about 0.7 s of a processor"
    light = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = [{script!r}, {str(ROOT / 'launch')!r}, *sys.argv[1:]]\n{code}",
         *given], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert light.returncode == 2 and "AssertionError" not in light.stderr
    fault_table.row(SECTION, f"{what}, as a command", f"exit code 2 after {seconds:.1f} s of CPU, torch not imported")


LATER = {
    "fp16 on a CPU": (
        (), '{"fp16": {"enabled": true}, "zero_optimization": {"stage": 2}}', "fp16 needs a GPU.*use a bf16 JSON",
    ),
    "a vocabulary below the tokenizer's": (
        ("model.vocab_size=300",), FP32, r"model.vocab_size = 300: the tokenizer .* has 384 tokens; set model.vocab",
    ),
    "another model's weights": (
        ("model.init_from=/work",), FP32, "/work is neither a model folder .*nor a run",
    ),
    "a run as init_from that is not there": (
        ("model.init_from=nobody",), FP32, "there is no run or folder 'nobody'",
    ),
    "a tokenizer that is none": (("data.tokenizer={shards}",), FP32, "the tokenizer|no tokenizer"),
    "a training folder without shards": (("data.train={tokenizer}",), FP32, "holds no shards"),
    "sequences without a document": (("data.train={tokenizer}/*.tar",), FP32, "matches no shard"),
}  # fmt: skip


@pytest.mark.parametrize("what", LATER)
def test_what_only_the_start_can_see(started, tiny_settings, tmp_path, monkeypatch, capsys, fault_table, what):
    """These need torch or the data: some seconds, but before anything of the run is written."""
    overrides, json_text, said = LATER[what]
    (tmp_path / "ds.json").write_text(json_text)
    places = {"shards": tiny_settings["data.train"], "tokenizer": tiny_settings["data.tokenizer"]}
    changed = dict(word.format(**places).split("=", 1) for word in overrides)
    settings = {**tiny_settings, "run_root": str(tmp_path / "runs"), "run_name": "r", **changed}
    if "model.init_from" in changed:
        settings = {key: value for key, value in settings.items() if not key.startswith("model.") or key in changed}
    line = command("pretrain.py", tmp_path / "ds.json", settings)
    if "model.vocab_size" in changed:  # found with the process group open, which this process may have too
        done = run(line, check=False)
        code, err = done.returncode, done.stderr
    else:
        monkeypatch.setattr(sys, "argv", line[1:])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(sys.argv[0], run_name="__main__")
        code, err = end.value.code, capsys.readouterr().err
    assert code == 2
    check(Bad((said,)), err)
    assert not (tmp_path / "runs").exists()
    fault_table.row(SECTION, f"{what}", "one error before the run folder is made, exit code 2")


def test_two_ranks_under_the_launcher(tmp_path, fault_table):
    bad = ALL["what fits what"]["a batch that does not divide"]
    (tmp_path / "ds.json").write_text(FP32)
    settings = {"run_root": str(tmp_path / "runs"), "train.train_batch_size": 10,
                "train.train_micro_batch_size_per_gpu": 4}  # fmt: skip
    done = run(command("pretrain.py", tmp_path / "ds.json", settings, ranks=2), check=False)
    assert done.returncode != 0 and not (tmp_path / "runs").exists()
    said = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line and "rank" in line or
            line.startswith("error: ")]  # fmt: skip
    assert sum(line.startswith("error: ") for line in said) <= 1 and said, done.stderr
    assert bad.says[0] in done.stdout + done.stderr or any("error (rank 1)" in line for line in said)
    fault_table.row(SECTION, "a batch that does not divide, two ranks", "each rank says it once, nothing written")
