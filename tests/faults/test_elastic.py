"""8 -> 4 -> 2 -> 1 ranks and back: one run folder, each time another number of ranks and another ZeRO stage.

Contract: the command changes in the number of ranks, the JSON, and train.max_steps, which stands for the end of an
allocation; micro-batch, accumulation and who runs the experts are the product's to settle. Against one uninterrupted
run of one rank: the same number of target tokens at every step (the batches are the same), and losses within the
tolerance of DESIGN section 9 (fp32: 1e-5 relative).
"""

from __future__ import annotations

import json

import pytest

from tests.faults.kills import EXPERTS
from tests.support.launching import ROOT, command, losses, metrics, run

pytestmark = pytest.mark.faults
FP32 = {"bf16": {"enabled": False}}
EACH = 2  # steps of one allocation
DENSE = [(8, "zero2"), (4, "zero3"), (2, "zero1"), (1, "zero2"), (2, "zero3"), (4, "zero1"), (8, "zero2")]
SPARSE = [(8, "moe_zero2"), (4, "moe_zero3"), (2, "zero1"), (1, "zero2"), (2, "moe_zero3"), (4, "moe_zero2"),
          (8, "zero1")]  # fmt: skip


def json_in_fp32(name: str, folder) -> str:
    """A shipped JSON with bf16 off."""
    values = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values | FP32))
    return str(path)


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_any_number_of_ranks_goes_on(experts, tiny_settings, tmp_path, fault_table):
    config = "moe-demo" if experts else "demo"
    path = SPARSE if experts else DENSE
    steps = EACH * len(path)
    settings = {
        **tiny_settings, **(EXPERTS | {"model.num_experts": 8} if experts else {}), "run_root": str(tmp_path),
        "train.train_batch_size": 16,
        "train.train_micro_batch_size_per_gpu": "auto", "optim.lr_schedule": "constant", "optim.warmup_ratio": 0,
        "validation.every": 0, "checkpoint.every": EACH, "checkpoint.keep": 99,
    }  # fmt: skip
    straight = {**settings, "run_name": "straight", "train.max_steps": steps}
    if experts:
        settings |= {"model.expert_parallel_size": "auto"}
        straight |= {"model.expert_parallel_size": 1, "model.moe_backend": "torch"}
    run(command("pretrain.py", json_in_fp32("zero1", tmp_path), straight, 1, config))
    expected = losses(tmp_path / "straight")
    for number, (ranks, json_name) in enumerate(path, 1):
        moved = {**settings, "run_name": "moved", "train.max_steps": EACH * number}
        done = run(command("pretrain.py", json_in_fp32(json_name, tmp_path), moved, ranks, config))
        if number > 1:
            assert f"resumed from step {EACH * (number - 1)}" in done.stdout, done.stdout
        found = losses(tmp_path / "moved")
        assert found == pytest.approx(expected[: EACH * number], rel=1e-5), f"{ranks} ranks, {json_name}"
        backend = next((line for line in done.stdout.splitlines() if "experts: " in line), "")
        print(ranks, json_name, backend, [abs(a / b - 1) for a, b in zip(found, expected)][-EACH:])
    tokens, other = ([r["tokens"] for r in metrics(tmp_path / name)] for name in ("moved", "straight"))
    assert tokens == other
    worst = max(abs(one / two - 1) for one, two in zip(losses(tmp_path / "moved"), expected))
    route = " -> ".join(f"{ranks} ({name.removeprefix('moe_')})" for ranks, name in path)
    fault_table.row(
        "elastic", f"{'experts' if experts else 'dense'}: {route} ranks, {EACH} steps each",
        f"the same batches; losses within {worst:.0e} of an uninterrupted rank's; nothing but the command was needed",
    )  # fmt: skip
