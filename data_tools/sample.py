"""A share of a corpus: at random, the same share of every value of a field, or the best by a score.

    python -m data_tools.sample PATH ... --out DIR --share 5%                     for a tokenizer
    python -m data_tools.sample PATH ... --out DIR --share 20% --by category      of each category (shares, not counts)
    python -m data_tools.sample PATH ... --out DIR --records 50000                exactly so many, for fine-tuning
    python -m data_tools.sample PATH ... --out DIR --records 50000 --best score   those with the highest score
    python -m data_tools.sample PATH ... --out DIR --least 0.8 --best score       all that have at least 0.8

Contract: records come out in the order of the input, with all their fields; which ones depends on the seed, the inputs'
text and place, not on the number of processes. Counts are exact: of N records a share of P gives round(N x P), of every
value of --by separately. Two passes: the first keeps 16 bytes a record (a random number or the score, and the value's
number), on disk; the choice between them takes about 40 bytes a record in memory.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_tools.parallel import identity, run_units, work_folder
from data_tools.records import Record, Rejected, TextField, Unit, read_unit
from data_tools.workshop import Stage, add_stage_options, found_units, positive, run_stage_on_units, text_field
from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error
from minillm.utils.files import sync_file

_KEYS = np.dtype([("order", "<f8"), ("value", "<i8")])
_MISSING = "(none)"


class Chosen(Stage):
    """Lets the chosen records through; the choice of a unit is a file of bits, in the order of its records."""

    name = "sample"

    def __init__(self, options: dict[str, object]) -> None:
        super().__init__(options)
        self._number = 0
        self._chosen: np.ndarray | None = None

    def begin_unit(self, unit: Unit, work: Path) -> None:
        self._chosen = np.load(work / f"chosen-{unit.number:05d}.npy", mmap_mode="r", allow_pickle=False)

    def process(self, record: Record) -> Record | Rejected:
        self._number += 1
        if self._chosen[self._number - 1]:
            return record
        return Rejected(str(record["id"]), "not_drawn", "left out by the draw")


def draw(
    paths: list[str],
    out: Path,
    *,
    share: float | None = None,
    records: int | None = None,
    by: str | None = None,
    best: str | None = None,
    least: float | None = None,
    seed: int = 0,
    text: TextField | None = None,
    workers: int | None = None,
    unit_bytes: int = 16 << 20,
    compress: str = "none",
) -> dict[str, object]:
    """Write a sample of the corpus into `out`.

    Args:
        share: of the records, above 0 and at most 1; or
        records: how many in all, spread over the values of `by` by their shares.
        by: a field; records without it are a value of their own.
        best: a field with a number: the highest are taken (ties in input order); records without it never.
        least: with `best`, the lowest number taken.
        text: None takes records as they are.

    Raises:
        UserError: neither or both of share and records, a number out of range, a field that no record has, more
            records than there are.
    """
    options = {"share": share, "records": records, "by": by, "best": best, "least": least, "seed": seed}
    if share is None and records is None and least is not None:
        share = options["share"] = 1.0
    if (share is None) == (records is None):
        raise UserError("say either --share (such as 5%) or --records (such as 50000)")
    if share is not None and not 0 < share <= 1:
        raise UserError(f"--share is {share:g}: it must be above 0 and at most 100%")
    if least is not None and best is None:
        raise UserError("--least needs --best FIELD: it is the lowest number of that field that is taken")
    units = found_units(paths, unit_bytes)
    command = {"tool": "sample", "options": options, "text": asdict(text) if text else None, "compress": compress}
    drawn: dict[str, dict[str, int]] = {}
    with work_folder(out, paths, {**command, "inputs": identity(units)}) as work:
        if not (out / "summary.json").is_file():
            arguments = {**options, "text": command["text"]}
            found = run_units(_keys_of_unit, units, arguments, work, workers=workers, label="reading")
            drawn = _choose(units, found, work, options)
        return run_stage_on_units(
            Chosen, options, units, paths, out, work,
            text=text, workers=workers, compress=compress, extra_summary=lambda summary: {"drawn": drawn},
        )  # fmt: skip


def _keys_of_unit(unit: Unit, arguments: dict, work: Path, progress: Callable[[int], None]) -> dict:
    """A key for every record of a unit: what it is ordered by, and the number of its value in the unit's list."""
    generator = np.random.Generator(np.random.PCG64([arguments["seed"], unit.number]))
    text = TextField(**arguments["text"]) if arguments["text"] else None
    by, best = arguments["by"], arguments["best"]
    values: dict[str, int] = {}
    scored = 0
    keys = []
    for record in read_unit(unit, text, progress):
        if isinstance(record, Rejected):
            continue
        value = _MISSING if by is None or record.get(by) is None else _as_value(record[by])
        order = generator.random()
        if best is not None:
            number = _as_number(record.get(best))
            scored += number is not None
            order = -math.inf if number is None else number
        keys.append((order, values.setdefault(value, len(values))))
    path = work / f"keys-{unit.number:05d}.npy"
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.save(file, np.array(keys, _KEYS), allow_pickle=False)
    sync_file(temporary)
    temporary.rename(path)
    return {"values": list(values), "scored": scored}


