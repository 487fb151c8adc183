"""Several runs in one process group.

python -m torch.distributed.run --nproc_per_node N tests/support/worker.py CASES

Starting ranks is most of the time of a distributed test, so one start trains every case, each in its own run folder.
CASES is a JSON list of {"settings": {...}, "deepspeed": {...}}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from minillm.training.build import open_data
from minillm.training.engine import process_group
from minillm.training.loop import train_in_group
from minillm.training.signals import StopRequest
from minillm.utils import distributed
from tests.support.in_process import resolved


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    stop = StopRequest(launched=True)
    with process_group():
        for case in cases:
            stage = case.get("stage", "pretrain")
            start = resolved(case["settings"], case["deepspeed"], stage, distributed.world_size())
            code = train_in_group(start, open_data(start), stop)
            assert code == 0, code


if __name__ == "__main__":
    main()
