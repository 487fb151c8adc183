"""Two run folders: how many of their steps have the same loss, to the last bit. Exit code 1 where one differs."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(first: str, second: str) -> int:
    tables = []
    for folder in (first, second):
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        tables.append({row["step"]: row["loss"] for row in map(json.loads, lines) if "loss" in row})
    a, b = tables
    both = sorted(a.keys() & b.keys())
    differing = [step for step in both if a[step] != b[step]]
    largest = max((abs(a[step] - b[step]) for step in both), default=0.0)
    found = {"steps": len(both), "differing": differing[:5], "largest_difference": largest, "last_loss": a[max(a)],
             "mfu": json.loads((Path(first) / "metrics.jsonl").read_text().splitlines()[-1]).get("mfu")}  # fmt: skip
    print("RESULT " + json.dumps(found))
    return int(bool(differing) or not both)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
