"""Labels on records, and a training mixture weighed by topic.

Contract: every record comes out with "topic" (number, null where it has no word of the model) and "topic_probability".
With `split` a record goes to OUT/topic-03/part-00007.jsonl (topic-none where it has none), each folder a corpus of its
own, and OUT/mixture.yaml is the data.train list that weighs them.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from data_tools.parallel import identity, run_units, work_folder
from data_tools.records import UNIT_BYTES, Record, Rejected, TextField, Unit, read_unit, record_text
from data_tools.topics.model import TopicModel, load_model
from data_tools.topics.tally import Tally
from data_tools.workshop import Stage, encode, found_units, merge_results, part_file, report, run_stage
from minillm.utils.files import read_json, sha256_file, write_atomic, write_json
from minillm.utils.logging import say

_SUFFIXES = {"none": ".jsonl", "gz": ".jsonl.gz", "zst": ".jsonl.zst"}
_loaded: dict[str, TopicModel] = {}  # of this process: a model is read once, not once a unit


class Labeller(Stage):
    """Adds the topic to every record; options: model (folder), checksum, field (name of the new field)."""

    name = "lda apply"

    def __init__(self, options: dict[str, object]) -> None:
        super().__init__(options)
        folder = str(options["model"])
        if folder not in _loaded:
            _loaded[folder] = load_model(Path(folder))
        self._model = _loaded[folder]
        self._field = str(options["field"])
        self._documents: dict[str, int] = {}
        self._characters: dict[str, int] = {}

    def process(self, record: Record) -> Record:
        text = record_text(record)
        share = self._model.distribution(text)
        topic = None if share is None else int(share.argmax())
        probability = 0.0 if share is None else round(float(share.max()), 4)
        name = folder_name(topic)
        self._documents[name] = self._documents.get(name, 0) + 1
        self._characters[name] = self._characters.get(name, 0) + len(text)
        return {**record, self._field: topic, f"{self._field}_probability": probability}

    def finish_unit(self) -> dict[str, object]:
        return {"documents": self._documents, "characters": self._characters}


def folder_name(topic: int | None) -> str:
    """`topic-03`; `topic-none` for records without a word of the model."""
    return "topic-none" if topic is None else f"topic-{topic:02d}"


def label_records(
    model: Path,
    paths: Sequence[str],
    out: Path,
    *,
    text: TextField,
    split: bool = False,
    weights: str = "share",
    field: str = "topic",
    workers: int | None = None,
    unit_bytes: int = UNIT_BYTES,
    compress: str = "none",
) -> dict:
    """Label records with the topics of a model; the summary.

    Args:
        weights: share (as many characters as there are) or uniform, for the mixture of `split`.

    Raises:
        UserError: no model, nothing to read, OUT in use.
    """  # fmt: skip
    labels = load_model(model).labels
    folder = model / "model" if (model / "model" / "model.json").is_file() else model
    options = {"model": str(folder.resolve()), "checksum": sha256_file(folder / "model.json"), "field": field}
    if not split:
        summary = run_stage(
            Labeller, options, paths, out, text=text, workers=workers, unit_bytes=unit_bytes, compress=compress
        )
        _say_topics(summary, labels)
        return summary
    paths = [str(path) for path in paths]
    units = found_units(paths, unit_bytes)
    command = {"tool": "lda apply --split", "options": options, "text": asdict(text), "compress": compress,
               "weights": weights, "inputs": identity(units)}  # fmt: skip
    with work_folder(out, paths, command) as work:
        if (out / "summary.json").is_file():
            say(f"{out} is finished already: nothing to do")
            return read_json(out / "summary.json")
        start = time.monotonic()
        arguments = {"options": options, "text": asdict(text), "out": str(out), "compress": compress}
        results = run_units(_split_unit, units, arguments, work, workers=workers, label="label")
        summary = {"tool": "lda apply", "options": options, "inputs": paths, **merge_results(results)}
        summary["seconds"] = round(time.monotonic() - start, 2)
        mixture = mixture_of(summary["statistics"]["characters"], labels, weights)
        write_atomic(out / "mixture.yaml", mixture)
        write_json(out / "summary.json", {**summary, "weights": weights})
        report(summary, out)
        _say_topics(summary, labels)
        say(f"shards of each topic, then a run with this data.train (written to {out / 'mixture.yaml'}):")
        print(_commands(out, summary["statistics"]["documents"]), mixture, sep="\n", end="", flush=True)
        return summary


def _split_unit(unit: Unit, arguments: dict, work: Path, progress: Callable[[int], None]) -> dict:
    """Label a unit and write a part for each topic; parts are renamed when all of the unit is written."""
    stage, out = Labeller(arguments["options"]), Path(arguments["out"])
    tally = Tally(unit.size)
    result = tally.result
    part = f"part-{unit.number:05d}{_SUFFIXES[arguments['compress']]}"
    paths: list[Path] = []
    with ExitStack() as stack:
        files: dict[str, object] = {}
        for record in read_unit(unit, TextField(**arguments["text"]), progress):
            result["records_in"] += 1
            if isinstance(record, Rejected):
                tally.reject(record)
                continue
            labelled = stage.process(record)
            name = folder_name(labelled[stage.options["field"]])
            if name not in files:
                (out / name).mkdir(exist_ok=True)
                paths.append(out / name / part)
                files[name] = stack.enter_context(part_file(paths[-1]))
            files[name].write(encode(labelled))
            result["records_out"] += 1
    result["bytes_out"] = sum(path.stat().st_size for path in paths)
    result["statistics"] = stage.finish_unit()
    return result


def mixture_of(characters: dict[str, int], labels: list[str], weights: str) -> str:
    """The data.train list of a config as YAML: a source for each topic, the weights adding up to 1."""
    names = [name for name in sorted(characters) if characters[name]]
    total = sum(characters[name] for name in names)
    lines = ["data:", "  train:"]
    for name in names:
        weight = characters[name] / total if weights == "share" else 1 / len(names)
        label = "no word of the model" if name == "topic-none" else labels[int(name.removeprefix("topic-"))]
        lines.append(f"    - {{name: {name}, path: shards/{name}, weight: {max(weight, 1e-6):.6f}}}  # {label}")
    return "\n".join(lines) + "\n"


def _commands(out: Path, documents: dict[str, int]) -> str:
    folder = shlex.quote(str(out))
    names = " ".join(name for name in sorted(documents) if documents[name])
    return (
        f"for topic in {names}; do\n"
        f"  python -m data_tools.shards build --corpus {folder}/$topic --out shards/$topic\ndone"
    )


def _say_topics(summary: dict, labels: list[str]) -> None:
    """A line for each topic that was given."""
    documents = summary["statistics"].get("documents", {})
    total = max(1, sum(documents.values()))
    for name in sorted(documents):
        label = "" if name == "topic-none" else labels[int(name.removeprefix("topic-"))]
        say(f"  {name:<11} {documents[name]:>9,} {documents[name] / total:>6.1%}  {label}")
