"""`python -m minillm` and `minillm`: the list, every command by its help, what the launcher gets, and mistakes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import minillm
from minillm.__main__ import COMMANDS
from minillm.utils.commands import LAUNCHER_FLAGS, LAUNCHER_VALUES, split_launcher
from minillm.utils.files import write_manifest
from tests.support.launching import ROOT, environment, run

COMMAND = [sys.executable, "-m", "minillm"]
HEAVY = {"torch", "transformers", "deepspeed", "tokenizers", "webdataset", "datasets", "pyarrow", "matplotlib"}
HELP_OF_ALL = """
import contextlib, io, json, sys
from minillm.__main__ import COMMANDS, main
found = {}
for name in json.loads(sys.argv[1]):
    sys.argv = ["minillm", *name.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
        except SystemExit as end:
            found[name] = [end.code, out.getvalue()]
print(json.dumps({"found": found, "modules": sorted(sys.modules)}))
"""


def here() -> list[str]:
    """The commands whose module or script is in this checkout."""
    return [name for name, (target, _) in COMMANDS.items()
            if (ROOT / target).is_file() or importlib.util.find_spec(target) is not None]  # fmt: skip


def test_alone_it_lists_every_command():
    for words in ([], ["--help"], ["-h"]):
        out = run([*COMMAND, *words]).stdout
        assert [name for name in COMMANDS if not re.search(rf"^  {name}  +\S", out, flags=re.MULTILINE)] == []
    tools = run([*COMMAND, "data"]).stdout
    assert "  data clean " in tools and "  chat " not in tools
    assert max(map(len, out.splitlines())) <= 120


def test_every_data_tool_and_entry_point_has_a_row():
    """A module that can be started is in the table."""
    modules = [path for folder in ("minillm", "data_tools") for path in (ROOT / folder).glob("*.py")]
    started = [path for path in modules if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")]
    names = {f"{path.parent.name}.{path.stem}" for path in started}
    assert names - {target for target, _ in COMMANDS.values()} == {"minillm.__main__"}


def test_help_of_every_command():
    """Each names itself as it was typed, none imports anything heavy, and all of them end well."""
    words = [sys.executable, "-c", HELP_OF_ALL, json.dumps(here())]
    told = json.loads(run(words).stdout.splitlines()[-1])
    assert set(told["found"]) == set(here()) == set(COMMANDS)
    for name, (code, text) in told["found"].items():
        assert code == 0 and text.startswith(f"usage: minillm {name} "), (name, text[:100])
    assert not {module.split(".")[0] for module in told["modules"]} & HEAVY


def test_a_module_of_its_own_names_itself():
    for name, (target, _) in (row for row in COMMANDS.items() if row[0] in ("plan", "data clean")):
        assert run([sys.executable, "-m", target, "--help"]).stdout.startswith(f"usage: python -m {target} "), name
    assert run([sys.executable, str(ROOT / "launch" / "sft.py"), "--help"]).stdout.startswith("usage: sft.py ")


def test_version_says_what_runs_where_and_on_what():
    first, second = run([*COMMAND, "--version"]).stdout.splitlines()
    assert first == f"minillm {minillm.__version__} from {ROOT / 'minillm'}"
    version = importlib.metadata.version
    assert second == f"Python {sys.version.split()[0]}, " + ", ".join(
        f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers")
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["chatt"], "did you mean `chat`?"), (["tokenizer"], "did you mean `data tokenizer`?"),
        (["data", "tokeniser"], "did you mean `tokenizer`? (`minillm data --help` lists them)"),
        (["data", "pretrain"], "valid: builtin, corpus,"), (["xyz"], "valid: pretrain, sft,"),
        (["--num_gpus"], "minillm --num_gpus: there is no such command"),
        (["pretrain", "--dry-run", "--num_gpus", "2"], "--num_gpus 2: for the deepspeed launcher, but --dry-run"),
        (["pretrain", "--dry-run", "optim.learning_rat=1"], "did you mean `learning_rate`?"),
        (["pretrain", "--dry-run", "--deepspeed", "zero9"], "--deepspeed zero9: no such file; shipped configurations"),
        (["pretrain", "--dry-run", "--config", "demmo"], "did you mean `demo`?"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_error(tmp_path, words, message):
    done = run([*COMMAND, *words], cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stdout == "" and message in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_own_file_comes_before_a_shipped_one(tmp_path):
    """Paths from the current folder first; the shipped ones by name, by file name, and as their path in a checkout."""

    def stage(json_name: str) -> str:
        out = run([*COMMAND, "pretrain", "--dry-run", "--deepspeed", json_name], cwd=tmp_path).stdout
        return re.search(r"ZeRO-\d", out)[0]

    assert {stage(name) for name in ("zero3", "zero3.json", "ds_configs/zero3.json")} == {"ZeRO-3"}
    (tmp_path / "zero3.json").write_text((ROOT / "ds_configs" / "zero1.json").read_text())
    assert [stage(name) for name in ("zero3", "zero3.json")] == ["ZeRO-3", "ZeRO-1"]
    (tmp_path / "demo.yaml").write_text((ROOT / "launch/configs/demo.yaml").read_text().replace("demo", "char-tiny"))
    assert "char-tiny" in run([*COMMAND, "pretrain", "--dry-run", "--config", "demo.yaml"], cwd=tmp_path).stdout


def test_what_goes_to_the_launcher():
    words = "--config demo --num_gpus 2 a.b=1 --master_port=29511 --no_ssh_check --deepspeed z".split()
    launcher, rest = split_launcher(words)
    assert launcher == ["--num_gpus", "2", "--master_port=29511", "--no_ssh_check"]
    assert rest == ["--config", "demo", "a.b=1", "--deepspeed", "z"]
    assert split_launcher(["--num_gpus"]) == (["--num_gpus"], [])  # the launcher says what is missing


def test_a_supervisor_knows_the_run_of_either_way_to_start_it(tmp_path):
    checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / "step-000007"
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, {"step": 7})
    for words in (["minillm", "sft", "--num_gpus", "2"], ["deepspeed", "--num_gpus", "2", str(ROOT / "launch/sft.py")]):
        progress = [sys.executable, str(ROOT / "launch" / "progress.py"), *words, "run_name=mine"]
        assert run(progress, cwd=tmp_path).stdout == "7 runs/mine/checkpoints/step-000007\n"


def test_the_launchers_options_are_deepspeeds(capsys):
    """All of its options but those that have no place here: another kind of script, and its autotuner."""
    from deepspeed.launcher.runner import parse_args

    with pytest.raises(SystemExit):
        parse_args(["--help"])
    usage = capsys.readouterr().out
    options = {name: value for name, value in re.findall(r"^  (-\S+?)(?: ([A-Z_]+|\{[^}]+\}))?(?:,|  |$)", usage, re.M)}
    options |= {name: value for name, value in re.findall(r", (--\w+)(?: ([A-Z_]+))?", usage)}
    ours = LAUNCHER_VALUES | LAUNCHER_FLAGS
    assert set(options) - ours == {"-h", "--help", "--module", "--no_python", "--autotuning"}
    assert ours - set(options) == set()
    assert {name for name in ours if options[name]} == LAUNCHER_VALUES


def test_one_of_a_launchers_ranks_trains_in_its_own_process(tmp_path):
    """With RANK set nothing is started: the script's own checks answer at once, under its own name."""
    alone = {**environment(), "RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run([*COMMAND, "sft", "x.y=1"], cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert done.returncode == 2 and "with zero2 on 2 rank(s)" in done.stderr and "launcher" not in done.stderr
    done = subprocess.run([*COMMAND, "sft", "--num_gpus=2"], cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert done.returncode == 2 and "RANK says that one runs" in done.stderr


def test_the_launcher_takes_the_place_of_the_command(tmp_path):
    """Same process, so that signals reach it, and the ranks' exit code is the command's."""
    words = [*COMMAND, "pretrain", "--num_gpus", "2", "--master_port", str(29100 + os.getpid() % 400), "optim.x=1"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(words, cwd=tmp_path, env=environment(ranks=2), stdout=log, stderr=log)
    lines = set()
    while process.poll() is None:
        lines.add(Path(f"/proc/{process.pid}/cmdline").read_bytes())
        time.sleep(0.02)
    assert any(b"deepspeed.launcher.runner\0--num_gpus\0" in line for line in lines)
    assert process.returncode == 2 and "demo with zero2 on 2 rank(s)" in (tmp_path / "log").read_text()


def test_the_name_on_the_index_is_another_projects():
    """Nothing tells anybody to install `minillm` by that name, and setup.py does not claim it."""
    assert 'name="minillm-stack"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    kinds = {".md", ".py", ".sh", ".yaml", ".yml", ".sbatch", ".ipynb", ".txt", ".html"}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    files = [ROOT / name for name in listed.split("\0") if Path(name).suffix in kinds]
    assert len(files) > 100 or not (ROOT / ".git").exists()
    wrong = re.compile(r"\b(?:pip3?|uv|pipx|poetry)\s+(?:install|add)\b[^\n`]*?[\s\"']minillm(?:[\[=<>~!\"'`\s.,;)]|$)")
    assert wrong.search("pip install -q mini" + "llm") and wrong.search('pip install "mini' + 'llm[tests]"')
    assert not wrong.search("pip install minillm-stack") and not wrong.search("pip install -e .")
    said = [f"{path}: {found[0]}" for path in files if (found := wrong.search(path.read_text(encoding="utf-8")))]
    assert said == []
