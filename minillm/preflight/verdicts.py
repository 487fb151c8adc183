"""What the answers of all ranks mean: communication, versions, clocks, data and trial as rows with their fixes.

Contract: pure functions of what the children returned, without torch.

The advice follows what was reported of NCCL: all_reduce hangs right after initialisation on GeForce and workstation
cards without NVLink and works with NCCL_P2P_DISABLE=1 (NVIDIA/nccl-tests 117, NVIDIA/nccl 1999); the cause is PCIe ACS
or the IOMMU, which turned off mends it for good (NVIDIA/nccl 257, 2079); RTX 3090s have no peer access over PCIe at all
and go through /dev/shm (NVIDIA/nccl 1127); peer access that is reported but not sound gives wrong data, not only hangs,
which is why contents are checked (noonghunna/club-3090 922); InfiniBand that is there but does not work: ibv_modify_qp
fails, NCCL_IB_DISABLE=1 (NVIDIA/nccl-tests 227); several interfaces: the bootstrap takes one that cannot reach the
other nodes, NCCL_SOCKET_IFNAME (NVIDIA/nccl 286, 913); gloo falls back to loopback where the host name has no address,
GLOO_SOCKET_IFNAME (vllm 7074).
"""

from __future__ import annotations

import os
import statistics

from minillm.preflight.child import Outcome
from minillm.preflight.rows import FAIL, OK, WARN, Row

GIB, MIB = 2**30, 2**20
SLOW_PAIR = 0.4  # of the median: below it a pair has another path than the others (a x4 slot, the other socket)
FULL = 0.92  # of a GPU's memory: above it, fragmentation ends a run that the trial survived
COMPARED = ("python", "torch", "deepspeed", "transformers", "NCCL", "minillm commit", "minillm source")


def compare_versions(answers: dict[int, dict[str, str]]) -> Row:
    """One row for all ranks: what agrees, and who differs in what.

    Args:
        answers: `versions()` of each rank.
    """
    first = answers[min(answers)]
    common = ", ".join(f"{name} {first[name]}" for name in COMPARED if first[name] != "none")
    differing = []
    for name in COMPARED:
        groups: dict[str, list[int]] = {}
        for rank, answer in answers.items():
            groups.setdefault(answer[name], []).append(rank)
        if len(groups) > 1:
            parts = [f"{value} on {_where(ranks, answers)}" for value, ranks in groups.items()]
            differing.append(f"{name}: {'; '.join(parts)}")
    if differing:
        fix = "give every node the same environment and the same checkout (one shared folder, or the same container)"
        return Row("versions", FAIL, "\n".join(differing), fix, {"rank 0": first})
    problems = {rank: answer["problem"] for rank, answer in answers.items() if answer.get("problem")}
    if problems:  # the same installation on every rank: the first one's will do
        found, _, fix = problems[min(problems)].partition(". ")
        return Row("versions", FAIL, f"{common}\n{found}", fix, {"rank 0": first})
    count = "" if len(answers) == 1 else f"; the same on {len(answers)} ranks"
    return Row("versions", OK, common + count, values={"rank 0": first})


def _where(ranks: list[int], answers: dict[int, dict[str, str]]) -> str:
    hosts = sorted({answers[rank]["host"] for rank in ranks})
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} ({', '.join(hosts)})"


def judge_clocks(offsets: dict[int, tuple[float, float]], ranks: list[int]) -> Row:
    """Clocks against rank 0's; times in logs and file systems' time stamps follow them, training does not.

    Args:
        offsets: (seconds ahead of rank 0, round trip) by rank.
        ranks: those that should have answered.
    """
    silent = [rank for rank in ranks if rank not in offsets]
    if silent:
        listed = ", ".join(map(str, silent))
        return Row("clocks", FAIL, f"no answer from rank {listed}", "see that this node is up and reaches rank 0's")
    if not offsets:
        return Row("clocks", OK, "one rank")
    rank, (ahead, trip) = max(offsets.items(), key=lambda item: abs(item[1][0]) - item[1][1] / 2)
    found = f"at most {1000 * abs(ahead):.1f} ms apart (rank {rank}), round trip {1000 * trip:.1f} ms"
    values = {"seconds_ahead": {str(r): offset for r, (offset, _) in offsets.items()}}
    if abs(ahead) - trip / 2 > 1.0:
        fix = "switch on time synchronisation on every node (timedatectl set-ntp true, or chrony)"
        return Row("clocks", WARN, found, fix, values)
    return Row("clocks", OK, found, values=values)


