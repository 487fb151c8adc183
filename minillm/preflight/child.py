"""A function run in a process of its own that is watched from outside, so that nothing it does can hang the caller.

Contract: the function `module:name` is called as f(report, **arguments) and returns what JSON can hold. It says where
it stands with `report.stage(...)`; one stage that lasts longer than the timeout gets the child killed, and the outcome
names the stage. A child whose parent is gone leaves by itself.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from minillm.utils.errors import UserError

STARTING = "starting a process"
ROOT = Path(__file__).resolve().parents[2]
SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_TO_START = 300.0  # Python and torch, from a slow network file system
GRACE = 10.0  # seconds a child gets to fail by itself after another rank's failed
LINGER = 3.0  # seconds a hung child is left alone: its end would break the calls of others about to name where they are


@dataclass
class Outcome:
    """How a child ended.

    Attributes:
        result: what the function returned; None where it did not return.
        stage: the last stage it reported.
        problem: None, or one sentence.
        kind: "" (returned), "timeout", "error" (it raised), "died", "stopped" (because of another rank) or "silent"
            (the rank itself did not answer).
        mendable: it raised a UserError, whose message names the fix.
        notes: what it left with `report.note` before it ended, by name.
        log: the end of what it printed, where it did not return.
    """

    result: object = None
    stage: str = STARTING
    problem: str | None = None
    kind: str = ""
    mendable: bool = False
    notes: dict[str, object] = field(default_factory=dict)
    log: str = ""
    seconds: float = 0.0


class Report:
    """The child's side: one JSON object a line, flushed."""

    def __init__(self, path: str):
        self._file = open(path, "a", encoding="utf-8")

    def _write(self, **entry: object) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def stage(self, name: str, at_least: float = 0.0) -> None:
        """Where the child stands now; the timeout starts again, and lasts `at_least` so many seconds."""
        self._write(stage=name, at_least=at_least)

    def note(self, name: str, value: object) -> None:
        """Something found that is worth having even if the rest fails."""
        self._write(note=[name, value])

    def result(self, value: object) -> None:
        self._write(result=value)

    def error(self, error: BaseException) -> None:
        text = str(error).strip() or type(error).__name__
        mendable = isinstance(error, UserError)
        self._write(error=text if mendable else f"{type(error).__name__}: {text}", mendable=mendable)


def main(spec_path: str) -> None:
    """The child. It leaves by os._exit: communication libraries may hang or abort on the way out."""
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    sys.path[:] = spec["path"]
    threading.Thread(target=_leave_with_parent, args=(spec["parent"],), daemon=True).start()
    report = Report(spec["report"])
    code = 1
    try:
        report.result(function_of(spec["target"])(report, **spec["arguments"]))
        code = 0
    except BaseException as error:  # whatever it is, the parent shows it as this check's failure
        if not isinstance(error, UserError):
            traceback.print_exc()
        report.error(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def function_of(target: str) -> Callable[..., object]:
    """The function that `module:name` names."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def _leave_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def run_child(
    target: str,
    arguments: dict[str, object],
    timeout: float,
    environment: dict[str, str] | None = None,
    others_failed: Callable[[], bool] = lambda: False,
    on_timeout: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run `target` in a child process.

    Args:
        timeout: seconds one stage may last.
        environment: variables set for the child only.
        others_failed: asked all the time; once true the child has GRACE seconds left.
        on_timeout: called as soon as the child is found to hang, LINGER seconds before it is killed.
    """
    with tempfile.TemporaryDirectory(prefix="minillm-preflight-", ignore_cleanup_errors=True) as folder:
        report, log = Path(folder, "report.jsonl"), Path(folder, "log.txt")
        report.touch()
        path = [str(ROOT), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
        spec = {"target": target, "arguments": arguments, "path": path, "parent": os.getpid(), "report": str(report)}
        Path(folder, "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        # -c and not -m or a script: neither the current folder nor this one may shadow a standard module
        code = f"import sys; sys.path[0] = {str(ROOT)!r}; from {__name__} import main; main(sys.argv[1])"
        words = [sys.executable, "-c", code, str(Path(folder, "spec.json"))]
        start = time.monotonic()
        with open(log, "wb") as output:
            process = subprocess.Popen(
                words, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            try:
                outcome = _watch(process, report, timeout, others_failed)
                if outcome.kind == "timeout":
                    on_timeout()
                    time.sleep(LINGER)
            finally:
                _kill(process)
        outcome.seconds = time.monotonic() - start
        if outcome.kind:
            outcome.log = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
            if outcome.kind == "died":
                lines = [line for line in outcome.log.splitlines() if line.strip()]
                outcome.problem = f"{outcome.problem}{': ' + lines[-1] if lines else ''}"
        return outcome


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: a dead network file system
            process.wait(5)


def _watch(
    process: subprocess.Popen, report: Path, timeout: float, others_failed: Callable[[], bool]
) -> Outcome:
    outcome, failed_at, at_least = Outcome(), None, SECONDS_TO_START
    since = time.monotonic()
    with open(report, encoding="utf-8") as lines:
        while True:
            ended = process.poll()
            for entry in _entries(lines):
                since, at_least = time.monotonic(), entry.get("at_least", 0.0)
                _take_in(entry, outcome)
            if ended is not None:
                if outcome.problem is None and ended != 0:
                    how = f"signal {-ended}" if ended < 0 else f"code {ended}"
                    outcome.problem, outcome.kind = f"the process ended with {how} in: {outcome.stage}", "died"
                return outcome
            now = time.monotonic()
            limit = max(timeout, at_least)
            if now - since > limit:
                outcome.problem, outcome.kind = f"no end of it within {limit:g} s: {outcome.stage}", "timeout"
                return outcome
            failed_at = now if failed_at is None and others_failed() else failed_at
            if failed_at is not None and now - failed_at > GRACE:
                outcome.problem, outcome.kind = f"stopped with another rank in: {outcome.stage}", "stopped"
                return outcome
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _entries(lines: TextIO) -> Iterator[dict]:
    """The whole lines that have come."""
    while True:
        place = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(place)
            return
        yield json.loads(line)


def _take_in(entry: dict, outcome: Outcome) -> None:
    if "stage" in entry:
        outcome.stage = entry["stage"]
    elif "note" in entry:
        outcome.notes[entry["note"][0]] = entry["note"][1]
    elif "result" in entry:
        outcome.result = entry["result"]
    elif "error" in entry:
        outcome.problem, outcome.kind, outcome.mendable = entry["error"], "error", entry["mendable"]
