"""Training speeds that others have published, and what the plan says of the same runs.

Contract: no torch. Data with its source in every line; the assumptions are those of every plan (one part of the peak
for all cards and models), and none of them follows a line. Two errors are told apart: of the speed itself, which is
mostly that one part, and of growth, which is traffic: there the part is the one that explains the source's own smaller
run.

Units: tokens per second of the whole run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from minillm.planning.devices import DEVICES
from minillm.planning.step import MFU, Setup, speed
from minillm.settings.architecture import Architecture
from minillm.settings.deepspeed_json import read_deepspeed_json


def _llama(hidden: int, inner: int, layers: int, heads: int, shared: int) -> Architecture:
    return Architecture(
        vocab_size=32_000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=shared, head_dim=hidden // heads, tie_word_embeddings=False,
    )  # fmt: skip


def _mpt(hidden: int, layers: int, heads: int) -> Architecture:
    """MosaicML's MPT: GPT's block with ALiBi, which has no parameters."""
    return Architecture(
        vocab_size=50_368, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=hidden // heads,
        mlp_type="mlp", norm_type="layernorm", hidden_act="gelu",
    )  # fmt: skip


TINYLLAMA, LLAMA_7B = _llama(2048, 5632, 22, 32, 4), _llama(4096, 11_008, 32, 32, 32)
MPT_1B, MPT_3B, MPT_7B, MPT_13B = _mpt(2048, 24, 16), _mpt(2560, 32, 20), _mpt(4096, 32, 32), _mpt(5120, 40, 40)
WHYNLP = "https://github.com/whyNLP/tinyllama (README)"
FOUNDRY = "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md"
FMS = "https://github.com/foundation-model-stack/fms-fsdp (README)"


@dataclass(frozen=True)
class Published:
    """One line of somebody's table.

    Attributes:
        json_file: of ds_configs, that shares out what theirs does: ZeRO-3 for FSDP, ZeRO-1 for data parallelism.
        micro, micro_steps: sequences of a forward pass on one GPU, and passes of a step.
        grown_from: the smaller run of the same source.
    """

    name: str
    arch: Architecture
    device: str
    gpus: int
    json_file: str
    micro: int
    micro_steps: int
    length: int
    checkpointing: bool
    tokens_per_s: float
    source: str
    grown_from: Published | None = None


_ONE_3090 = Published("TinyLlama", TINYLLAMA, "rtx3090", 1, "zero1", 4, 1, 2048, False, 8_200, WHYNLP)
_ONE_A6000 = Published("TinyLlama", TINYLLAMA, "a6000", 1, "zero1", 8, 1, 2048, False, 12_200, WHYNLP)
_1B = Published("MPT-1B", MPT_1B, "h100", 8, "zero3", 14, 1, 2048, False, 363_645, FOUNDRY)
_3B = Published("MPT-3B", MPT_3B, "h100", 16, "zero3", 10, 3, 2048, False, 386_285, FOUNDRY)
_7B = Published("MPT-7B", MPT_7B, "a100", 8, "zero3", 12, 4, 2048, True, 29_436, FOUNDRY)
_13B = Published("MPT-13B", MPT_13B, "a100", 16, "zero3", 10, 1, 2048, True, 31_900, FOUNDRY)
PUBLISHED = (
    _ONE_3090,
    replace(_ONE_3090, gpus=8, tokens_per_s=36_000, grown_from=_ONE_3090),
    _ONE_A6000,
    replace(_ONE_A6000, gpus=8, tokens_per_s=73_300, grown_from=_ONE_A6000),
    Published("TinyLlama", TINYLLAMA, "rtx4090", 1, "zero1", 4, 1, 2048, False, 17_000, WHYNLP),
    Published("TinyLlama", TINYLLAMA, "a100", 8, "zero1", 16, 8, 2048, False, 212_900, WHYNLP),
    Published("TinyLlama", TINYLLAMA, "a100", 16, "zero3", 8, 8, 2048, False, 384_000,
              "https://github.com/jzhang38/TinyLlama (README: 24,000 a GPU)"),
    _1B,
    replace(_1B, gpus=64, micro=20, tokens_per_s=2_841_754, grown_from=_1B),
    _3B,
    replace(_3B, gpus=64, micro=6, tokens_per_s=1_441_663, grown_from=_3B),
    Published("MPT-7B", MPT_7B, "h100", 8, "zero3", 6, 1, 2048, False, 85_144, FOUNDRY),
    _7B,
    replace(_7B, gpus=128, micro=18, micro_steps=1, tokens_per_s=463_749, grown_from=_7B),
    _13B,
    replace(_13B, gpus=128, micro=16, tokens_per_s=252_444, grown_from=_13B),
    Published("Llama-2-7B", LLAMA_7B, "a100", 128, "zero3", 2, 1, 4096, False, 481_280, f"{FMS}: 3,760 a GPU"),
)  # fmt: skip


def predicted(run: Published, deepspeed_dir: Path, mfu: float = MFU) -> float:
    """Tokens/s by the plan.

    Args:
        deepspeed_dir: where ds_configs is.
    """
    values = read_deepspeed_json(deepspeed_dir / f"{run.json_file}.json")
    setup = Setup(run.arch, values, run.gpus, "torch", 1, run.gpus * run.micro * run.micro_steps, run.length,
                  run.micro, run.checkpointing, gpus_per_node=8)  # fmt: skip
    return speed(setup, DEVICES[run.device], mfu).tokens_per_s


def mfu_of(run: Published, deepspeed_dir: Path) -> float:
    """The part of the peak with which the plan gives the published speed."""
    low, high = 0.01, 2.0
    for _ in range(60):  # halved until the two are one number
        middle = (low + high) / 2
        low, high = (middle, high) if predicted(run, deepspeed_dir, middle) < run.tokens_per_s else (low, middle)
    return low


def check_published(deepspeed_dir: Path) -> list[dict[str, object]]:
    """One record a line: what was published, what the plan says, and the error as a part of the published.

    `grown` and `growth_error`: the same with the part of the peak that the source's smaller run had.
    """
    records = []
    for run in PUBLISHED:
        plan = predicted(run, deepspeed_dir)
        record = {"model": run.name, "device": DEVICES[run.device].name, "gpus": run.gpus,
                  "ds_config": run.json_file, "published": run.tokens_per_s, "predicted": plan,
                  "error": plan / run.tokens_per_s - 1, "source": run.source}  # fmt: skip
        if run.grown_from is not None:
            grown = predicted(run, deepspeed_dir, mfu_of(run.grown_from, deepspeed_dir))
            record |= {"from_gpus": run.grown_from.gpus, "grown": grown, "growth_error": grown / run.tokens_per_s - 1}
        records.append(record)
    return records


def published_table(records: list[dict[str, object]]) -> list[str]:
    """120 columns."""
    head = f"{'model':12}{'GPUs':>5} {'card':9}{'like':7}{'published':>11}{'predicted':>11}{'error':>7}"
    lines = [f"tokens/s; grown: with the part of the peak of the source's smaller run\n\n"
             f"{head}{'grown':>11} {'from':>5}{'error':>7}"]  # fmt: skip
    for r in records:
        line = f"{r['model']:12}{r['gpus']:>5} {r['device']:9}{r['ds_config']:7}{r['published']:>11,.0f}"
        line += f"{r['predicted']:>11,.0f}{r['error']:>+7.0%}"
        if "grown" in r:
            line += f"{r['grown']:>11,.0f} {r['from_gpus']:>5}{r['growth_error']:>+7.0%}"
        lines.append(line)
    speeds = [abs(r["error"]) for r in records]
    growths = [abs(r["growth_error"]) for r in records if "grown" in r]
    lines += ["", f"mean size of the error: {sum(speeds) / len(speeds):.0%} of the speed, worst {max(speeds):.0%}; "
              f"{sum(growths) / len(growths):.0%} of growth, worst {max(growths):.0%}", "", "sources:"]  # fmt: skip
    return lines + [f"- {source}" for source in dict.fromkeys(r["source"] for r in records)]
