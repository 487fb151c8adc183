"""`import minillm` and the chat's `--help` answer at once: imports are asserted, since clocks differ by machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "deepspeed", "tokenizers", "numpy", "yaml", "pydantic", "webdataset"}


def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has beyond an idle one's, after running `code`."""
    report = (
        f"import sys; before = set(sys.modules)\n{code}\n"
        "new = sorted(set(sys.modules) - before); import json; print(json.dumps(new))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", report], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_importing_minillm_imports_nothing_else():
    assert modules_after("import minillm; minillm.load; minillm.__version__") <= {"minillm", "__future__"}


@pytest.mark.parametrize("module", ["minillm.chat", "minillm.export"])
def test_help_imports_nothing_heavy(module):
    code = (
        f"import runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        f"except SystemExit as end: assert end.code == 0"
    )
    modules = modules_after(code)
    assert not {name.split(".")[0] for name in modules} & HEAVY
    assert len(modules) < 100


def test_a_rank_starts_without_what_draws_pictures():
    assert "matplotlib" not in modules_after("import minillm.training.loop")
