"""What launch/pretrain.py says of a machine that lacks something, before torch is imported."""

from __future__ import annotations

import subprocess
import sys

from tests.support.launching import ROOT, command, environment


def test_compiling_without_a_compiler_is_one_line(tmp_path):
    settings = {"train.compile": True, "run_root": str(tmp_path)}
    words = command("pretrain.py", ROOT / "ds_configs" / "zero2.json", settings)
    done = subprocess.run(
        words, cwd=tmp_path, env={**environment(), "PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "torch.compile needs a C++ compiler" in done.stderr
    assert "1 problem" in done.stderr and "Traceback" not in done.stderr


def test_another_clone_on_pythonpath_is_passed_over(tmp_path):
    (tmp_path / "minillm").mkdir()
    (tmp_path / "minillm" / "__init__.py").write_text("raise SystemExit('the other one')\n")
    words = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--deepspeed",
             str(ROOT / "ds_configs" / "zero2.json"), "--dry-run"]  # fmt: skip
    path = f"{tmp_path}:{ROOT}"
    done = subprocess.run(words, env={**environment(), "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
