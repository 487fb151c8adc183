"""The ranks of a preflight: one that gives orders (rank 0) and others that carry them out, over a key-value store.

Contract: no collective and no GPU in these processes, only torch's TCPStore, polled; so a rank that hangs or dies
cannot hang another. Whatever could hang runs in children (child.py). Every wait has an end: a rank shows that
it lives while it works, and one that has been silent for `silence` seconds is given up and named.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, TCPStore

from minillm.preflight.child import Outcome, run_child
from minillm.utils.errors import UserError

POLL = 0.02
CLOCK_SAMPLES = 5


def open_store(prefix: str, seconds: float, serve: bool = False) -> PrefixStore:
    """A client of the store at MASTER_ADDR:MASTER_PORT (served by rank 0, or by torchrun's agent)."""
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=serve, wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
    )  # fmt: skip
    return PrefixStore(f"preflight/{prefix}", store)


class Ranks:
    """All ranks, seen from one of them; `present` are those that came.

    Args:
        join: seconds within which every rank has to come.
        silence: seconds without a sign of life after which a rank is given up.
    """

    def __init__(self, join: float = 120.0, silence: float = 20.0):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.silence = silence
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            self._store = open_store("ranks", join, serve=self.rank == 0 and not served)
        except DistError as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"rank {self.rank} on {socket.gethostname()} cannot open or reach the ranks' meeting place {place} "
                f"({reason}); see that MASTER_ADDR is rank 0's machine as the others see it, that the port is free "
                f"there and open between the nodes, and that rank 0 was started"
            ) from error
        self._beat_at, self._beats, self._orders = 0.0, 0, 0
        self._store.set(f"come/{self.rank}", socket.gethostname())
        self.hosts: dict[int, str] = {}
        self.present = [self.rank]
        if self.rank == 0:
            self._gather_ranks(join)

    def _gather_ranks(self, join: float) -> None:
        deadline = time.monotonic() + join
        missing = set(range(self.size))
        while missing and time.monotonic() < deadline:
            missing -= {rank for rank in missing if self._store.check([f"come/{rank}"])}
            time.sleep(POLL)
        self.present = [rank for rank in range(self.size) if rank not in missing]
        self.hosts = {rank: self._store.get(f"come/{rank}").decode() for rank in self.present}

    @property
    def missing(self) -> list[int]:
        return [rank for rank in range(self.size) if rank not in self.present]

    def beat(self) -> None:
        """Show that this rank lives; twice a second at most."""
        if time.monotonic() - self._beat_at > 0.5:
            self._beats += 1
            self._store.set(f"beat/{self.rank}", str(self._beats))
            self._beat_at = time.monotonic()

    # rank 0

    def call(
        self, target: str, arguments: dict[str, object], timeout: float, environment: dict[str, str] | None = None
    ) -> dict[int, Outcome]:
        """Run `target` in a child of every present rank at once; what became of each. Rank 0 only."""
        self._orders += 1
        order = {"target": target, "arguments": arguments, "timeout": timeout, "environment": environment or {}}
        self._store.set(f"order/{self._orders}", json.dumps(order))
        outcomes = {0: self._carry_out(self._orders, order)}
        for rank in self.present[1:]:
            answer = self._wait_for(f"answer/{self._orders}/{rank}", rank)
            if answer is None:
                problem = f"rank {rank} on {self.hosts[rank]} has not answered for {self.silence:g} s"
                outcomes[rank] = Outcome(problem=problem, kind="silent")
                self.present.remove(rank)
            else:
                outcomes[rank] = Outcome(**json.loads(answer))
        return outcomes

    def clocks(self) -> dict[int, tuple[float, float]]:
        """(seconds ahead of rank 0, round trip) of every rank that answers; the others are given up. Rank 0 only."""
        self._orders += 1
        self._store.set(f"order/{self._orders}", json.dumps({"clock": True}))
        found = {}
        for rank in self.present[1:]:
            for sample in range(CLOCK_SAMPLES):
                if self._wait_for(f"ask/{self._orders}/{rank}/{sample}", rank) is None:
                    self.present.remove(rank)
                    break
                self._store.set(f"time/{self._orders}/{rank}/{sample}", repr(time.time()))
            else:
                answer = self._wait_for(f"answer/{self._orders}/{rank}", rank)
                if answer is None:
                    self.present.remove(rank)
                else:
                    found[rank] = tuple(json.loads(answer))
        return found

    def dismiss(self) -> None:
        """Let the other ranks go. Rank 0 only."""
        self._orders += 1
        self._store.set(f"order/{self._orders}", json.dumps({"end": True}))
        for rank in self.present[1:]:  # the store lives in this process: wait until they are done with it
            self._wait_for(f"answer/{self._orders}/{rank}", rank)

    # the others

    def serve(self) -> None:
        """Carry out orders until dismissed.

        Raises:
            UserError: rank 0 is silent, or gone.
        """
        try:
            self._serve()
        except DistError as error:
            raise UserError(f"rank 0 is gone, and rank {self.rank} leaves; see what rank 0 printed") from error

    def _serve(self) -> None:
        while True:
            self._orders += 1
            order = self._wait_for(f"order/{self._orders}", 0)
            if order is None:
                raise UserError(f"rank 0 has not answered rank {self.rank} for {self.silence:g} s")
            order = json.loads(order)
            if "end" in order:
                return self._answer(None)
            self._answer(self._measure_clock() if "clock" in order else asdict(self._carry_out(self._orders, order)))

    def _answer(self, value: object) -> None:
        self._store.set(f"answer/{self._orders}/{self.rank}", json.dumps(value))

    def _measure_clock(self) -> tuple[float, float]:
        samples = []
        for sample in range(CLOCK_SAMPLES):
            before = time.time()
            self._store.set(f"ask/{self._orders}/{self.rank}/{sample}", "")
            theirs = self._wait_for(f"time/{self._orders}/{self.rank}/{sample}", 0)
            if theirs is None:
                break
            samples.append((before, float(theirs), time.time()))
        return clock_offset(samples)

    # both

    def _carry_out(self, number: int, order: dict) -> Outcome:
        def others_failed() -> bool:
            self.beat()
            return self._store.check([f"failed/{number}"])

        def tell_others() -> None:
            self._store.set(f"failed/{number}", str(self.rank))

        # The children's process groups meet at the same store, as clients.
        environment = {**order["environment"], "TORCHELASTIC_USE_AGENT_STORE": "True"}
        target, arguments, timeout = order["target"], order["arguments"], order["timeout"]
        outcome = run_child(target, arguments, timeout, environment, others_failed, tell_others)
        if outcome.kind and outcome.kind != "stopped":
            tell_others()
        return outcome

    def _wait_for(self, key: str, rank: int) -> bytes | None:
        """The value `rank` will set; None once that rank has been silent for too long."""
        last, since = b"", time.monotonic()
        while not self._store.check([key]):
            self.beat()
            beat = self._store.get(f"beat/{rank}") if self._store.check([f"beat/{rank}"]) else b""
            if beat != last:
                last, since = beat, time.monotonic()
            elif time.monotonic() - since > self.silence:
                return None
            time.sleep(0.001 if key.startswith(("ask", "time")) else POLL)
        return self._store.get(key)


def clock_offset(samples: list[tuple[float, float, float]]) -> tuple[float, float]:
    """(seconds the asker is ahead, round trip) by the quickest of (asked at, the other's time, answered at).

    Cristian's algorithm (1989): the answer was given in the middle of the round trip, to within half of it.
    """
    if not samples:
        return 0.0, float("inf")
    before, theirs, after = min(samples, key=lambda sample: sample[2] - sample[0])
    return (before + after) / 2 - theirs, after - before
