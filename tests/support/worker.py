"""Several runs in one process group.

python -m torch.distributed.run --nproc_per_node N tests/support/worker.py CASES

Starting ranks is most of the time of a distributed test, so one start trains every case, each in its own run folder.
CASES is a JSON list of {"settings": {...}, "deepspeed": {...}}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from minillm.settings.deepspeed_json import resolve_deepspeed_config
from minillm.settings.run import load_run_config, raise_problems
from minillm.training.build import open_data
from minillm.training.engine import process_group
from minillm.training.loop import train_in_group
from minillm.training.signals import StopRequest
from minillm.utils import distributed
from tests.support.launching import ROOT, words


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    stop = StopRequest(launched=True)
    with process_group():
        for case in cases:
            stage = case.get("stage", "pretrain")
            config = "demo" if stage == "pretrain" else "sft-demo"
            settings = words(case["settings"])
            run, problems = load_run_config(config, settings, stage=stage, configs_dir=ROOT / "launch" / "configs")
            resolved, more = resolve_deepspeed_config(case["deepspeed"], run, distributed.world_size(), "the case")
            raise_problems(problems + more, "of the case")
            code = train_in_group(run, resolved, open_data(run), stop)
            assert code == 0, code


if __name__ == "__main__":
    main()
