"""Units of input in parallel processes: progress, going on after a kill, one writer in a folder.

Contract: `work_folder` locks OUT/.work and refuses another command in the same OUT; `run_units` calls a function for
every unit and keeps its result in a file, written after the function returned, so that the same command goes on with
the units that are missing. The results come in the units' order, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from data_tools.records import Unit
from minillm.utils.errors import UserError
from minillm.utils.files import file_lock, read_json, sync_file, write_json
from minillm.utils.logging import say

UnitFunction = Callable[..., dict]


def identity(units: Sequence[Unit], side_inputs: Sequence[Path] = ()) -> str:
    """A digest of what is read: names, sizes and times of the files, and how they are cut."""
    digest = hashlib.sha256()
    files = dict.fromkeys([span.path for unit in units for span in unit.spans] + [str(path) for path in side_inputs])
    for path in files:
        found = os.stat(path) if os.path.exists(path) else None
        digest.update(f"{path}\0{found and (found.st_size, found.st_mtime_ns)}\0".encode())
    for unit in units:
        digest.update(repr([(span.path, span.start, span.stop) for span in unit.spans]).encode())
    return digest.hexdigest()


@contextmanager
def work_folder(out: Path, inputs: Sequence[str], command: dict[str, object]) -> Iterator[Path]:
    """OUT/.work, locked; `command` is what this work is, and what a continued run must have been.

    Raises:
        UserError: OUT holds something else, another process works in it, or the input lies inside it or around it.
    """
    for path in inputs:
        here, there = out.resolve(), Path(path).resolve()
        if here == there or Path(path).is_dir() and here.is_relative_to(there) or there.is_relative_to(here):
            raise UserError(f"--out {out} and the input {path} lie in each other: name another folder")
    work = out / ".work"
    known = work / "command.json"
    if out.exists() and not known.is_file() and (not out.is_dir() or any(p.name != ".work" for p in out.iterdir())):
        raise UserError(f"{out} exists and holds other files: remove it or choose another --out")
    work.mkdir(parents=True, exist_ok=True)

    def busy() -> None:
        raise UserError(f"another process works in {out}: wait for it, or choose another --out")

    with file_lock(work / "lock", busy=busy):
        if known.is_file():
            before, now = read_json(known), json.loads(json.dumps(command))
            differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
            if differing:
                raise UserError(
                    f"{out} holds the work of another command (different: {', '.join(differing)}): remove it or choose "
                    "another --out"
                )
        else:
            write_json(known, command)
        yield work


def run_units(
    function: UnitFunction,
    units: Sequence[Unit],
    arguments: dict[str, object],
    work: Path,
    *,
    workers: int | None = None,
    label: str,
) -> list[dict]:
    """Call function(unit, arguments, work, progress) -> dict for every unit, in processes; the results in order.

    A result is kept as WORK/LABEL-00007.json, after the function returned; units that have one are not done again. Side
    files go to `work` under names of the function's choice, renamed when whole, so that they can be written twice.

    Args:
        function: at the top of a module; progress(bytes read) feeds the bar.
        arguments: what JSON can hold.

    Raises:
        UserError: of the function; a process that was killed.
    """
    results = {unit.number: work / f"{label}-{unit.number:05d}.json" for unit in units}
    todo = [unit for unit in units if not results[unit.number].is_file()]
    workers = min(workers or len(os.sched_getaffinity(0)), max(1, len(todo)))
    total = sum(unit.size for unit in units)
    bar = _Bar(label, total, total - sum(unit.size for unit in todo))
    if len(todo) < len(units):
        say(f"{label}: going on, {len(units) - len(todo)} of {len(units)} parts are done")
    if todo and workers == 1:
        with bar:
            for unit in todo:
                _one(function, unit, arguments, work, results[unit.number], bar.add)
    elif todo:
        _in_processes(function, todo, arguments, work, results, workers, bar)
    return [read_json(results[unit.number]) for unit in units]


def _one(
    function: UnitFunction, unit: Unit, arguments: dict, work: Path, result: Path, progress: Callable[[int], None]
) -> None:
    found = function(unit, arguments, work, progress)
    sync_file(work)
    write_json(result, found)


def _in_processes(
    function: UnitFunction, todo: list[Unit], arguments: dict, work: Path, results: dict, workers: int, bar: _Bar
) -> None:
    # spawn: a forked child would inherit the threads' locks of whatever was imported
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with bar, ProcessPoolExecutor(workers, context, _begin, (counter, os.getpid(), list(sys.path))) as pool:
        waiting = {
            pool.submit(_in_process, function, unit, arguments, str(work), str(results[unit.number])) for unit in todo
        }
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.set(counter.value)
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise UserError(
                "a process was killed, most likely for lack of memory: the same command goes on from here; --workers "
                "with a smaller number needs less"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def _begin(counter, parent: int, path: list[str]) -> None:
    global _counter
    _counter = counter
    sys.path[:] = path
    threading.Thread(target=_leave_with_parent, args=(parent,), daemon=True).start()


def _leave_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _in_process(function: UnitFunction, unit: Unit, arguments: dict, work: str, result: str) -> None:
    def progress(size: int) -> None:
        with _counter.get_lock():
            _counter.value += size

    _one(function, unit, arguments, Path(work), Path(result), progress)


class _Bar:
    """Bytes read of all, their rate and the time left; nothing where stderr is not a terminal."""

    def __init__(self, label: str, total: int, done: int):
        self._label, self._total, self._done = label, total, done

    def __enter__(self) -> _Bar:
        from tqdm import tqdm

        self._bar = tqdm(total=self._total, initial=self._done, desc=self._label, unit="B", unit_scale=True,
                         disable=None, file=sys.stderr)  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, size: int) -> None:
        self._bar.update(size)

    def set(self, size: int) -> None:
        self._bar.update(self._done + size - self._bar.n)