def environment_row() -> Row:
    """The variables that steer communication, as they are set."""
    names = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TP_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(names)]
    return Row("environment", OK, " ".join(found) or "no NCCL_* or GLOO_* variable is set", values={"set": found})


def advice(hosts: int, cuda: bool) -> str:
    """What is known to help where communication hangs or fails."""
    if not cuda and hosts == 1:
        return (
            "a rank that does not answer on the same machine is stopped or starved (see `top`); GLOO_SOCKET_IFNAME=lo "
            "where the host name leads to an address that cannot be reached"
        )
    if not cuda:
        return (
            "GLOO_SOCKET_IFNAME=<interface> (see `ip -br address`), the one that reaches the other nodes; check that "
            "the host name resolves to its address and that no firewall is between the nodes"
        )
    inside = (
        "NCCL_P2P_DISABLE=1 (consumer cards: through host memory instead of PCIe peer access); for good: switch off "
        "IOMMU and ACS in the BIOS (`lspci -vvv | grep ACSCtl` must show SrcValid-); then NCCL_SHM_DISABLE=1 where "
        "/dev/shm is small"
    )
    if hosts == 1:
        return f"export {inside}; NCCL_DEBUG=INFO says which path is taken"
    return (
        f"between nodes: NCCL_SOCKET_IFNAME=<interface> (see `ip -br address`), NCCL_IB_DISABLE=1 where InfiniBand or "
        f"RoCE is there but not set up; inside a node: {inside}; NCCL_DEBUG=INFO says which path is taken"
    )


def trials_of_environment(hosts: int) -> list[dict[str, str]]:
    """What to try, in order, where NCCL failed as it is; without what is set already."""
    across = [{"NCCL_IB_DISABLE": "1"}, {"NCCL_IB_DISABLE": "1", "NCCL_P2P_DISABLE": "1"}] if hosts > 1 else []
    tries = [{"NCCL_P2P_DISABLE": "1"}, *across]
    return [one for one in tries if any(os.environ.get(name) != value for name, value in one.items())]


def describe_failure(outcomes: dict[int, Outcome]) -> str:
    """Who stood where; those who merely waited for a pair are left out where others are to blame."""
    failed = {rank: outcome for rank, outcome in outcomes.items() if outcome.kind}
    first = {r: o for r, o in failed.items() if o.kind != "stopped" and not o.stage.startswith("waiting for")}
    return "\n".join(f"rank {rank}: {outcome.problem}" for rank, outcome in (first or failed).items())


def judge_links(
    outcomes: dict[int, Outcome], hosts: dict[int, str], cuda: bool, mended: dict[str, str] | None = None
) -> list[Row]:
    """Rows of all ranks' probes.

    Args:
        mended: the environment under which a second probe went well, where the first did not.
    """
    num_hosts = len(set(hosts.values()))
    backend = "NCCL" if cuda else "gloo"
    if len(outcomes) == 1 and not outcomes[0].kind:
        return [Row("communication", OK, f"{backend}, one rank: nothing to measure")]
    if any(outcome.kind for outcome in outcomes.values()):
        found = f"{backend} failed\n{describe_failure(outcomes)}"
        fix = advice(num_hosts, cuda)
        if mended:
            words = " ".join(f"{name}={value}" for name, value in mended.items())
            fix = f"export {words} (tried just now: with it every pair answers); otherwise {fix}"
        return [Row("communication", FAIL, found, fix)]
    speeds = [outcome.result["all_reduce"] for outcome in outcomes.values()]
    rows = [Row("all-reduce", OK, f"{backend}, {min(speeds):.2f} GB/s (bus), {len(outcomes)} ranks, sums right",
                values={"gbps": min(speeds)})]  # fmt: skip
    pairs = {name: pair for outcome in outcomes.values() for name, pair in outcome.result["pairs"].items()}
    return [*rows, judge_pairs(pairs, len(outcomes))]


