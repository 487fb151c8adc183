"""What one runs on a new GPU node before the first night: is it right, how fast is it, does it fit the plan.

    bash tests/run.sh --gpu [--budget SECONDS] [--jobs N] [--only STEP ...] [--out FILE] [--logs FOLDER]

The steps are processes of their own, each with a limit; those that measure speed run alone, after the others, which
may run `--jobs` at a time. What the budget leaves no time for is skipped and said so. FILE (gpu-result.json) is what
`python -m minillm.plan --calibrate FILE` reads. Exit code 0: all that ran held; 1: something did not; without a GPU
one line, and 0.

Contract: stdlib only; minillm and torch live in the steps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPEED = ("dense-26m", "dense-171m", "dense-171m-eager", "moe-876m", "moe-876m-eager", "dense-of-moe-876m",
         "dense-171m-micro-64", "moe-876m-micro-32", "qwen3-next-mini")  # fmt: skip
GPU_TESTS = "tests/test_plan.py tests/models/test_attention.py tests/models/test_gated_deltanet.py " \
            "tests/training/test_fp16.py tests/test_resume_bitwise.py"  # fmt: skip


@dataclass
class Step:
    """One process of the check and what came of it.

    Attributes:
        name, proves: for the table.
        limit: seconds.
        commands: one after the other, while they end with 0.
        alone: it measures speed.
    """

    name: str
    proves: str
    limit: float
    commands: list[list[str]]
    alone: bool = False
    seconds: float = 0.0
    outcome: str = "skipped"
    results: list[dict] = field(default_factory=list)

    @property
    def held(self) -> bool:
        return self.outcome in ("ok", "skipped")


def python(*words: object) -> list[str]:
    return [sys.executable, *map(str, words)]


def training(script: str, json_file: str, runs: Path, name: str, *words: str) -> list[str]:
    """A launch of dense-26m on the built-in corpus, one rank."""
    common = [
        f"run_root={runs}", f"run_name={name}", "log.every=1", "log.wandb=disabled", "validation.every=0",
        "validation.max_sequences=32", "optim.lr_schedule=constant", "optim.warmup_ratio=0.0", "train.num_epochs=null",
        "train.train_batch_size=64", "train.train_micro_batch_size_per_gpu=32",
    ]  # fmt: skip
    return python(
        f"launch/{script}.py", "--deepspeed", f"ds_configs/{json_file}.json", "--config", "dense-26m", *common, *words
    )


def steps(work: Path, tiny: bool) -> list[Step]:
    """In order of what they tell."""
    runs, small = work / "runs", ["--tiny"] if tiny else []
    shrink = ["model.num_hidden_layers=2", "train.train_batch_size=4", "train.train_micro_batch_size_per_gpu=2",
              "data.seq_len=64"] if tiny else []  # fmt: skip

    def run(name: str, steps: int, *words: str, json_file: str = "zero1") -> list[str]:
        repeatable = ["train.deterministic=true", "checkpoint.every=10", "train.compile=true"]
        return training("pretrain", json_file, runs, name, f"train.max_steps={steps}", *repeatable, *words, *shrink)

    return [
        Step("machine", "card, driver, versions, two ceilings", 90, [python("-m", "tests.gpu.machine")], True),
        *[
            Step(f"kernels {family}", "fast paths against fp32 on the CPU", 240,
                 [python("-m", "tests.gpu.fast_paths", family)])
            for family in ("attention", "experts", "compiled-experts", "presets")
        ],
        Step("resume", "a run broken off and continued, against the straight one, bit for bit", 400, [
            run("straight", 30, "samples.every=30", "samples.prompts=['The function returns']"),
            run("broken", 20), run("broken", 30),
            python("-m", "tests.gpu.same_losses", runs / "straight", runs / "broken"),
        ]),
        Step("parity", "the engine's step against plain torch, ZeRO 1 to 3, three backends of experts", 300,
             [python("-m", "minillm.parity", "--ranks", 1, "--only", "bf16", "accumulation 3")]),
        Step("fp16", "fp16 with dynamic loss scaling", 180, [
            training("pretrain", "zero2_fp16", runs, "fp16", "train.max_steps=6", "train.compile=false", *shrink)]),
        Step("tests", "the repository's tests that need a GPU", 300,
             [python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu and not slow", *GPU_TESTS.split())]),
        Step("speed", "optimizer steps of the trainer's engine", 600,
             [python("-m", "tests.gpu.steps", *small, *(SPEED[:4] if tiny else SPEED))], alone=True),
        Step("decode", "greedy decoding of dense-171m, batch 1", 150, [python("-m", "tests.gpu.decode", *small)], True),
    ]  # fmt: skip


class Check:
    """The steps, run within a budget."""

    def __init__(self, wanted: list[Step], budget: float, logs: Path):
        self.steps, self.budget, self.logs, self.start = wanted, budget, logs, time.monotonic()
        self.say_lock = threading.Lock()
        logs.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.start)

    def run(self, jobs: int) -> None:
        together = [step for step in self.steps if not step.alone]
        first = [step for step in self.steps if step.name == "machine"]
        for step in first:
            self.run_step(step)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(self.run_step, together))
        for step in self.steps:
            if step.alone and step not in first:
                self.run_step(step)

    def run_step(self, step: Step) -> None:
        if self.left() < 15:
            self.say(f"-- {step.name}: skipped, the budget of {self.budget:.0f} s is spent")
            return
        begin = time.monotonic()
        deadline = begin + min(step.limit, self.left())
        log = self.logs / f"{step.name.replace(' ', '-')}.log"
        step.outcome = "ok"
        with log.open("w") as file:
            for command in step.commands:
                file.write(f"$ {' '.join(command)}\n")
                file.flush()
                code = self.call(command, file, deadline - time.monotonic())
                if code:
                    step.outcome = "out of time" if code == 124 else f"exit {code}"
                    break
        step.seconds = time.monotonic() - begin
        lines = log.read_text(errors="replace").splitlines()
        step.results = [json.loads(line[7:]) for line in lines if line.startswith("RESULT ")]
        self.say(f"-- {step.name}: {step.outcome}, {step.seconds:.0f} s")
        if not step.held:
            self.say("\n".join(f"   | {line}" for line in lines[-12:]))

    @staticmethod
    def call(command: list[str], file, limit: float) -> int:
        defaults = {"PYTHONUNBUFFERED": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **defaults, "PYTHONPATH": os.pathsep.join(
            filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}  # fmt: skip
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            return process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return 124

    def say(self, text: str) -> None:
        with self.say_lock:
            print(text, flush=True)


def result_of(steps: list[Step]) -> dict[str, object]:
    """What --calibrate reads, and more."""
    by_name = {step.name: step for step in steps}
    machine = dict((by_name["machine"].results or [{}])[0]) if "machine" in by_name else {}
    measured = by_name["speed"].results if "speed" in by_name else []
    others = {step.name: {"outcome": step.outcome, "seconds": round(step.seconds, 1), "results": step.results}
              for step in steps if step.name not in ("speed", "machine")}  # fmt: skip
    return {"format": 1, "date": datetime.date.today().isoformat(), **machine, "bus_bytes_per_s": None,
            "steps": measured, "checks": others}  # fmt: skip


def table(steps: list[Step], result: dict[str, object]) -> str:
    lines = []
    if "card" in result:
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
        lines += [
            f"{result['card']}, {result['memory_bytes'] / 2**30:.0f} GiB, capability {result['capability']}",
            versions,
            f"measured ceilings: bf16 product {result['product_flops']['bf16'] / 1e12:.0f} TFLOP/s, copy "
            f"{result['copy_bytes_per_s'] / 1e12:.2f} TB/s",
            "",
        ]
    lines += [f"{'check':<28}{'outcome':<13}{'s':>5}  what it shows"]
    lines += [f"{s.name:<28}{s.outcome:<13}{s.seconds:>5.0f}  {s.proves}" for s in steps]
    if result["steps"]:
        titles = f"{'ZeRO':>6}{'micro':>9}{'compiled':>10}{'tokens/s':>11}{'MFU':>7}{'peak GiB':>10}{'planned':>9}"
        head = f"{'optimizer steps':<26}{titles}"
        lines += ["", head]
        for row in result["steps"]:
            if row["error"]:
                lines.append(f"{row['name']:<26}{row['error'][:90]}")
                continue
            peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
            micro = f"{row['micro']} x {row['micro_steps']}"
            lines.append(
                f"{row['name']:<26}{row['ds_config'][4:]:>6}{micro:>9}{'yes' if row['compile'] else 'no':>10}"
                f"{row['tokens_per_s']:>11,}{row['mfu']:>7.1%}{peak:>10}{row['planned_bytes'] / 2**30:>9.2f}"
            )
    for found in result["checks"].get("decode", {}).get("results", []):
        rate = result.get("copy_bytes_per_s", 0) / found["weight_bytes"]
        ways = {"a growing cache": "tokens_per_s", "with cuDNN's attention": "with_cudnn_tokens_per_s",
                "a fixed cache, compiled": "static_tokens_per_s"}  # fmt: skip
        text = ", ".join(f"{way} {found[key]:,.0f}" for way, key in ways.items() if key in found)
        lines += ["", f"decoding, tokens/s: {text}" + (f"; reading the weights allows {rate:,.0f}" if rate else "")]
    return "\n".join(lines)


def has_gpu() -> bool:
    return subprocess.run(python("-c", "import sys, torch; sys.exit(not torch.cuda.is_available())")).returncode == 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/run.sh --gpu", description="Check and measure this machine's GPU.")
    parser.add_argument("--budget", type=float, default=1200, metavar="SECONDS", help="for all of it (default 1200)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="checks side by side (default 1)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="names, or their beginnings")
    parser.add_argument("--out", type=Path, default=Path("gpu-result.json"), metavar="FILE")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="the steps' output (default: a temporary folder)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on a CPU too: to try this script")
    arguments = parser.parse_args(argv)
    if not arguments.tiny and not has_gpu():
        print(
            "tests/run.sh --gpu: skipped, torch finds no GPU here (python -m minillm.versions, and launch/preflight.py)"
        )
        return 0
    work = Path(tempfile.mkdtemp(prefix="minillm-gpu-"))
    wanted = steps(work, arguments.tiny)
    if arguments.only:
        wanted = [step for step in wanted if any(step.name.startswith(name) for name in arguments.only)]
        if not wanted:
            print(f"error: --only {' '.join(arguments.only)}: no such step", file=sys.stderr)
            return 2
    logs = arguments.logs or work / "logs"
    check = Check(wanted, arguments.budget, logs)
    try:
        check.run(max(1, arguments.jobs))
    finally:
        shutil.rmtree(work / "runs", ignore_errors=True)
    result = result_of(wanted)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + table(wanted, result))
    print(f"\nwritten: {arguments.out} (python -m minillm.plan --calibrate {arguments.out}); logs in {logs}")
    return int(not all(step.held for step in wanted))


if __name__ == "__main__":
    sys.exit(main())
