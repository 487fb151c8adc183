"""Corpora from Hugging Face, ModelScope or plain addresses, resumed after a break, and as text or conversations.

    python -m data_tools.download list [--language zh] [--kind sft]
    python -m data_tools.download show NAME
    python -m data_tools.download get NAME [--out DIR] [--files GLOB ...] [--limit-bytes 500M] [--convert]
    python -m data_tools.download convert NAME DIR --out DIR

NAME is an entry of the catalogue (data_tools/catalogue.yaml, or --catalogue FILE of the same form), hf:OWNER/NAME,
ms:OWNER/NAME, or an http(s) address. HF_ENDPOINT (a mirror) and HF_TOKEN (gated data) are honoured, proxies too.

Contract: `get` leaves OUT with the files as they are at their source and download.json (downloading/job.py); the same
command after a break loads the missing bytes only. `convert` writes part-*.jsonl with {"text"} or {"messages"} and
summary.json (workshop.py), reading what download.json lists, or all readable files of a folder without one.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_tools.downloading.catalogue import CATALOGUE, HUBS, KINDS, Dataset, find_dataset, load_catalogue
from data_tools.downloading.hubs import endpoint_of, list_files, web_for
from data_tools.downloading.job import RECORD, Job, limited, local_path, without_parts_of
from data_tools.downloading.progress import size_text
from data_tools.downloading.web import Stopped
from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error
from minillm.utils.files import read_json
from minillm.utils.logging import say, warn


def show_list(catalogue: dict[str, Dataset], language: str | None, kind: str | None) -> None:
    """Print a table of the entries."""
    rows = [("NAME", "KIND", "LANGUAGE", "SIZE", "LICENCE", "FROM")]
    for dataset in catalogue.values():
        if language in (None, *dataset.languages) and kind in (None, dataset.kind):
            sources = " ".join(source.kind for source in dataset.sources)
            short = textwrap.shorten(dataset.licence, 36, placeholder=" ...")
            size = ("~" if dataset.bytes is not None else "") + size_text(dataset.bytes)
            rows.append((dataset.name, dataset.kind, " ".join(dataset.languages), size, short, sources))
    if len(rows) == 1:
        raise UserError("no entry of the catalogue is of this --language and --kind: leave one out")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    if any(not dataset.verified for dataset in catalogue.values()):
        print("Sizes are about; names and licences were read from public pages, not tried (`show NAME` says which).")


def show_entry(dataset: Dataset) -> None:
    """Print all that the catalogue knows of an entry."""
    lines = {
        "title": dataset.title,
        "": dataset.description,
        "kind": dataset.kind,
        "languages": ", ".join(dataset.languages),
        "size": "unknown" if dataset.bytes is None else f"about {size_text(dataset.bytes)}",
        "licence": dataset.licence,
        "homepage": dataset.homepage,
    }
    for name, text in dataset.fields.items():
        lines[f"field {name}"] = text
    for source in dataset.sources:
        files = ", ".join(file.url or file.path for file in source.files) or "all files"
        where = files if source.kind == "http" else f"{source.name} ({source.revision}): {files}"
        lines[source.kind] = where
    lines["converted to"] = _form(dataset)
    lines["verified"] = "yes" if dataset.verified else "no: never loaded from its source by this project"
    lines["checked"] = dataset.checked
    print(dataset.name)
    for name, text in lines.items():
        if text:
            print(f"  {name:<20}{' '.join(str(text).split())}")
    if dataset.sources:
        print(f"\npython -m data_tools.download get {dataset.name} --out data/{dataset.name} --convert")


def _form(dataset: Dataset) -> str:
    if dataset.converter is None:
        return "nothing: it is taken as it is"
    form, value = next(iter(dataset.converter.items()))
    if form != "messages":
        return f"text, {'column' if form == 'text' else 'from the template'} {value!r}"
    return "messages, " + ", ".join(f"{key} {item}" for key, item in value.items())


def get_dataset(dataset: Dataset, out: Path, options: argparse.Namespace) -> None:
    """Load a dataset's files into `out`, and convert them if asked to.

    Raises:
        UserError: see the contracts of downloading/job.py, hubs.py and transfer.py.
    """
    source = dataset.source(options.source)
    if options.revision:
        if source.kind == "http":
            raise UserError("--revision is of a hub's repository; a plain address has none")
        source = replace(source, revision=options.revision)
    endpoint = endpoint_of(source, options.endpoint)
    web = web_for(source, endpoint, timeout_s=options.timeout)
    try:
        files = list_files(web, source, endpoint, options.files or ())
    except UserError as error:
        others = [other.kind for other in dataset.sources if other.kind != source.kind]
        if not others:
            raise
        raise UserError(f"{error} -- it is known to be on {' and '.join(others)} too: --source {others[0]}") from None
    if options.dry_run:
        for file, stop in limited(files, options.limit_bytes):
            print(f"{size_text(stop if stop is not None else file.bytes):>10}  {local_path(file, stop)}  {file.url}")
        return
    origin = {"dataset": dataset.name, "source": source.kind, "repository": source.name, "revision": source.revision,
              "licence": dataset.licence}  # fmt: skip
    job = Job(web, out, origin, jobs=options.jobs, update=options.update, verify=options.verify)
    try:
        paths = job.run(files, options.limit_bytes)
    except KeyboardInterrupt:
        say("stopped; the same command goes on with the missing bytes")
        sys.exit(130)
    except Stopped:
        raise UserError("the download was stopped; the same command goes on with the missing bytes") from None
    unchecked = [path for path in paths if job.known[path]["checked"] != "sha256"]
    names = f"{len(paths)} files" if len(paths) > 1 else paths[0]
    if unchecked:
        say(f"{out}: {names}; {len(unchecked)} without a known checksum: {RECORD} has it now, to be compared next time")
    else:
        say(f"{out}: {names}, {'each ' if len(paths) > 1 else ''}as its checksum says")
    if options.convert:
        convert_dataset(dataset, out, out / "converted", paths, options.workers)


def convert_dataset(
    dataset: Dataset, folder: Path, out: Path, paths: list[str] | None = None, workers: int | None = None
) -> dict[str, object]:
    """Turn downloaded files into part-*.jsonl with text or messages; the summary.

    Args:
        paths: the files, relative to `folder`; None takes those of its download.json, or all where there is none.
    """
    from data_tools.downloading.converters import Convert
    from data_tools.downloading.unpacking import corpus_view
    from data_tools.workshop import run_stage

    if dataset.converter is None:
        raise UserError(
            f"the catalogue does not say how {dataset.name} becomes text: read it with --text-column of the other "
            "tools, or write an entry of your own (--catalogue)"
        )
    if paths is None:
        paths = downloaded_paths(folder)
    view = corpus_view(folder, paths)
    return run_stage(Convert, {"converter": dict(dataset.converter)}, [view], out, text=None, workers=workers)


def downloaded_paths(folder: Path) -> list[str]:
    """The files of a downloaded folder, by its record, else all of them."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name the one that `download get` wrote")
    record = folder / RECORD
    if record.is_file():
        return without_parts_of(read_json(record)["files"])
    below = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in below if not any(part.startswith(".") for part in path.parts))


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m data_tools.download`."""
    from data_tools.workshop import byte_size, positive

    parser = argparse.ArgumentParser(
        prog=command_name("data_tools.download"), description="Load corpora, resumed and checked, and convert them."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--catalogue", type=Path, default=CATALOGUE, metavar="FILE", help="your own (YAML)")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", parents=[common], help="what the catalogue has")
    listing.add_argument("--language", metavar="CODE", help="only of this language (zh, en)")
    listing.add_argument("--kind", choices=KINDS, help="only of this kind")
    show = commands.add_parser("show", parents=[common], help="all that is known of one dataset")
    show.add_argument("name", metavar="NAME")
    get = commands.add_parser("get", parents=[common], help="load a dataset's files")
    get.add_argument("name", metavar="NAME", help="of the catalogue, hf:OWNER/NAME, ms:OWNER/NAME, or an address")
    get.add_argument("--out", type=Path, metavar="DIR", help="folder for the files (data/NAME)")
    get.add_argument("--files", action="append", metavar="GLOB", help="only these, such as '*.jsonl' (repeatable)")
    get.add_argument("--source", choices=(*HUBS, "http"), help="where from, if there are several (the first)")
    get.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the hub's repository")
    get.add_argument("--endpoint", metavar="URL", help="address of the hub or of a mirror (HF_ENDPOINT)")
    get.add_argument("--limit-bytes", type=byte_size, metavar="N", help="stop after about so much: 500M, 2G")
    get.add_argument("--jobs", type=int, choices=range(1, 9), default=2, help="files at a time (2)")
    get.add_argument(
        "--timeout", type=float, default=30.0, metavar="S", help="seconds of silence that are a stall (30)"
    )
    get.add_argument("--update", action="store_true", help="load files again that changed, here or at their source")
    get.add_argument("--verify", action="store_true", help="compute the checksums of the files that are here")
    get.add_argument("--dry-run", action="store_true", help="list the files with sizes and addresses, load nothing")
    get.add_argument("--convert", action="store_true", help="then convert into DIR/converted")
    get.add_argument("--workers", type=positive, metavar="N", help="processes that convert (one a core)")
    convert = commands.add_parser("convert", parents=[common], help="downloaded files to .jsonl with text or messages")
    convert.add_argument("name", metavar="NAME", help="the entry whose converter is used")
    convert.add_argument("folder", type=Path, metavar="DIR", help="what `get` wrote, or any folder with such files")
    convert.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the parts and summary.json")
    convert.add_argument("--workers", type=positive, metavar="N", help="processes (one a core)")
    options = parser.parse_args(argv)
    with exit_on_user_error():
        catalogue = load_catalogue(options.catalogue)
        if options.command == "list":
            show_list(catalogue, options.language, options.kind)
            return
        dataset = find_dataset(catalogue, options.name)
        if options.command == "show":
            show_entry(dataset)
        elif options.command == "get":
            if options.convert and dataset.converter is None:
                raise UserError(f"{dataset.name} has no converter in the catalogue: leave --convert out")
            if not dataset.verified and options.name in catalogue:
                warn(
                    f"the entry {dataset.name} was never tried against its source: a name in it may be wrong (see show)"
                )
            get_dataset(dataset, options.out or Path("data") / dataset.name, options)
        else:
            convert_dataset(dataset, options.folder, options.out, None, options.workers)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # `download list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