def judge_pairs(pairs: dict[str, dict[str, float]], size: int) -> Row:
    """The matrix, and the pairs that are much slower than the median."""
    speeds = {tuple(map(int, name.split("-"))): pair["gbps"] for name, pair in pairs.items()}
    middle = statistics.median(speeds.values())
    slow = [f"{low}-{high}" for (low, high), speed in speeds.items() if speed < SLOW_PAIR * middle]
    latency = statistics.median(pair["latency_us"] for pair in pairs.values())
    lines = [
        f"GB/s one way: min {min(speeds.values()):.2f}, median {middle:.2f}, max {max(speeds.values()):.2f}; "
        f"latency {latency:.0f} us; contents right"
    ]
    lines += format_matrix(speeds, size) if size > 2 else []
    fix = ""
    if slow:
        fix = (
            f"pairs {', '.join(slow)} have a slower path: look at `nvidia-smi topo -m` and `nvidia-smi -q -d PCIE` "
            f"(a card in a x4 slot, or behind the other socket); every collective runs at the slowest pair's speed"
        )
    return Row("pairs", WARN if slow else OK, "\n".join(lines), fix, {"pairs": pairs})


def format_matrix(speeds: dict[tuple[int, int], float], size: int) -> list[str]:
    """One line a rank, the upper half mirrored."""
    width = max(6, *(len(f"{speed:.1f}") + 2 for speed in speeds.values()))
    lines = ["rank" + "".join(f"{rank:{width}d}" for rank in range(size))]
    for row in range(size):
        others = (speeds.get((min(row, column), max(row, column))) for column in range(size))
        cells = ("-" if speed is None else f"{speed:.1f}" for speed in others)
        lines.append(f"{row:4d}" + "".join(f"{cell:>{width}s}" for cell in cells))
    return lines


def judge_peer_access(access: dict[str, bool] | None) -> list[Row]:
    """torch.cuda.can_device_access_peer of each pair of one node's GPUs; no row without two GPUs."""
    if not access:
        return []
    without = [name for name, can in access.items() if not can]
    values = {"peer_access": access}
    if not without:
        return [Row("peer access", OK, f"all {len(access)} pairs of GPUs of a node", values=values)]
    which = "no pair of GPUs" if len(without) == len(access) else f"not between GPUs {', '.join(without)}"
    # Not a fault: GeForce cards have none over PCIe (NVIDIA/nccl 1127), and NCCL goes through host memory by itself.
    return [Row("peer access", OK, f"{which}: NCCL goes through host memory (/dev/shm) there", values=values)]


def judge_data(outcomes: dict[int, Outcome]) -> Row:
    """The row about shards and tokenizer, from every rank."""
    failed = {rank: o for rank, o in outcomes.items() if "data" not in o.notes}
    if failed:
        shown = {rank: o for rank, o in failed.items() if o.kind != "stopped"} or failed
        rank, outcome = next(iter(shown.items()))
        found = f"rank {rank}: {first_line(outcome.problem)}"
        return Row("data", FAIL, found, _fix_of_data(outcome))
    notes = outcomes[0].notes["data"]
    lines = [f"{part}: {_sources_text(notes[part])}" for part in ("train", "validation") if notes[part]]
    lines[0] += f"; {notes['epochs']:.2f} epochs in this run"
    lines.append(f"tokenizer of {notes['tokenizer']:,} tokens matches; three batches read on every rank")
    bad = sum(outcome.notes["data"]["bad_rows"] for outcome in outcomes.values())
    if bad:
        fix = "python -m data_tools.shards verify names them"
        return Row("data", WARN, "\n".join([*lines, f"{bad} unreadable sequences among these"]), fix, notes)
    return Row("data", OK, "\n".join(lines), values=notes)


