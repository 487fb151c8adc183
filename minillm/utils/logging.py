"""Lines for people: `say` for what happens, `warn` for what needs a look. Rank 0 speaks; the others are silent.

Contract: stdlib only, flushed at once, one line a call. `[minillm]` prefixes every line so that it can be told from
DeepSpeed's own output in a log file.
"""

from __future__ import annotations

import os
import sys


def is_main_process() -> bool:
    """True on global rank 0 and wherever no launcher set RANK."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Print one line on rank 0."""
    if is_main_process():
        print(f"[minillm] {message}", flush=True)


def warn(message: str) -> None:
    """Print one warning line on stderr, on whichever rank meets it."""
    rank = os.environ.get("RANK")
    where = f" (rank {rank})" if rank not in (None, "0") else ""
    print(f"[minillm] warning{where}: {message}", file=sys.stderr, flush=True)
