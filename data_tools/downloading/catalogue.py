"""The catalogue of corpora: a YAML file, checked when it is read.

Contract: `load_catalogue` returns every entry or raises one UserError that lists all mistakes, a line each, with the
entry and the key. The form of an entry is in data_tools/catalogue.yaml's own header; the converter's in converters.py.
"""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from data_tools.downloading.converters import converter_problems
from minillm.utils.errors import UserError

CATALOGUE = Path(__file__).parents[1] / "catalogue.yaml"
HUBS = ("huggingface", "modelscope")
KINDS = ("pretrain", "sft", "preference", "other")
_REVISION = {"huggingface": "main", "modelscope": "master"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: a path or glob on a hub, or an address with the name it gets."""

    path: str
    url: str = ""
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """Where a dataset lies: a repository of a hub with the files to take, or plain addresses."""

    kind: str  # huggingface, modelscope or http
    name: str  # OWNER/NAME, or for http the first address
    files: tuple[SourceFile, ...] = ()
    revision: str = "main"


@dataclass(frozen=True)
class Dataset:
    """An entry of the catalogue."""

    name: str
    sources: tuple[Source, ...]
    title: str = ""
    kind: str = "other"
    languages: tuple[str, ...] = ()
    licence: str = "unknown"
    homepage: str = ""
    description: str = ""
    bytes: int | None = None  # of the files taken; approximate
    fields: Mapping[str, str] = field(default_factory=dict)
    converter: Mapping[str, object] | None = None
    verified: bool = False  # loaded once from its source, by a person or a test
    checked: str = ""

    def source(self, kind: str | None) -> Source:
        """The source of a kind; the first one when `kind` is None."""
        for source in self.sources:
            if kind in (None, source.kind):
                return source
        known = ", ".join(source.kind for source in self.sources)
        raise UserError(f"{self.name} is not known to be on {kind}: --source may be {known}")


def load_catalogue(path: Path = CATALOGUE) -> dict[str, Dataset]:
    """Read and check a catalogue; see the module's contract."""
    import yaml

    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except OSError as error:
        raise UserError(f"the catalogue {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the catalogue {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("datasets"), dict):
        raise UserError(f'the catalogue {path} has no "datasets": write `datasets:` and an entry a name below it')
    problems: list[str] = []
    if extra := sorted(map(str, set(raw) - {"datasets"})):
        problems.append(f"{extra[0]}: unknown key at the top; the entries stand below `datasets:`")
    found = {}
    for name, entry in raw["datasets"].items():
        reader = _Reader(str(name), problems)
        found[str(name)] = reader.dataset(entry)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
        raise UserError(f"the catalogue {path} has {count}:\n{listed}")
    return {name: dataset for name, dataset in found.items() if dataset is not None}


def find_dataset(catalogue: Mapping[str, Dataset], name: str) -> Dataset:
    """An entry by its name, or one made for `hf:OWNER/NAME`, `ms:OWNER/NAME` or an http(s) address."""
    prefix, _, rest = name.partition(":")
    if prefix in ("hf", "ms"):
        if not _REPOSITORY.fullmatch(rest):
            raise UserError(f"{name}: write it as {prefix}:OWNER/NAME")
        kind = HUBS[prefix == "ms"]
        return Dataset(rest.replace("/", "--"), (Source(kind, rest, (), _REVISION[kind]),))
    if prefix in ("http", "https"):
        file_name = name_of_url(name)
        if not file_name:
            raise UserError(f"{name} names no file: the address has to end with a file's name")
        return Dataset(file_name, (Source("http", name, (SourceFile(file_name, name),)),))
    if name not in catalogue:
        near = difflib.get_close_matches(name, catalogue, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise UserError(
            f"{name} is not in the catalogue: {hint}`download list` shows all; hf:OWNER/NAME, ms:OWNER/NAME and "
            "addresses work without an entry"
        )
    return catalogue[name]


def name_of_url(url: str) -> str:
    """The last part of an address, fit for a file's name."""
    name = unquote(PurePosixPath(urlsplit(url).path).name)
    return "" if name in (".", "..") or "/" in name else name


def _loader() -> type:
    """YAML's safe loader, except that a key given twice is an error instead of the last one winning."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`, whose keys may be given anew
                continue
            key = loader.construct_object(key_node)
            if not isinstance(key, (str, int, float, bool, type(None), datetime.date)) or key in seen:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", mark)
            seen.add(key)
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader


class _Reader:
    """Reads one entry and notes what is wrong with it."""

    KEYS = {
        "title": str, "kind": str, "languages": list, "licence": str, "homepage": str, "description": str, "bytes": int,
        "fields": dict, "converter": dict, "verified": bool, "checked": str, "sources": list,
    }  # fmt: skip
    NEEDED = ("title", "kind", "languages", "licence", "sources", "verified")

    def __init__(self, name: str, problems: list[str]) -> None:
        self.name, self.problems = name, problems

    def problem(self, where: str, what: str) -> None:
        self.problems.append(f"{self.name}{where}: {what}")

    def keys(self, value: object, where: str, types: Mapping[str, type], needed: tuple[str, ...] = ()) -> dict:
        """The known keys of a mapping whose values have the right types."""
        if not isinstance(value, dict):
            self.problem(where, f"has to be a mapping with {', '.join(types)}, it is {_kind(value)}")
            return {}
        good = {}
        for key, item in value.items():
            if key not in types:
                near = difflib.get_close_matches(str(key), types, n=1)
                self.problem(f"{where}.{key}", f"unknown key{f'; did you mean {near[0]}?' if near else ''}")
            elif not isinstance(item, types[key]) or types[key] is int and isinstance(item, bool):
                self.problem(f"{where}.{key}", f"has to be {_TYPE_NAMES[types[key]]}, it is {_kind(item)}")
            elif types[key] is int and item < 0:
                self.problem(f"{where}.{key}", f"has to be a number of bytes, it is {item}")
            else:
                good[key] = item
        for key in needed:
            if key not in value:
                self.problem(where, f"{key} is missing")
        return good

    def dataset(self, entry: object) -> Dataset | None:
        before = len(self.problems)
        if not _NAME.fullmatch(self.name):
            self.problem("", "a name is made of letters, digits, dots, dashes and underscores")
        good = self.keys(entry, "", self.KEYS, self.NEEDED)
        if good.get("kind", KINDS[0]) not in KINDS:
            self.problem(".kind", f"{good['kind']!r} is none of {', '.join(KINDS)}")
        for key in ("languages", "fields"):
            items = good.get(key, [])
            values = items.values() if isinstance(items, dict) else items
            if not all(isinstance(item, str) for item in (*items, *values)):
                self.problem(f".{key}", "has to hold strings only (write no: as 'no')")
        if good.get("homepage") and urlsplit(good["homepage"]).scheme not in ("http", "https"):
            self.problem(".homepage", f"{good['homepage']} is not an http(s) address")
        if "converter" in good:
            for where, what in converter_problems(good["converter"]):
                self.problem(f".converter{where}", what)
        sources = good.pop("sources", [])
        read = [self.source(source, f".sources[{number}]") for number, source in enumerate(sources)]
        if not read and isinstance(entry, dict) and entry.get("sources") == []:
            self.problem(".sources", "is empty")
        kinds = [source.kind for source in read if source]
        for kind in {kind for kind in kinds if kinds.count(kind) > 1}:
            self.problem(".sources", f"{kind} stands twice")
        if len(self.problems) > before:
            return None
        good["languages"] = tuple(good["languages"])
        return Dataset(self.name, tuple(source for source in read if source), **good)

    def source(self, value: object, where: str) -> Source | None:
        kinds = [kind for kind in (*HUBS, "http") if isinstance(value, dict) and kind in value]
        if len(kinds) != 1:
            self.problem(where, "needs one of huggingface: OWNER/NAME, modelscope: OWNER/NAME, http: [addresses]")
            return None
        kind = kinds[0]
        if kind == "http":
            good = self.keys(value, where, {"http": list})
            files = [self.file(item, f"{where}.http[{n}]", "url") for n, item in enumerate(good.get("http", []))]
            if not files:
                self.problem(f"{where}.http", "is empty")
                return None
            names = [file.path for file in files if file]
            for name in sorted({name for name in names if names.count(name) > 1}):
                self.problem(f"{where}.http", f"two addresses would both become {name}: give one a path")
            return None if None in files else Source("http", files[0].url, tuple(files))
        good = self.keys(value, where, {kind: str, "revision": str, "files": list})
        name = good.get(kind, "")
        if kind in good and not _REPOSITORY.fullmatch(name):
            self.problem(f"{where}.{kind}", f"{name!r} is not of the form OWNER/NAME")
        files = [self.file(item, f"{where}.files[{n}]", "path") for n, item in enumerate(good.get("files", []))]
        return None if None in files else Source(kind, name, tuple(files), good.get("revision", _REVISION[kind]))

    def file(self, value: object, where: str, main: str) -> SourceFile | None:
        """A string, or a mapping with bytes and sha256 beside it."""
        before = len(self.problems)
        types = {"path": str, "bytes": int, "sha256": str} | ({"url": str} if main == "url" else {})
        good = self.keys({main: value} if isinstance(value, str) else value, where, types, (main,))
        if "sha256" in good and not re.fullmatch(r"[0-9a-f]{64}", good["sha256"]):
            self.problem(f"{where}.sha256", "has to be 64 hexadecimal digits in small letters")
        if main == "url" and "url" in good:
            if urlsplit(good["url"]).scheme not in ("http", "https"):
                self.problem(f"{where}.url", f"{good['url']} is not an http(s) address")
            good.setdefault("path", name_of_url(good["url"]))
        path = PurePosixPath(good.get("path", "x"))
        if not path.parts or path.is_absolute() or ".." in path.parts:
            self.problem(f"{where}.path", f"{good.get('path')!r} does not name a file inside the folder")
        return SourceFile(**good) if len(self.problems) == before else None


_TYPE_NAMES = {
    str: "a string", int: "a whole number", bool: "yes or no", list: "a list", dict: "a mapping",
}  # fmt: skip


def _kind(value: object) -> str:
    return "nothing" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)
