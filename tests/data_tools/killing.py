"""A command that is killed again and again until it comes through."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

from tests.support.launching import ROOT, environment

_KILLED = """
import importlib, os, sys
left, module = int(sys.argv.pop(1)), sys.argv.pop(1)
replace = os.replace
def replace_or_die(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
    replace(*arguments)
os.replace = replace_or_die
importlib.import_module(module).main(sys.argv[1:])
"""


def killed_runs(module: str, arguments: list[str], every: int, limit: int = 30) -> Iterator[int]:
    """Run MODULE.main in new processes, each killed by SIGKILL when its `every`-th file is about to get its name.

    Yields:
        The number of each kill, until the command ends by itself.
    """
    for number in range(limit):
        line = [sys.executable, "-c", _KILLED, str(every), module, *arguments]
        done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True)
        if done.returncode == 0:
            return
        assert done.returncode == -signal.SIGKILL, done.stderr
        yield number
    raise AssertionError(f"still not through after {limit} kills")
