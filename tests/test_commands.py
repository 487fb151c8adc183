"""Law 8: every YAML with every JSON dry-runs, --dry-run is quick and light, and mistakes cost a second."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys

import pytest

from minillm import plan
from tests.support.launching import ROOT, checkpoint, command, environment, losses, metrics, run_until

JSONS = sorted(p.name for p in (ROOT / "ds_configs").glob("*.json"))
YAMLS = sorted(p.stem for p in (ROOT / "launch" / "configs").glob("*.yaml"))


def script_of(config: str) -> str:
    return "sft.py" if "sft" in config.split("-") else "pretrain.py"


def refused(config: str, json_name: str) -> str | None:
    """What a pair that cannot run is told; AutoEP, which moe_zero3.json asks for, computes gated experts only."""
    if json_name != "moe_zero3.json" or script_of(config) == "sft.py":  # an sft run's model is not there yet
        return None
    return {"moe-demo": None, "moe-876m": "gated experts without biases"}.get(config, "the model has no experts")


@pytest.mark.parametrize("config", YAMLS)
@pytest.mark.parametrize("json_name", JSONS)
def test_every_yaml_with_every_json_dry_runs(config, json_name, tmp_path, monkeypatch, capsys):
    """The scripts as they are, in this process: starting Python for each of them would take ten times as long."""
    _, script, *arguments = command(script_of(config), ROOT / "ds_configs" / json_name, {}, config=config)
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--dry-run", "--ranks", "8"])
    monkeypatch.syspath_prepend(ROOT / "launch")  # as `python launch/pretrain.py` does
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    out, err = capsys.readouterr()
    if problem := refused(config, json_name):
        assert end.value.code == 2 and problem in err and "1 problem" in err
        return
    assert end.value.code == 0, err
    stage = json_name.split("zero")[1][0]
    precision = next((name for name in ("fp16", "fp32") if name in json_name), "bf16")
    assert f"ZeRO-{stage}, {precision}" in out
    if script_of(config) == "sft.py":
        assert "which is not there yet" in out
    else:
        assert "FLOPs a token" in out and "memory a GPU" in out
        assert config != "dense-26m" or "25,829,888" in out  # the count in ../shared/PRESETS.md
    assert not list(tmp_path.iterdir())  # nothing was written


def test_dry_run_and_config_errors_import_nothing_heavy(tmp_path):
    code = (
        "import sys; sys.argv = ['x', '--deepspeed', sys.argv[1], '--dry-run', *sys.argv[2:]]\n"
        f"sys.path.insert(0, {str(ROOT / 'launch')!r})\n"
        "from entry import main\n"
        "try:\n    main('pretrain', '', 'demo')\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules)))\n"
    )
    for extra in ([], ["optim.learning_rat=1"]):
        done = subprocess.run(
            [sys.executable, "-c", code, str(ROOT / "ds_configs" / "zero2.json"), *extra],
            cwd=tmp_path, env=environment(), capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == "[]"
        assert done.returncode == (2 if extra else 0)
    assert "did you mean `learning_rate`" in done.stderr and "Traceback" not in done.stderr


def test_the_launchers_ranks_save_and_leave_on_a_signal(tiny_settings, tmp_path):
    """INT to the process group (Ctrl-C): two ranks finish the step together and save it."""
    settings = {**tiny_settings, "run_root": str(tmp_path), "run_name": "r", "train.max_steps": 100_000,
                "checkpoint.every": 0, "validation.every": 0}  # fmt: skip
    words = command("pretrain.py", ROOT / "ds_configs" / "zero2.json", settings, ranks=2)
    run_until(words, lambda: len(metrics(tmp_path / "r")) >= 3, tmp_path, signal.SIGINT)
    log = (tmp_path / "killed.log").read_text()
    assert "stopped by signal 2 after step" in log, log
    assert checkpoint(tmp_path / "r", len(losses(tmp_path / "r")))


@pytest.mark.slow
def test_single_process_exits_with_128_plus_the_signal(tiny_settings, tmp_path):
    settings = {**tiny_settings, "run_root": str(tmp_path), "run_name": "r", "train.max_steps": 100_000,
                "checkpoint.every": 0, "validation.every": 0}  # fmt: skip
    words = command("pretrain.py", ROOT / "ds_configs" / "zero2.json", settings)
    code = run_until(words, lambda: len(metrics(tmp_path / "r")) >= 3, tmp_path, signal.SIGTERM, to_group=False)
    assert code == 128 + signal.SIGTERM
    assert os.path.isdir(tmp_path / "r" / "checkpoints" / f"step-{len(losses(tmp_path / 'r')):06d}")


NODE_CONFIGS = ["dense-171m", "dense-171m-sft", "moe-876m", "moe-876m-sft"]  # the README's: for eight 24 GB cards


@pytest.mark.parametrize("config", NODE_CONFIGS)
def test_the_start_that_a_config_of_the_node_names_is_the_fastest(config, capsys):
    """By minillm.plan, whose default is that node."""
    text = (ROOT / "launch" / "configs" / f"{config}.yaml").read_text(encoding="utf-8")
    start = rf"^# Start: deepspeed launch/(\w+\.py) --deepspeed ds_configs/(\w+)\.json --config {config}$"
    (named,) = re.findall(start, text, flags=re.MULTILINE)
    assert plan.main(["--config", config, "--json"]) == 0
    assert named == (script_of(config), json.loads(capsys.readouterr().out)["best"]["ds_config"])
