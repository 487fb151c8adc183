"""Who stands where: every rank says what it is doing, and a rank that waits too long finds out for whom.

Contract: a thread of each rank publishes its place (step and what it does) and a pulse to a store of rank 0's, apart
from the training's own connections, which hang when training hangs. A rank that stands in one place for `timeout`
seconds, or for a minute while another rank has no pulse any more, prints every rank's place and ends this process:
nothing can be saved then, because a collective will never finish. Exit code HUNG (75, EX_TEMPFAIL).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from minillm.utils import distributed

HUNG = 75
PULSE = 1.0  # seconds between two pulses
SILENT = 10.0  # seconds in which a living process has a pulse
PATIENCE = 60.0  # seconds in one place before the others are looked at


class Watch:
    """This rank's place, and the thread that publishes it and looks after the others.

    Opened by every rank together; with one rank there is nobody to wait for, and nothing happens.

    Args:
        timeout: seconds in one place that mean a hang.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._place = ("start", time.monotonic())
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: dist.TCPStore | None = None
        if distributed.world_size() == 1:
            return
        host = os.environ["MASTER_ADDR"]
        options = {"timeout": timedelta(seconds=60), "wait_for_workers": False}
        if distributed.rank() == 0:
            self._store = dist.TCPStore(host, 0, is_master=True, **options)
        port = distributed.broadcast_object(self._store.port if self._store else None)
        if self._store is None:
            self._store = dist.TCPStore(host, port, is_master=False, **options)
        self._publish(0)
        distributed.barrier()
        self._thread = threading.Thread(target=self._run, name="minillm-watch", daemon=True)
        self._thread.start()

    def at(self, place: str) -> None:
        """From now on this rank is here; the clock starts again."""
        self._place = (place, time.monotonic())

    def close(self) -> None:
        """Every rank together, when nobody will wait for anybody any more."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def explain(self) -> str | None:
        """After a failed collective: which rank is gone and where it stood, None where all have a pulse."""
        if self._store is None:
            return None
        try:
            silent = self._silent(self._read(), wait=SILENT)
        except Exception:  # of the store's own kinds
            return "rank 0 is gone" if distributed.rank() else None
        return "; ".join(f"{who} is gone, last seen at {where}" for who, where in silent) or None

    def _run(self) -> None:
        pulse = 0
        while not self._closed.wait(PULSE):
            pulse += 1
            place, since = self._place
            waited = time.monotonic() - since
            try:
                self._publish(pulse)
                if waited > PATIENCE or waited > self.timeout:
                    self._look(waited)
            except Exception as error:  # the store's: rank 0's process, which holds it, is gone; at the end it may
                if waited > min(PATIENCE, self.timeout):
                    self._end(f"rank 0 is gone ({type(error).__name__}: {error})")

    def _publish(self, pulse: int) -> None:
        place, since = self._place
        told = {"pulse": pulse, "place": place, "waited": round(time.monotonic() - since, 1),
                "who": f"rank {distributed.rank()} ({platform.node()}, process {os.getpid()})"}  # fmt: skip
        self._store.set(f"watch/{distributed.rank()}", json.dumps(told))

    def _read(self) -> list[dict]:
        return [json.loads(self._store.get(f"watch/{rank}")) for rank in range(distributed.world_size())]

    def _silent(self, before: list[dict], wait: float) -> list[tuple[str, str]]:
        """(who, where) of the ranks whose pulse does not move while we wait."""
        own = distributed.rank()
        deadline = time.monotonic() + wait
        while True:
            now = self._read()
            still = [rank for rank, told in enumerate(now) if rank != own and told["pulse"] == before[rank]["pulse"]]
            if not still or time.monotonic() > deadline:
                return [(now[rank]["who"], now[rank]["place"]) for rank in still]
            time.sleep(PULSE)

    def _look(self, waited: float) -> None:
        silent = self._silent(self._read(), wait=SILENT)
        if silent:
            lost = "; ".join(f"{who}, last seen at {where}" for who, where in silent)
            self._end(f"no sign of life from {lost}")
        elif waited > self.timeout:
            longest = max(self._read(), key=lambda told: told["waited"])
            self._end(
                f"nothing has moved for {waited:.0f} s (faults.timeout = {self.timeout:g}); longest stands "
                f"{longest['who']}: {longest['place']}"
            )

    def _end(self, problem: str) -> None:
        try:
            places = [f"  {told['who']}: {told['place']}, for {told['waited']:.0f} s" for told in self._read()]
        except Exception:
            places = []
        headline = f"error (rank {distributed.rank()}): {problem}; this rank leaves, the last checkpoint stays"
        print("\n".join([headline, *places]), file=sys.stderr, flush=True)
        os._exit(HUNG)
