"""The plan on a card that was measured: what `bash tests/run.sh --gpu` wrote, as a device and a part of its peak.

Contract: no torch. `read_result` checks the file (format 1); `measured_step` chooses the step most like the run, and
`measured_device` makes a Device of the card, from the datasheet where it is listed, else from measured products and
copies. What the file does not say stays an assumption.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from minillm.planning.devices import DEVICES, Device, datasheet_flops
from minillm.planning.step import RECOMPUTATION
from minillm.settings.accounting import num_parameters
from minillm.settings.architecture import Architecture
from minillm.settings.presets import PRESETS
from minillm.settings.run import RunConfig
from minillm.utils.errors import UserError

FORMAT = 1
UPDATE_BYTES = 2 * 12 + 4 + 2  # of a parameter: masters and moments read and written, gradient and weight
PRECISIONS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Step:
    """One measured way to train.

    Attributes:
        seconds: of one optimizer step.
        mfu: of the whole step, model FLOPs over the card's peak.
        peak_bytes, planned_bytes: torch.cuda.max_memory_allocated, and what the plan said then; None: not measured.
    """

    name: str
    preset: str
    micro: int
    length: int
    compile: bool
    checkpointing: bool
    seconds: float
    mfu: float
    peak_bytes: float | None
    planned_bytes: float | None

    def of_products(self, device: Device) -> float:
        """The part of the peak while it computed: recomputed operations count here, which MFU leaves out, and AdamW's
        update in bf16, which a plan adds by itself, does not (at most half of the step)."""
        update = num_parameters(PRESETS[self.preset])["total"] * UPDATE_BYTES / device.memory_bandwidth
        return self.mfu * (RECOMPUTATION if self.checkpointing else 1) / (1 - min(0.5, update / self.seconds))

    @property
    def memory_ratio(self) -> float:
        return self.peak_bytes / self.planned_bytes if self.peak_bytes and self.planned_bytes else 1.0

    @property
    def sparse(self) -> bool:
        return "sparse" in PRESETS[self.preset].mlp_layer_types


@dataclass(frozen=True)
class Result:
    """A checked file."""

    path: Path
    date: str
    card: str
    memory_bytes: float
    torch: str
    bus: float | None
    copy: float | None
    products: dict[str, float]
    steps: list[Step]


def read_result(path: Path) -> Result:
    """A file of `bash tests/run.sh --gpu`.

    Raises:
        UserError: it is missing or broken, or holds no step that was measured; names the key and the rule.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--calibrate {path}: no such file; `bash tests/run.sh --gpu` writes one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--calibrate {path}: not a JSON file that can be read ({error})") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise UserError(
            f'--calibrate {path}: its "format" is {json.dumps(found)} where {FORMAT} is read; measure again with this '
            f"version (`bash tests/run.sh --gpu`)"
        )
    reader = _Reader(path)
    rows = values.get("steps")
    if not isinstance(rows, list):
        raise reader.error("steps", rows, "a list")
    steps = [step for number, row in enumerate(rows) if (step := _step(reader, number, row)) is not None]
    if not steps:
        raise UserError(f"--calibrate {path}: none of its {len(rows)} steps was measured on a GPU; measure again")
    products, versions = values.get("product_flops"), values.get("versions")
    products = products if isinstance(products, dict) else {}
    return Result(
        path=path,
        date=str(values.get("date", "no date")),
        card=reader.text(values, "card"),
        memory_bytes=reader.number(values, "memory_bytes"),
        torch=str(versions.get("torch")) if isinstance(versions, dict) else "unknown",
        bus=reader.number(values, "bus_bytes_per_s", optional=True),
        copy=reader.number(values, "copy_bytes_per_s", optional=True),
        products={name: reader.number(products, name, "product_flops.") for name in products if name in PRECISIONS},
        steps=steps,
    )


@dataclass(frozen=True)
class _Reader:
    """Values of the file, or one error that names the key."""

    path: Path

    def error(self, key: str, value: object, rule: str) -> UserError:
        return UserError(f"--calibrate {self.path}: {key} = {json.dumps(value)}: it must be {rule}; measure again")

    def number(self, values: dict, key: str, where: str = "", optional: bool = False) -> float | None:
        value = values.get(key)
        if value is None and optional:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise self.error(where + key, value, "a number above 0")
        return float(value)

    def whole(self, values: dict, key: str, where: str) -> int:
        value = self.number(values, key, where)
        if value != int(value):
            raise self.error(where + key, value, "a whole number above 0")
        return int(value)

    def text(self, values: dict, key: str, where: str = "") -> str:
        value = values.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(where + key, value, "a name")
        return value

    def flag(self, values: dict, key: str, where: str) -> bool:
        value = values.get(key)
        if not isinstance(value, bool):
            raise self.error(where + key, value, "true or false")
        return value