def _as_value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _as_number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _choose(units: list[Unit], found: list[dict], work: Path, options: dict) -> dict[str, dict[str, int]]:
    """Write a bit for every record of every unit; how many of each value there were, and were drawn."""
    keys = [np.load(work / f"keys-{unit.number:05d}.npy", mmap_mode="r", allow_pickle=False) for unit in units]
    numbers = {value: number for number, value in enumerate(dict.fromkeys(v for one in found for v in one["values"]))}
    total = sum(len(one) for one in keys)
    if options["by"] is not None and list(numbers) == [_MISSING]:
        raise UserError(f"no record has the field {options['by']!r} that --by names")
    if options["best"] is not None and not sum(one["scored"] for one in found):
        raise UserError(f"no record has a number in the field {options['best']!r} that --best names")
    if not total:
        raise UserError("no record could be read: see data_tools.inspect")
    order = np.concatenate([one["order"] for one in keys])
    value = np.concatenate(
        [
            np.array([numbers[v] for v in unit["values"]] or [0])[one["value"]]
            for unit, one in zip(found, keys, strict=True)
        ]
    )
    if options["best"] is None:
        order = -order  # the largest are drawn below
    allowed = np.isfinite(order)
    if options["least"] is not None:
        allowed &= order >= options["least"]
    counts = np.bincount(value, minlength=len(numbers))
    wanted = _wanted(counts, options)
    chosen = np.zeros(total, bool)
    by_value = np.argsort(value, kind="stable")
    drawn = {}
    for name, number in numbers.items():
        first = int(counts[:number].sum())
        places = by_value[first : first + counts[number]]
        places = places[allowed[places]]
        taken = places[np.argsort(-order[places], kind="stable")[: wanted[number]]]
        chosen[taken] = True
        drawn[name] = {"records": int(counts[number]), "drawn": len(taken)}
    start = 0
    for unit, one in zip(units, keys, strict=True):
        with open(work / f"chosen-{unit.number:05d}.npy", "wb") as file:
            np.save(file, chosen[start : start + len(one)], allow_pickle=False)
        start += len(one)
    return drawn


def _wanted(counts: np.ndarray, options: dict) -> list[int]:
    """How many of each value: its share, the rounding of the whole given to the largest remainders."""
    total = int(counts.sum())
    if options["share"] is not None:
        return [round(int(count) * options["share"]) for count in counts]
    if options["records"] > total:
        raise UserError(f"--records is {options['records']:,}, the corpus has {total:,} records")
    exact = counts * (options["records"] / total)
    wanted = np.floor(exact).astype(int)
    for number in np.argsort(wanted - exact, kind="stable")[: options["records"] - int(wanted.sum())]:
        wanted[number] += 1
    return [int(one) for one in wanted]


def _share(text: str) -> float:
    number, divisor = (text[:-1], 100) if text.endswith("%") else (text, 1)
    try:
        return float(number) / divisor
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a share such as 5% or 0.05") from None


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog=command_name("data_tools.sample"), description="Draw a share of a corpus.")
    add_stage_options(parser)
    parser.add_argument("--share", type=_share, metavar="P", help="such as 5%% or 0.05")
    parser.add_argument("--records", type=positive, metavar="N", help="exactly so many")
    parser.add_argument("--by", metavar="FIELD", help="the same share of every value of a field")
    parser.add_argument("--best", metavar="FIELD", help="the highest numbers of a field, in the place of chance")
    parser.add_argument("--least", type=float, metavar="X", help="with --best: none below X")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, another draw (0)")
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        asked = options.text_template is not None or options.text_column != "text"
        text = text_field(options) if asked else None  # records without a text can be drawn too
        draw(
            options.paths,
            options.out,
            share=options.share,
            records=options.records,
            by=options.by,
            best=options.best,
            least=options.least,
            seed=options.seed,
            text=text,
            workers=options.workers,
            unit_bytes=options.unit_bytes,
            compress=options.compress,
        )


if __name__ == "__main__":
    main()
