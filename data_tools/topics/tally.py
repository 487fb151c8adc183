"""Counts of what was read and why some of it was left out, as data_tools.workshop.merge_results adds it up."""

from __future__ import annotations

from data_tools.records import Rejected
from data_tools.workshop import EXAMPLES


class Tally:
    """The counts of one unit."""

    def __init__(self, bytes_in: int) -> None:
        self.result: dict = {
            "records_in": 0, "records_out": 0, "bytes_in": bytes_in, "bytes_out": 0, "rejected": {}, "examples": {},
        }  # fmt: skip

    def reject(self, rejected: Rejected) -> None:
        """One more record that is left out."""
        counts, examples = self.result["rejected"], self.result["examples"]
        counts[rejected.reason] = counts.get(rejected.reason, 0) + 1
        held = examples.setdefault(rejected.reason, [])
        if len(held) < EXAMPLES:
            readable = [part.encode(errors="replace").decode() for part in (rejected.detail, rejected.text[:200])]
            held.append({"id": rejected.id, "detail": readable[0], "text": readable[1]})
