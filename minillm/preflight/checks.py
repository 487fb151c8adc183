"""Everything that can be known before a run starts: one table, each row ok, warn or fail with its fix.

Contract: rank 0 gives the orders and prints; the others serve (ranks.py). Every check runs in a child process
with a time limit (child.py), so that a hang is a row that names who stood where, and not a hang. Rank 0's
exit code is 1 where a row fails; the others leave with 0, since a launcher ends all ranks at the first other code.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from minillm.preflight.child import Outcome, Report, function_of
from minillm.preflight.disk import scratch_folder
from minillm.preflight.ranks import Ranks
from minillm.preflight.rows import FAIL, OK, WARN, Row, merge, name_ranks
from minillm.preflight.verdicts import (
    compare_versions,
    environment_row,
    judge_clocks,
    judge_data,
    judge_links,
    judge_peer_access,
    judge_trial,
    trials_of_environment,
)
from minillm.settings.deepspeed_json import precision
from minillm.settings.run import RunConfig

LOOK_AND_PROBE = "minillm.preflight.checks:look_and_probe"
PROBE = "minillm.preflight.links:probe"
TRY_RUN = "minillm.preflight.trial:try_run"
NEEDED = ("ranks", "device", "CUDA", "machine", "disk run_root")  # rows without which a trial would fail as well
BYTES_A_PARAMETER = 12  # of a checkpoint: the fp32 weight and two moments


@dataclass
class Plan:
    """The run that is meant to start.

    Attributes:
        num_parameters: None where the model is not known before it is loaded (`model.init_from`).
        try_run: what the children call, `module:name`, with try_run's arguments.
    """

    run: RunConfig
    deepspeed_config: dict
    num_parameters: int | None
    try_run: str = TRY_RUN


def preflight(ranks: Ranks, plan: Plan | None, timeout: float, trial_timeout: float) -> list[Row]:
    """All rows. Rank 0 calls this while the others `ranks.serve()`.

    Args:
        timeout: seconds for one call, a send or a written file, before it counts as hanging.
        trial_timeout: seconds for one stage of the trial, such as building the model.
    """
    rows = [presence_row(ranks)]
    if ranks.missing:
        return rows
    others = ranks.present[1:]
    rows.append(judge_clocks(ranks.clocks(), others))
    if ranks.missing:  # one has gone silent: whatever needs all ranks would wait for it
        return [*rows, Row("communication", FAIL, f"not tried: {name_ranks(ranks.missing)} is silent", "see above")]
    arguments = {"probe": PROBE, **what_to_look_at(ranks, plan)}
    outcomes = ranks.call(LOOK_AND_PROBE, arguments, timeout)
    links = link_rows(ranks, outcomes, timeout)
    rows += [*machine_rows(outcomes), environment_row(), *links]
    if plan is not None:
        rows += run_rows(ranks, plan, trial_timeout, connected=all(row.verdict != FAIL for row in links), rows=rows)
    return rows


def presence_row(ranks: Ranks) -> Row:
    hosts = dict.fromkeys(ranks.hosts.values())
    where = ", ".join(f"{host} ({name_ranks([r for r, h in ranks.hosts.items() if h == host])})" for host in hosts)
    found = f"{len(ranks.present)} of {ranks.size} on {len(hosts)} machine{'s' if len(hosts) > 1 else ''}: {where}"
    if not ranks.missing:
        return Row("processes", OK, found, values={"hosts": list(ranks.hosts.values())})
    fix = (
        f"{name_ranks(ranks.missing)} did not reach {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: see that "
        f"every node starts its ranks, that the port is open between them and that the address is not 127.0.0.1"
    )
    return Row("processes", FAIL, found, fix)


def what_to_look_at(ranks: Ranks, plan: Plan | None) -> dict[str, object]:
    """The arguments of `look`: the folders a run would use, and what it would write."""
    arguments = {"hosts": list(ranks.hosts.values()), "run_root": "runs", "cache_dir": "data/cache",
                 "run_dir": "", "checkpoint_bytes": None, "keep": 0, "precision": None}  # fmt: skip
    if plan is None:
        return arguments
    run = plan.run
    arguments |= {"run_root": run.run_root, "cache_dir": run.data.cache_dir or "data/cache"}
    arguments |= {"keep": run.checkpoint.keep, "precision": precision(plan.deepspeed_config)}
    if plan.num_parameters is not None:
        arguments |= {"run_dir": str(run.run_dir), "checkpoint_bytes": BYTES_A_PARAMETER * plan.num_parameters}
    return arguments


def look_and_probe(report: Report, probe: str, **arguments) -> dict[str, object]:
    """In the children: what the machine is (kept as a note, whatever comes then), and communication."""
    from minillm.preflight.machine import look

    report.note("machine", look(report, **arguments))
    return function_of(probe)(report, attempt="links")


def machine_rows(outcomes: dict[int, Outcome]) -> list[Row]:
    """What each rank says of itself, put together."""
    answers = {rank: outcome.notes["machine"] for rank, outcome in outcomes.items() if "machine" in outcome.notes}
    rows = merge({rank: [Row(**row) for row in answer["rows"]] for rank, answer in answers.items()})
    silent = {rank: o for rank, o in outcomes.items() if rank not in answers and o.kind != "stopped"}
    if silent:
        found = "\n".join(f"rank {rank}: {outcome.problem}" for rank, outcome in silent.items())
        fix = "a folder that does not answer is a network file system whose server is away; a device, its driver"
        rows.append(Row("machine", FAIL, found, fix))
    if answers:
        rows.append(compare_versions({rank: answer["versions"] for rank, answer in answers.items()}))
        rows += judge_peer_access(answers[min(answers)]["peer_access"])
    return rows


def link_rows(ranks: Ranks, outcomes: dict[int, Outcome], timeout: float) -> list[Row]:
    """Communication; where NCCL fails, once more under each environment that is known to help."""
    cuda = torch.cuda.is_available()
    if any("machine" not in outcome.notes for outcome in outcomes.values()):
        return [Row("communication", FAIL, "not tried: a rank failed before", "mend the row `machine` first")]
    mended = None
    if cuda and any(outcome.kind for outcome in outcomes.values()) and not ranks.missing:
        for number, environment in enumerate(trials_of_environment(len(set(ranks.hosts.values())))):
            again = ranks.call(PROBE, {"attempt": f"again-{number}"}, timeout, environment)
            if not any(outcome.kind for outcome in again.values()):
                mended = environment
                break
    return judge_links(outcomes, ranks.hosts, cuda, mended)


def run_rows(ranks: Ranks, plan: Plan, timeout: float, connected: bool, rows: list[Row]) -> list[Row]:
    """Data and trial of the planned run."""
    run = plan.run
    if not connected or ranks.missing:
        return [Row("trial", WARN, "not tried: the ranks cannot communicate", "mend that first")]
    failed = [f"`{row.name}`" for row in rows if row.name in NEEDED and row.verdict == FAIL]
    if failed:
        return [Row("trial", WARN, "not tried: it would fail as well", f"mend {', '.join(failed)} first")]
    with scratch_folder(Path(run.run_root)) as folder:
        arguments = {
            "run": run.model_dump(), "deepspeed_config": plan.deepspeed_config, "folder": str(folder.resolve()),
            "timeout": timeout,
        }  # fmt: skip
        outcomes = ranks.call(plan.try_run, arguments, timeout)
    show_logs(outcomes)
    data = judge_data(outcomes)
    if data.verdict == FAIL:
        return [data, Row("trial", WARN, "not tried: there is no data", "mend `data` first")]
    return [data, *judge_trial(outcomes, run.train.train_batch_size * run.data.seq_len)]


def show_logs(outcomes: dict[int, Outcome]) -> None:
    """The end of what failed children printed, on stderr."""
    for rank, outcome in outcomes.items():
        if outcome.kind in ("error", "died", "timeout") and outcome.log and not outcome.mendable:
            print(f"-- rank {rank}, the end of its log:\n{outcome.log}\n--", file=sys.stderr, flush=True)
