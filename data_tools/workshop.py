"""What the tools of the workshop share: units in parallel processes, progress, going on after a kill, summary.json.

Contract: `run_stage` puts every record of its inputs through a Stage and writes OUT/part-00007.jsonl, a part for each
unit of input, and OUT/summary.json at the end. A part and its counts (OUT/.work) appear together or not at all, so that
the same command after a kill goes on with the units that are missing; another command in the same OUT is refused. The
result does not depend on the number of processes. Tools with several passes use data_tools/parallel.py below it.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import io
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from data_tools.extras import require
from data_tools.parallel import identity, run_units, work_folder
from data_tools.records import (
    TEXT,
    UNIT_BYTES,
    Record,
    Rejected,
    TextField,
    Unit,
    find_units,
    read_unit,
    record_text,
)
from minillm.utils.errors import UserError
from minillm.utils.files import read_json, write_json
from minillm.utils.logging import say

EXAMPLES = 5  # kept of every reason
_EXAMPLE_CHARACTERS = 200
_COMPRESSIONS = {"none": ".jsonl", "gz": ".jsonl.gz", "zst": ".jsonl.zst"}


# -- command lines -----------------------------------------------------------------------------------------------------


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """PATH ..., and where the text is."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files, folders, or hf:OWNER/NAME[:CONFIG][:SPLIT]")
    add_text_options(parser)


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Where the text is."""
    parser.add_argument("--text-column", default="text", metavar="NAME", help="field or column with the text (text)")
    parser.add_argument("--text-template", metavar="T", help="several fields as one text: '{title}\\n{paragraphs}'")


def text_field(options: argparse.Namespace) -> TextField:
    """The TextField that the options describe.

    Raises:
        UserError: a template without a field.
    """
    template = options.text_template
    if template is not None:
        template = template.replace("\\n", "\n").replace("\\t", "\t")
        if "{" not in template or "}" not in template:
            raise UserError(f"--text-template {template!r} names no field: write it as '{{title}}\\n{{paragraphs}}'")
    return TextField(options.text_column, template)


def add_stage_options(parser: argparse.ArgumentParser) -> None:
    """PATH ..., --out, and how the work is spread."""
    add_input_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the parts and summary.json")
    add_work_options(parser)
    parser.add_argument("--compress", choices=_COMPRESSIONS, default="none", help="of the parts (none)")


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """How the work is spread."""
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (one a core)")
    parser.add_argument("--unit-bytes", type=byte_size, default=UNIT_BYTES, metavar="BYTES",
                        help="input of one part: what a kill can cost (16M)")  # fmt: skip


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number above 0")
    return int(text)


def byte_size(text: str) -> int:
    """A number of bytes, K, M and G for powers of 1024, for argparse."""
    units = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    number, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    if not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a size such as 64M or 500000")
    return int(number) * unit


# -- a filter over records ---------------------------------------------------------------------------------------------


class Stage(ABC):
    """A filter or a map over records, made anew for each unit in the process that reads it.

    Subclasses live at the top of a module. `options` are what JSON can hold; they are kept in summary.json.
    """

    name: str

    def __init__(self, options: dict[str, object]):
        self.options = options

    def begin_unit(self, unit: Unit, work: Path) -> None:
        """Called before the records of a unit; `work` is where earlier passes may have left files."""
        return

    @abstractmethod
    def process(self, record: Record) -> Record | Rejected | list[Record | Rejected]:
        """What becomes of a record: itself, another, several, or why it is left out."""

    def finish_unit(self) -> dict[str, object]:
        """Statistics of the unit: numbers, also in nested dictionaries; those of all units are added up."""
        return {}


def run_stage(
    stage: type[Stage],
    options: dict[str, object],
    paths: Iterable[Path | str],
    out: Path,
    *,
    text: TextField | None = TEXT,
    workers: int | None = None,
    unit_bytes: int = UNIT_BYTES,
    compress: str = "none",
    extra_summary: Callable[[dict], dict] | None = None,
    side_inputs: Sequence[Path] = (),
) -> dict[str, object]:
    """Put all records of `paths` through a stage; the summary, which is in OUT/summary.json too.

    Args:
        text: where the text is; None for stages that take records without one.
        workers: processes; None is one a core.
        compress: none, gz or zst.
        extra_summary: more keys for the summary, made of it.
        side_inputs: other files that the result depends on: changed ones make it another command.

    Raises:
        UserError: nothing to read, a damaged file, OUT holds other work or lies inside the input, no record is left.
    """
    paths, out = [str(path) for path in paths], Path(out)
    units = found_units(paths, unit_bytes)
    command = {"tool": stage.name, "options": options, "text": asdict(text) if text else None, "compress": compress}
    with work_folder(out, paths, {**command, "inputs": identity(units, side_inputs)}) as work:
        return run_stage_on_units(
            stage, options, units, paths, out, work,
            text=text, workers=workers, compress=compress, extra_summary=extra_summary,
        )  # fmt: skip


def found_units(paths: Sequence[str], unit_bytes: int) -> list[Unit]:
    """find_units, or a UserError where there is nothing."""
    units = find_units(paths, unit_bytes)
    if not units:
        raise UserError(f"{', '.join(paths)}: there is nothing to read: name files or a folder of them")
    return units


def run_stage_on_units(
    stage: type[Stage],
    options: dict[str, object],
    units: Sequence[Unit],
    paths: Sequence[str],
    out: Path,
    work: Path,
    *,
    text: TextField | None = TEXT,
    workers: int | None = None,
    compress: str = "none",
    extra_summary: Callable[[dict], dict] | None = None,
) -> dict[str, object]:
    """`run_stage` inside a work_folder that is open: the last pass of a tool with several."""
    if (out / "summary.json").is_file():
        say(f"{out} is finished already: nothing to do")
        return read_json(out / "summary.json")
    start = time.monotonic()
    arguments = {"stage": _name_of(stage), "options": options,
                 "text": asdict(text) if text else None, "compress": compress, "out": str(out)}  # fmt: skip
    results = run_units(_run_stage_on_unit, units, arguments, work, workers=workers, label=stage.name)
    summary = {"tool": stage.name, "options": options, "inputs": list(paths), **merge_results(results)}
    summary["seconds"] = round(time.monotonic() - start, 2)
    summary |= extra_summary(summary) if extra_summary else {}
    write_json(out / "summary.json", summary)
    report(summary, out)
    return summary


def _name_of(stage: type[Stage]) -> str:
    """MODULE:CLASS, by which the processes find it; `python -m` calls its module __main__."""
    module = stage.__module__
    if module == "__main__":
        spec = sys.modules["__main__"].__spec__
        if spec is None:
            raise ValueError(f"{stage.__qualname__} is defined in a script: put it into a module")
        module = spec.name
    return f"{module}:{stage.__qualname__}"


def report(summary: dict, out: Path) -> None:
    """Say what came out, a line a reason."""
    kept, taken = summary["records_out"], summary["records_in"]
    say(f"{out}: {kept:,} of {taken:,} records kept, {summary['bytes_out'] / 1e6:,.1f} MB, {summary['seconds']:.1f} s")
    for reason, count in sorted(summary["rejected"].items(), key=lambda item: -item[1]):
        example = summary["examples"][reason][0]
        say(f"  {count:>10,} {reason:<24} {example['detail']}")


def merge_results(results: list[dict]) -> dict:
    """The results of the units of a stage as one."""
    merged: dict = {"records_in": 0, "records_out": 0, "bytes_in": 0, "bytes_out": 0, "rejected": {}, "statistics": {}}
    examples: dict[str, list] = {}
    for result in results:
        for reason, found in result.get("examples", {}).items():
            examples[reason] = [*examples.get(reason, []), *found][:EXAMPLES]
        add_up(merged, {key: result[key] for key in merged if key in result})
    return {**merged, "examples": examples}


def add_up(total: dict, more: dict) -> None:
    """Add numbers key by key, in nested dictionaries too."""
    for key, value in more.items():
        if isinstance(value, dict):
            add_up(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value


def _run_stage_on_unit(unit: Unit, arguments: dict, work: Path, progress: Callable[[int], None]) -> dict:
    module, _, name = arguments["stage"].partition(":")
    stage: Stage = getattr(importlib.import_module(module), name)(arguments["options"])
    text = TextField(**arguments["text"]) if arguments["text"] else None
    stage.begin_unit(unit, work)
    result: dict = {"records_in": 0, "records_out": 0, "bytes_in": unit.size, "rejected": {}, "examples": {}}
    part = Path(arguments["out"], f"part-{unit.number:05d}{_COMPRESSIONS[arguments['compress']]}")
    with part_file(part) as file:
        for record in read_unit(unit, text, progress):
            result["records_in"] += 1
            answer = record if isinstance(record, Rejected) else stage.process(record)
            for one in answer if isinstance(answer, list) else [answer]:
                if isinstance(one, Rejected):
                    shown = one.text or ("" if isinstance(record, Rejected) else _beginning(record))
                    count_rejected(result, one, shown)
                else:
                    file.write(encode(one))
                    result["records_out"] += 1
    result["bytes_out"] = part.stat().st_size if part.exists() else 0
    result["statistics"] = stage.finish_unit()
    return result


def _beginning(record: Record) -> str:
    return record_text(record)[:_EXAMPLE_CHARACTERS] if "text" in record or "messages" in record else ""


def count_rejected(result: dict, one: Rejected, text: str) -> None:
    """Count a rejected record in a unit's result, and keep the first few as examples."""
    result["rejected"][one.reason] = result["rejected"].get(one.reason, 0) + 1
    examples = result["examples"].setdefault(one.reason, [])
    if len(examples) < EXAMPLES:
        readable = text[:_EXAMPLE_CHARACTERS].encode(errors="replace").decode()
        detail = one.detail.encode(errors="replace").decode()
        examples.append({"id": one.id, "detail": detail, "text": readable})


def encode(record: Record) -> bytes:
    """A record as a line of JSON; what JSON has no word for (dates, decimals) as its string."""
    try:
        return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair in a field that is not the text
        return (json.dumps(record, default=str) + "\n").encode()


@contextmanager
def part_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when it is whole, compressed by its suffix; none where nothing was written."""
    temporary = path.with_name(f".{path.name}.tmp")
    raw = open(temporary, "wb")
    try:
        if path.suffix == ".gz":
            file: BinaryIO = gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=6, mtime=0, filename="")
        elif path.suffix == ".zst":
            compressor = require("zstandard").ZstdCompressor(level=6)
            file = compressor.stream_writer(raw, closefd=False)
        else:
            file = raw
        counted = _Written(file)
        yield counted
        if file is not raw:
            file.close()
        raw.flush()
        os.fsync(raw.fileno())
        raw.close()
        if counted.empty:
            path.unlink(missing_ok=True)
        else:
            os.replace(temporary, path)
    finally:
        raw.close()
        temporary.unlink(missing_ok=True)


class _Written(io.RawIOBase):
    def __init__(self, file: BinaryIO):
        self._file, self.empty = file, True

    def write(self, data: bytes) -> int:
        self.empty = False
        return self._file.write(data)
