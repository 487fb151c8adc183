"""The preflight with a peer that hangs: rank 1 sleeps as the first pair is measured. And a child that dies.

RANK=... python tests/support/preflight_hang.py [the preflight's options]
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]


def probe(report, **arguments) -> dict[str, object]:
    """In the children: the real probe, but that rank 1 never makes its call."""
    from minillm.preflight import links as preflight_links
    from minillm.utils import distributed

    measure = preflight_links.pair_speed

    def sleep(*pair):
        report.stage("asleep")
        time.sleep(300)

    preflight_links.pair_speed = sleep if distributed.rank() == 1 else measure
    return preflight_links.probe(report, **arguments)


def die(report) -> None:
    """In a child: killed in the middle."""
    report.note("found", 7)
    report.stage("about to die")
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    import preflight as command

    from minillm.preflight import checks

    checks.PROBE = "preflight_hang:probe"
    sys.exit(command.main())
