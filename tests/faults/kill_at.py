"""The real launch/pretrain.py, killed (SIGKILL) at a named place.

    MINILLM_KILL='{"target": ..., "victim": ..., "marker": ...}' deepspeed ... tests/faults/kill_at.py OPTIONS

A test-only wrapper: it puts a trap around one function of the product, or of what the product calls, and then runs the
launch script as it is with the same options. The trap springs at the `nth` call that fits; it writes `marker` first, so
that a test can tell that the place was reached. Keys of MINILLM_KILL (tests/faults/places.py makes them):

    target   "module:name.name"
    when     before the call | after it | items: a generator has given `nth` items | half: half of the bytes are written
    match    a regular expression that is found in one of the call's arguments as text (a descriptor as its path)
    nth      which such call, from 1
    rank     the rank in which it springs, null: whichever comes first
    victim   self | all (the process group: the launcher and every rank)
    delay    seconds before the kill, in which the process's other threads go on
    marker   the file
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import re
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Trap:
    """Counts the calls that fit, and kills at the nth."""

    def __init__(self, spec: dict):
        self.spec = spec
        self._count = itertools.count(1)
        self._lock = threading.Lock()

    def fits(self, arguments: tuple) -> bool:
        """Whether this call is the one."""
        wanted = self.spec["match"]
        if wanted and not any(re.search(wanted, as_text(argument)) for argument in arguments):
            return False
        with self._lock:
            return next(self._count) == self.spec["nth"]

    def spring(self) -> None:
        """Write the marker and kill; does not return."""
        with open(self.spec["marker"], "a") as file:
            file.write(f"rank {os.environ.get('RANK', '0')} process {os.getpid()}\n")
            file.flush()
            os.fsync(file.fileno())
        time.sleep(self.spec["delay"])
        if self.spec["victim"] == "all":
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def around(self, function):
        """`function` with the trap in it."""
        when = self.spec["when"]

        @functools.wraps(function)
        def call(*args, **kwargs):
            if not self.fits((*args, *kwargs.values())):
                return function(*args, **kwargs)
            if when == "before":
                self.spring()
            result = function(*args, **kwargs)
            self.spring()
            return result

        @functools.wraps(function)
        def items(*args, **kwargs):
            for item in function(*args, **kwargs):
                if self.fits(args):
                    self.spring()
                yield item

        @functools.wraps(function)
        def half(path, *args, **kwargs):
            """Of open: half of what is written in one call reaches the file."""
            file = function(path, *args, **kwargs)
            return HalfFile(file, self, path) if re.search(self.spec["match"], as_text(path)) else file

        return {"items": items, "half": half}.get(when, call)


class HalfFile:
    """A file whose nth write is cut in two by a kill."""

    def __init__(self, file, trap: Trap, path: object):
        self._file, self._trap, self._path = file, trap, path

    def write(self, data):
        if self._trap.fits((self._path,)):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._trap.spring()
        return self._file.write(data)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def as_text(argument: object) -> str:
    """What `match` is looked for in."""
    if isinstance(argument, bool) or not isinstance(argument, (int, str, os.PathLike, tuple, list)):
        return str(getattr(argument, "path", ""))
    if isinstance(argument, int):
        try:
            return os.readlink(f"/proc/self/fd/{argument}")
        except OSError:
            return ""
    return str(argument)


def install(spec: dict) -> None:
    """Put the trap around its target, in this process and in those it forks."""
    if spec["rank"] is not None and spec["rank"] != int(os.environ.get("RANK", "0")):
        return
    importlib.import_module("minillm.utils.before_torch").prepare_environment()
    importlib.import_module("minillm.training.loop")  # first: shutil and others look at os as they are imported
    module, path = spec["target"].split(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, name, Trap(spec).around(getattr(owner, name)))


def main() -> None:
    install(json.loads(os.environ["MINILLM_KILL"]))
    script = ROOT / "launch" / "pretrain.py"
    sys.path[0] = str(script.parent)
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
