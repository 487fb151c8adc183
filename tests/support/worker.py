"""Several runs in one process group.

python -m torch.distributed.run --nproc_per_node N tests/support/worker.py CASES

Starting ranks is most of the time of a distributed test, so one start trains every case, each in its own run folder.
CASES is a JSON list of {"settings": {...}, "deepspeed": {...}, "stage": "pretrain"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from minillm.training.engine import process_group
from minillm.training.signals import StopRequest
from tests.support.in_process import train


def main() -> None:
    stop = StopRequest(launched=True)
    with process_group():
        for case in json.loads(Path(sys.argv[1]).read_text()):
            code = train(case["settings"], case["deepspeed"], case.get("stage", "pretrain"), stop)
            assert code == 0, code


if __name__ == "__main__":
    main()
