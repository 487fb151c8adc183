"""Preflight: the real command on two ranks, and what it says of machines and runs that are not ready."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minillm.preflight import machine
from minillm.preflight.checks import Plan, presence_row, run_rows
from minillm.preflight.child import Outcome, run_child
from minillm.preflight.disk import disk_row
from minillm.preflight.ranks import Ranks, clock_offset
from minillm.preflight.rows import Row, format_table, merge, summary
from minillm.preflight.verdicts import (
    compare_versions,
    judge_clocks,
    judge_links,
    judge_pairs,
    judge_peer_access,
    judge_trial,
)
from minillm.settings.deepspeed_json import resolve_deepspeed_config
from minillm.settings.reading import load_run_config
from tests.support.launching import ROOT, environment, run, words

BF16_ZERO2 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
MIB = 2**20


def launcher(script: Path, port: int) -> list[str]:
    start = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"]
    return [*start, str(port + os.getpid() % 1000), str(script)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parameters(settings: dict) -> int:
    """Of the tiny model, counted by hand: two layers of attention and SwiGLU, norms, and a tied embedding."""
    width, ffn, heads, groups, head = (settings[f"model.{name}"] for name in (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"))  # fmt: skip
    attention = 2 * width * heads * head + 2 * width * groups * head
    return settings["model.vocab_size"] * width + 2 * (attention + 3 * width * ffn + 2 * width) + width


def test_two_ranks_are_ready(tiny_settings, tmp_path):
    """Every row of the issue, on two real ranks; nothing is left behind."""
    settings = {**tiny_settings, "run_root": str(tmp_path / "runs"), "log.wandb": "offline"}
    options = ["--json", "--timeout", "60", "--deepspeed", str(ROOT / "ds_configs" / "zero2.json"), "--config", "demo"]
    done = run([*launcher(ROOT / "launch" / "preflight.py", 28100), *options, *words(settings)], cwd=tmp_path)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
    answer = json.loads(line)
    rows = {row["name"]: Row(**row) for row in answer["rows"]}
    table = format_table(list(rows.values()))
    assert answer["verdict"] != "fail" and answer["ranks"] == 2, table
    assert list(rows) == [
        "processes", "clocks", "device", "CUDA", "disk run_root", "disk cache_dir", "/dev/shm", "memory", "open files",
        "versions", "environment", "all-reduce", "pairs", "data", "trial", "checkpoint",
    ]  # fmt: skip
    assert "2 of 2 on 1 machine" in rows["processes"].found
    assert "the same on 2 ranks" in rows["versions"].found
    assert abs(rows["clocks"].values["seconds_ahead"]["1"]) < 0.5  # one machine has one clock
    assert list(rows["pairs"].values["pairs"]) == ["0-1"] and rows["pairs"].values["pairs"]["0-1"]["gbps"] > 0
    assert rows["data"].values["train"]["train"]["documents"] == 400
    assert len(rows["trial"].values["losses"]) == 2 and rows["trial"].values["seconds_a_step"] > 0
    assert abs(rows["trial"].values["losses"][0] - 5.95) < 0.5  # log of 384 tokens, before anything is learnt
    expected = 12 * parameters(tiny_settings)
    assert rows["disk run_root"].values["checkpoint_bytes"] == expected
    assert rows["disk run_root"].values["needed"] == 11 * expected  # keep 9, the best, the one being written
    assert expected < rows["checkpoint"].values["bytes"] < expected + 200_000  # and tokenizer, config, counters
    assert not (tmp_path / "runs").exists() and not list(tmp_path.rglob("wandb"))


def test_a_peer_that_hangs_is_timed_out_and_named(tmp_path):
    """Two processes with the variables a launcher (or srun) sets; rank 1 never makes its call."""
    common = {**environment(ranks=2), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(ROOT / "tests" / "support" / "preflight_hang.py"), "--timeout", "4"]
    first, second = (
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                         env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    )  # fmt: skip
    table, _ = first.communicate(timeout=120)
    assert first.returncode == 1, table  # the only one whose code is not 0: a launcher would end rank 0 at another's
    assert second.communicate(timeout=60) == ("", None) and second.returncode == 0
    assert "communication   fail" in table and "not ready: communication" in table
    lines = [line.strip() for line in table.splitlines()]
    stood = "rank 0: no end of it within 4 s: pair 0-1:"
    calls = {f"{stood} send of 4 KiB to rank 1", f"{stood} recv of 4 KiB from rank 1"}
    assert calls & set(lines), table  # a small message may have left before anybody takes it
    assert "rank 1: no end of it within 4 s: asleep" in lines
    assert "GLOO_SOCKET_IFNAME" in table
    assert not list(tmp_path.iterdir())


@pytest.fixture
def alone(monkeypatch):
    """This process as the only rank of a preflight."""
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**variables, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    return Ranks()


def plan_of(settings: dict) -> Plan:
    config, problems = load_run_config("demo", words(settings), stage="pretrain", configs_dir=ROOT / "launch/configs")
    resolved, more = resolve_deepspeed_config(BF16_ZERO2, config, 1, "the test's JSON")
    assert not problems + more
    return Plan(config, resolved, parameters(settings))


@pytest.mark.slow
def test_a_trial_that_fails_says_why(alone, tiny_settings, tmp_path):
    settings = {**tiny_settings, "run_root": str(tmp_path / "runs"), "optim.learning_rate": 1e30}
    data, trial = run_rows(alone, plan_of(settings), 120, connected=True, rows=[])
    assert data.verdict == "ok"
    assert trial.verdict == "fail" and "step 2: the loss is" in trial.found and "not finite" in trial.found
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_broken_shard_fails_the_data(alone, tiny_data, tiny_settings, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(tiny_data["data.train"], shards)
    shard = next(shards.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    settings = {**tiny_settings, "run_root": str(tmp_path / "runs"), "data.train": str(shards),
                "data.cache_dir": str(tmp_path / "cache")}  # fmt: skip
    data, trial = run_rows(alone, plan_of(settings), 120, connected=True, rows=[])
    assert data.verdict == "fail" and shard.name in data.found and data.fix
    assert "not tried" in trial.found


def test_no_trial_where_a_row_before_it_failed(alone, tiny_settings, tmp_path):
    failed = [Row("disk run_root", "fail", "full", "make room")]
    (row,) = run_rows(alone, plan_of(tiny_settings), 60, connected=True, rows=failed)
    assert (row.name, row.verdict) == ("trial", "warn") and row.fix == "mend `disk run_root` first"
    (row,) = run_rows(alone, plan_of(tiny_settings), 60, connected=False, rows=[])
    assert "cannot communicate" in row.found


def test_a_rank_that_does_not_come_is_named(monkeypatch, alone):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    row = presence_row(Ranks(join=1.0))
    assert row.verdict == "fail" and "1 of 2" in row.found and "rank 1 did not reach" in row.fix


def test_a_rank_that_stops_answering_is_given_up(monkeypatch, alone):
    """Rank 1's own process is stopped (SIGSTOP) after it came."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    code = "from minillm.preflight.ranks import Ranks; Ranks().serve()"
    other = subprocess.Popen([sys.executable, "-c", code], env={**environment(), "RANK": "1", "WORLD_SIZE": "2",
                             "MASTER_PORT": os.environ["MASTER_PORT"]}, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        ranks = Ranks(join=60, silence=2)
        assert ranks.missing == []
        assert set(ranks.clocks()) == {1}
        other.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        row = judge_clocks(ranks.clocks(), [1])
        assert ranks.missing == [1]
        assert time.monotonic() - start < 20
        assert row.verdict == "fail" and "no answer from rank 1" in row.found
    finally:
        other.kill()
        other.wait()


def test_a_child_that_dies_is_told_with_its_signal():
    outcome = run_child("os:abort", {}, timeout=30)
    assert outcome.kind == "error" and "TypeError" in outcome.problem  # abort takes no report
    outcome = run_child("tests.support.preflight_hang:die", {}, timeout=60)
    assert outcome.kind == "died" and "signal 9 in: about to die" in outcome.problem
    assert outcome.notes == {"found": 7}


def test_run_root_that_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    row = disk_row("disk run_root", tmp_path / "runs", None)
    assert row.verdict == "fail" and "a file" in row.fix
    row = disk_row("disk run_root", tmp_path / "runs" / "inside", None)
    assert row.verdict == "fail" and "a file" in row.fix


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of 8 MiB that can be filled and remounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting needs root: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_disks_that_are_too_small_full_or_read_only(tmpfs):
    row = disk_row("disk", tmpfs / "runs", (MIB, 2, 0))
    assert row.verdict == "ok" and "(tmpfs)" in row.found and "locks work" in row.found
    assert not list(tmpfs.iterdir())
    row = disk_row("disk", tmpfs / "runs", (3 * MIB, 2, 0))  # 12 MiB are needed
    assert row.verdict == "fail" and row.fix.startswith("free 4.0 MiB, lower checkpoint.keep")
    assert disk_row("disk", tmpfs / "runs", (3 * MIB, 2, 8 * MIB)).verdict == "ok"  # resumed: they are there already
    (tmpfs / "filler").write_bytes(bytes(8 * MIB))
    row = disk_row("disk", tmpfs / "runs", None)
    assert row.verdict == "fail" and "No space left" in row.found
    (tmpfs / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,ro", tmpfs], check=True)
    row = disk_row("disk", tmpfs / "runs", None)
    assert row.verdict == "fail" and "read-only" in row.fix


VERSIONS = {"host": "one", "python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0",
            "NCCL": "2.28.9", "minillm commit": "abc", "minillm source": "def"}  # fmt: skip


def test_a_version_that_is_not_admitted_fails_with_the_command_that_mends_it():
    problem = "transformers 6.1.0 is too new (admitted >=5.17,<6, tested 5.24.0). Mend it: python -m pip install -e ."
    row = compare_versions({0: VERSIONS, 1: {**VERSIONS, "problem": problem}})
    assert row.verdict == "fail" and row.fix == "Mend it: python -m pip install -e ."
    assert "transformers 6.1.0 is too new (admitted >=5.17,<6, tested 5.24.0)" in row.found


def test_versions_that_differ_are_named_with_rank_and_host():
    assert compare_versions({0: VERSIONS, 1: {**VERSIONS, "host": "two"}}).verdict == "ok"
    other = {**VERSIONS, "host": "two", "torch": "2.12.0", "NCCL": "2.27.0"}
    row = compare_versions({0: VERSIONS, 1: VERSIONS, 2: other, 3: other})
    assert row.verdict == "fail"
    assert row.found.splitlines() == [
        "torch: 2.13.0 on ranks 0, 1 (one); 2.12.0 on ranks 2, 3 (two)",
        "NCCL: 2.28.9 on ranks 0, 1 (one); 2.27.0 on ranks 2, 3 (two)",
    ]


def test_the_row_of_the_driver_needs_no_private_name_of_torch(monkeypatch):
    """torch 2.11 with CUDA has no torch._C._cuda_getDriverVersion."""
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    row = machine.cuda_row("580.159.04")
    assert row.verdict == "ok"
    assert "driver 580.159.04" in row.found and row.found.endswith(f"CUDA {torch.version.cuda}, NCCL 2.28.3")


def test_clock_offset_takes_the_quickest_round_trip():
    # This rank is 5 s ahead: asked at 105 by its own clock (100 by the other's), answered 0.2 s later.
    ahead, trip = clock_offset([(105.0, 100.1, 105.2), (106.0, 101.9, 107.0)])
    assert ahead == pytest.approx(5.0) and trip == pytest.approx(0.2)
    assert judge_clocks({1: (5.0, 0.2)}, [1]).verdict == "warn"
    assert judge_clocks({1: (0.01, 0.001), 2: (-0.3, 0.001)}, [1, 2]).verdict == "ok"
    assert judge_clocks({1: (5.0, 20.0)}, [1]).verdict == "ok"  # as long a round trip says nothing
    assert "no answer from rank 2" in judge_clocks({1: (0.0, 0.1)}, [1, 2]).found


def test_the_slow_pair_stands_in_the_matrix():
    speeds = {f"{low}-{high}": {"gbps": 2.5 if (low, high) == (1, 3) else 10.0, "latency_us": 20.0}
              for low in range(4) for high in range(low + 1, 4)}  # fmt: skip
    row = judge_pairs(speeds, 4)
    assert row.verdict == "warn" and "pairs 1-3 have a slower path" in row.fix
    assert "min 2.50, median 10.00, max 10.00" in row.found
    matrix = [line.split() for line in row.found.splitlines()[1:]]
    assert matrix[0] == ["rank", "0", "1", "2", "3"]
    assert matrix[2] == ["1", "10.0", "-", "10.0", "2.5"] and matrix[4] == ["3", "10.0", "2.5", "10.0", "-"]
    assert judge_pairs({name: {**pair, "gbps": 9.0} for name, pair in speeds.items()}, 4).verdict == "ok"


def test_a_hang_under_nccl_gets_the_environment_that_avoids_it():
    def hung(stage: str) -> Outcome:
        return Outcome(stage=stage, problem=f"no end of it within 60 s: {stage}", kind="timeout")

    outcomes = {0: hung("pair 0-1: send of 4 KiB to rank 1"), 1: hung("pair 0-1: recv of 4 KiB from rank 0"),
                2: hung("waiting for pair 0-1")}  # fmt: skip
    (row,) = judge_links(outcomes, dict.fromkeys(range(3), "one"), cuda=True)
    assert row.verdict == "fail" and "NCCL_P2P_DISABLE=1" in row.fix and "NCCL_IB_DISABLE" not in row.fix
    assert [line for line in row.found.splitlines() if line.startswith("rank 0")]
    assert "rank 2" not in row.found  # it only waited
    (row,) = judge_links(outcomes, {0: "one", 1: "two", 2: "two"}, cuda=True, mended={"NCCL_IB_DISABLE": "1"})
    assert row.fix.startswith("export NCCL_IB_DISABLE=1 (tried just now") and "NCCL_SOCKET_IFNAME" in row.fix
    assert judge_peer_access({"0-1": True, "0-2": False})[0].found.startswith("not between GPUs 0-2")


def test_a_trial_out_of_memory_is_told_what_to_lower():
    broken = Outcome(stage="step 1", kind="error", problem="RuntimeError: Connection closed by peer")
    full = Outcome(stage="step 1", kind="error", problem="OutOfMemoryError: CUDA out of memory. Tried 2 GiB\nmore")
    (row,) = judge_trial({0: broken, 1: full}, 4096)
    assert row.found.startswith("rank 1, in `step 1`: OutOfMemoryError") and "more" not in row.found
    assert "train_micro_batch_size_per_gpu" in row.fix


def test_rows_of_many_ranks_become_one():
    same = {rank: [Row("device", "ok", "a card")] for rank in range(3)}
    assert merge(same) == [Row("device", "ok", "a card")]
    same[3] = [Row("device", "fail", "no card", "plug it in")]
    (row,) = merge(same)
    assert row.verdict == "fail" and row.fix == "plug it in"
    assert row.found.splitlines() == ["rank 3: no card", "ranks 0-2: a card"]
    assert summary([row, Row("x", "ok", "")]) == "not ready: device (1 ok, 0 warn, 1 fail)"


def test_mistakes_on_the_command_line(tmp_path):
    script = [sys.executable, str(ROOT / "launch" / "preflight.py")]
    done = run([*script, "--config", "demo"], cwd=tmp_path, check=False)
    assert done.returncode == 2 and "go together" in done.stderr
    done = run([*script, "run_root=x"], cwd=tmp_path, check=False)
    assert done.returncode == 2 and "run_root=x" in done.stderr
    zero2 = ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json"), "--config", "demo"]
    done = run([*script, *zero2, "optim.learning_rat=1"], cwd=tmp_path, check=False)
    assert done.returncode == 2 and "did you mean `learning_rate`" in done.stderr
