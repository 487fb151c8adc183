"""A pool of forked processes for tokenizing: results in order, little waiting, and no process left behind.

Contract: workers inherit `shared` (a tokenizer need not be pickled), use one thread each, ignore Ctrl-C (the parent
decides) and die with the parent, even when it is killed. A worker that dies raises BrokenProcessPool in the parent.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_shared: object = None


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_with_workers() -> object:
    """In a worker: what `worker_pool` was given as `shared`."""
    return _shared


class WorkerPool:
    """See `worker_pool`."""

    def __init__(self, pool: ProcessPoolExecutor, workers: int) -> None:
        self._pool = pool
        self._max_waiting = 2 * workers

    def in_order(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`map` that keeps only a few results waiting, whatever the number of items."""
        waiting: deque = deque()
        for item in items:
            waiting.append(self._pool.submit(function, item))
            if len(waiting) > self._max_waiting:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def worker_pool(workers: int, shared: object) -> Iterator[WorkerPool]:
    """Processes for the length of a with-block; what is still to do when it is left by an exception is dropped."""
    global _shared
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker; also quiets the library's warning about forks
    _shared = shared
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),))
    try:
        yield WorkerPool(pool, workers)
    finally:
        pool.shutdown(cancel_futures=True)
        _shared = None
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