def _fix_of_data(outcome: Outcome) -> str:
    if outcome.kind == "error":
        says = "as the message says" if outcome.mendable else "the end of its log is above"
        return f"{says}; python -m data_tools.shards verify FOLDER reads every byte of a folder of shards"
    return "see that every rank reaches the disk of the shards and of data.cache_dir"


def _sources_text(sources: dict[str, dict[str, int]]) -> str:
    parts = [f"{name} {of['shards']} shards, {of['documents']:,} documents, {of['tokens']:,} tokens"
             for name, of in sources.items()]  # fmt: skip
    return "; ".join(parts)


def judge_trial(outcomes: dict[int, Outcome], tokens_a_step: int) -> list[Row]:
    """Rows of the two steps and of the checkpoint."""
    failed = {rank: o for rank, o in outcomes.items() if o.kind}
    if failed:
        shown = {rank: o for rank, o in failed.items() if o.kind != "stopped"} or failed
        # An error tells more than the time-outs and broken connections it causes elsewhere.
        rank, outcome = min(shown.items(), key=lambda item: (item[1].kind != "error", _is_follow_up(item[1]), item[0]))
        found = f"rank {rank}, in `{outcome.stage}`: {first_line(outcome.problem)}"
        return [Row("trial", FAIL, found, fix_of(outcome))]
    main = outcomes[0].result
    memory = [outcome.result["memory"] for outcome in outcomes.values()]
    losses = ", ".join(f"{loss:.4f}" for loss in main["losses"])
    found = f"{len(main['losses'])} steps, {main['seconds_a_step']:.3f} s a step, {main['tokens_per_s']:,.0f} tokens/s"
    found += f" ({tokens_a_step:,} tokens a step), loss {losses}"
    found += f"\npeak memory: {max(m['host'] for m in memory) / GIB:.2f} GiB of the host a rank"
    row = Row("trial", OK, found, values={**main, "memory": memory})
    if "total" in memory[0]:
        peak = max(memory, key=lambda m: m["reserved"] / m["total"])
        row.found += (
            f", {peak['allocated'] / GIB:.2f} GiB of the GPU allocated, {peak['reserved'] / GIB:.2f} reserved, of "
            f"{peak['total'] / GIB:.2f}"
        )
        if peak["reserved"] > FULL * peak["total"]:
            row.verdict = WARN
            row.fix = "little is left: lower train.train_micro_batch_size_per_gpu, or train.gradient_checkpointing=true"
    saved = main["checkpoint"]
    text = f"{saved['bytes'] / MIB:,.1f} MiB in {saved['seconds']:.2f} s (training waits {saved['stall']:.2f} s)"
    return [row, Row("checkpoint", OK, f"{text}, every byte verified", values=saved)]


def first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0] if (text or "").strip() else "no message"


def _is_follow_up(outcome: Outcome) -> bool:
    """A broken connection, or a collective that timed out: another rank's failure, seen from here."""
    text = outcome.problem or ""
    return any(word in text for word in ("Connection", "connection", "Timed out", "NCCL", "gloo", "Broken pipe"))


def fix_of(outcome: Outcome) -> str:
    """What to do about a trial that failed."""
    text = outcome.problem or ""
    if outcome.mendable:
        return "as the message says"
    if "out of memory" in text.lower() or "OutOfMemoryError" in text or (outcome.kind == "died" and "signal 9" in text):
        return (
            "lower train.train_micro_batch_size_per_gpu, set train.gradient_checkpointing=true, or take a JSON that "
            "shares out more (ds_configs/zero3.json, zero2_offload.json); python -m minillm.plan compares them"
        )
    if outcome.kind == "timeout":
        return "--trial-timeout SECONDS gives it longer; if communication is the cause, see the rows above"
    if _is_follow_up(outcome):
        return "communication broke in the middle: see the rows `all-reduce` and `pairs`, and run with NCCL_DEBUG=INFO"
    return "the end of its log is above; the same error would end the run"