def _step(reader: _Reader, number: int, row: object) -> Step | None:
    """None: it failed, was measured without a GPU's memory, or is a preset's name for another architecture."""
    where = f"steps[{number}]."
    if not isinstance(row, dict):
        raise reader.error(where.rstrip("."), row, "an object")
    if row.get("error") is not None or row.get("peak_bytes") is None:
        return None
    name, preset = reader.text(row, "name", where), reader.text(row, "preset", where)
    if preset not in PRESETS:
        raise reader.error(f"{where}preset", preset, "one of minillm/settings/presets.py")
    if not name.startswith(preset):
        return None
    mfu = reader.number(row, "mfu", where)
    if mfu > 1:
        raise reader.error(f"{where}mfu", mfu, "at most 1")
    return Step(
        name=name,
        preset=preset,
        micro=reader.whole(row, "micro", where),
        length=reader.whole(row, "length", where),
        compile=reader.flag(row, "compile", where),
        checkpointing=reader.flag(row, "checkpointing", where),
        seconds=reader.number(row, "step_seconds", where),
        mfu=mfu,
        peak_bytes=reader.number(row, "peak_bytes", where),
        planned_bytes=reader.number(row, "planned_bytes", where, optional=True),
    )


def measured_step(result: Result, run: RunConfig, arch: Architecture) -> Step:
    """The one most like the run: experts or none, compiled or not, checkpointing or not, then the nearest in size and
    in tokens of a forward pass."""
    size = num_parameters(arch)["matmul"]
    micro = run.train.train_micro_batch_size_per_gpu
    rows = (micro if isinstance(micro, int) else 1) * run.data.seq_len

    def unlike(step: Step) -> tuple[object, ...]:
        return (
            step.sparse != ("sparse" in arch.mlp_layer_types),
            step.compile != run.train.compile,
            step.checkpointing != run.train.gradient_checkpointing,
            abs(math.log(num_parameters(PRESETS[step.preset])["matmul"] / size)),
            abs(math.log(step.micro * step.length / rows)),
        )

    return min(result.steps, key=unlike)


def measured_device(result: Result) -> Device:
    """The card.

    Raises:
        UserError: a card without a datasheet here, and without a measured product and copy.
    """
    card = result.card
    flops = {name: peak for name in PRECISIONS if (peak := datasheet_flops(card, name)) is not None}
    alike = [device for device in DEVICES.values() if flops and device.name in card and device.flops == flops]
    if alike:
        device = alike[0]._replace(name=card, memory=result.memory_bytes)
    else:
        flops = flops or dict(result.products)
        missing = [name for name, value in (("product_flops", flops), ("copy_bytes_per_s", result.copy)) if not value]
        if missing:
            raise UserError(
                f"--calibrate {result.path}: {card} is not listed in minillm/planning/devices.py, and the file has no "
                f"{' and no '.join(missing)} to take its speed from; measure again"
            )
        if "bf16" in flops:
            flops.setdefault("fp16", flops["bf16"])  # tensor cores do both at one rate
        plain = DEVICES["rtx3090"]  # links nobody measured: the slowest that are assumed
        device = plain._replace(name=card, flops=flops, memory=result.memory_bytes, memory_bandwidth=result.copy)
    return device if result.bus is None else device._replace(bus=result.bus, link="measured")


def measured_sentence(result: Result, step: Step, device: Device, run: RunConfig, arch: Architecture) -> str:
    """What was measured, and in what it differs from the run."""
    memory = f"peak memory {step.memory_ratio:.2f} of what was planned"
    sentence = (
        f"measured on {result.card}, torch {result.torch}, {result.date}: {step.name} ({_kind(step)}) reached "
        f"{step.of_products(device):.0%} of the peak; {memory}"
    )
    other = [
        ("experts", step.sparse, "sparse" in arch.mlp_layer_types),
        ("train.compile", step.compile, run.train.compile),
        ("train.gradient_checkpointing", step.checkpointing, run.train.gradient_checkpointing),
    ]
    differs = [f"{name} {_word(was)} (here {_word(now)})" for name, was, now in other if was != now]
    return sentence + (f"; measured with {', '.join(differs)}: nothing closer is in the file" if differs else "")


def _kind(step: Step) -> str:
    words = ["experts" if step.sparse else "dense", "compiled" if step.compile else "eager"]
    return ", ".join(words + ["checkpointing"] * step.checkpointing)


def _word(value: bool) -> str:
    return "on" if value else "off"
