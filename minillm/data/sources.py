"""`data.train` and `data.validation` to token sources: find the shards, load them, compile them once.

Contract: an entry is a folder of shards, a .tar, a glob, a brace pattern or an http(s) URL of either (braces too).
Token shards are opened where they are, after their tokenizer's fingerprint was checked. Text shards are compiled to
CACHE/<key> under a lock, the key being made of the shards' names, sizes and checksums, the tokenizer's fingerprint and
the format; the next call, and every other rank, finds them there. Nothing is run: `pipe:` and every scheme but http and
https is refused.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from minillm.data.text_shards import (
    INDEX,
    TEXT_FORMAT,
    TEXTS,
    TOKEN_FORMAT,
    FoundShards,
    TextShard,
    kind_of_documents,
    read_shard_index,
    text_shards_of_index,
)
from minillm.data.token_source import TokenSource, open_token_source
from minillm.utils.errors import UserError
from minillm.utils.files import file_lock
from minillm.utils.logging import say

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def open_sources(
    spec: str | Sequence[dict], *, tokenizer_path: Path, cache_dir: Path, max_bad_samples: int = 0
) -> list[TokenSource]:
    """Open everything a run reads.

    Args:
        spec: one entry, or a list of {"name", "path", "weight"} (weight 1 where it is left out).
        tokenizer_path: the run's tokenizer folder.
        cache_dir: where downloads and compiled token shards are kept.
        max_bad_samples: samples of a source that may be left out, each one named; 0 makes the first one an error.

    Raises:
        UserError: nothing matches, a missing or damaged shard, another tokenizer's shards, no documents.
    """
    from minillm.data.text_encoding import fingerprint
    from minillm.data.tokenizer import load_tokenizer

    entries = _entries(spec)
    tokenizer = load_tokenizer(tokenizer_path)
    identity = fingerprint(tokenizer)
    sources = []
    for name, path, weight in entries:
        found = find_shards(path, cache_dir)
        mend = "write the shards again"
        if not is_tokens(found, path):
            folder = _compiled(found, tokenizer, identity, cache_dir, name, max_bad_samples)
            try:
                index = read_shard_index(folder)
            except UserError as error:
                raise UserError(f"{error} (this is the cache: remove {folder}, it is compiled again)") from error
            mend = f"remove {folder}, it is compiled again"
            if index is None:
                raise UserError(f"{folder / INDEX} is missing: {mend}")
            found = [FoundShards(folder, [shard["name"] for shard in index["shards"]], index)]
        sources.append(
            open_token_source(
                found,
                name=name,
                weight=weight,
                fingerprint=identity,
                tokenizer_path=tokenizer_path,
                max_bad_samples=max_bad_samples,
                mend=mend,
            )
        )
    return sources


def tokenize_shards(
    spec: str, *, tokenizer_path: Path, out: Path, workers: int | None = None, max_bad_samples: int = 0
) -> None:
    """Compile text shards to the folder `out`; nothing to do where it already holds the same (data_tools' entry)."""
    from minillm.data.text_encoding import fingerprint
    from minillm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path)
    found = find_shards(spec, out.parent)
    if is_tokens(found, spec):
        raise UserError(f"{spec} holds token shards already: name the text shards they were made of")
    shards, kind = _text_shards(found)
    key = _key(shards, fingerprint(tokenizer))
    with file_lock(out.with_name(f".{out.name}.lock"), busy=lambda: say(f"waiting for another process to write {out}")):
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        if out.exists():
            index = read_shard_index(out) if out.is_dir() else None
            if index is None or index.get("source_key") != key:
                raise UserError(f"{out} exists and was not made of these shards: remove it or choose another --out")
            say(f"{out} holds these token shards already")
            return
        _compile(shards, tokenizer, out, kind, key, workers, max_bad_samples)


def _entries(spec: str | Sequence[dict]) -> list[tuple[str, str, float]]:
    """(name, path, weight) of each entry; all problems of the list at once."""
    if isinstance(spec, (str, Path)):
        return [(_name_of(str(spec)), str(spec), 1.0)]
    problems, entries = [], []
    for number, entry in enumerate(spec):
        keys = set(entry) if isinstance(entry, dict) else {"?"}
        if not {"name", "path"} <= keys <= {"name", "path", "weight"}:
            problems.append(f"entry {number} is {entry!r}: it needs name and path, and may have weight, nothing else")
            continue
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            problems.append(f"entry {number} ({entry['name']}) has weight {weight!r}: it must be a positive number")
        if entry["name"] in [name for name, _, _ in entries]:
            problems.append(f"entry {number} has the name {entry['name']!r} of another: names must differ")
        entries.append((str(entry["name"]), str(entry["path"]), weight))
    if not entries and not problems:
        problems.append("the list is empty: name at least one source")
    if problems:
        raise UserError("data sources: " + "; ".join(problems))
    return entries


def _name_of(path: str) -> str:
    """A name for an entry that has none: the last part of the path that is not a pattern."""
    plain = [part for part in path.split("?")[0].split("/") if part and not set(part) & set("*?[{") and part != INDEX]
    return plain[-1].removesuffix(".tar") if plain else "data"


def find_shards(path: str, cache_dir: Path) -> list[FoundShards]:
    """The shards an entry names, folder by folder in the order of the pattern; URLs are loaded first."""
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        patterns = list(braceexpand(path))
    except UnbalancedBracesError as error:
        raise UserError(f"{path} has unbalanced braces: {error}") from error
    folders: dict[Path, list[str] | None] = {}
    urls: dict[str, list[str] | None] = {}
    for pattern in patterns:
        scheme = _SCHEME.match(pattern)
        if scheme is None:
            for file in _matches(pattern, path):
                _add(folders, file if file.is_dir() else file.parent, None if file.is_dir() else file.name, path)
        elif scheme.group().lower() in ("http:", "https:"):
            from minillm.data.remote_shards import split_url

            _add(urls, *split_url(pattern), path)
        else:
            raise UserError(f"{pattern}: {scheme.group()} is not supported, nothing is run: name a path or an http URL")
    if urls:
        from minillm.data.remote_shards import fetch_shards

        for base, names in urls.items():
            folders[fetch_shards(base, names, cache_dir)] = names
    return [_found(folder, names) for folder, names in folders.items()]


def _matches(pattern: str, path: str) -> list[Path]:
    """The files and folders one pattern without braces stands for."""
    if not set(pattern) & set("*?["):
        file = Path(pattern).expanduser()
        return [file.parent if file.name == INDEX else file]
    files = [Path(match) for match in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))]
    files = [file for file in files if file.suffix == ".tar" or file.is_dir()]
    if not files:
        raise UserError(f"{pattern} matches no shard (.tar) and no folder: check the pattern in {path!r}")
    return files


def _add(groups: dict, folder: Path | str, name: str | None, path: str) -> None:
    """Note that a folder is wanted, as a whole (name None) or shard by shard."""
    if name is None:
        if folder in groups:
            raise UserError(f"{path} names {folder} twice: every shard may be named once")
        groups[folder] = None
        return
    names = groups.setdefault(folder, [])
    if names is None or name in names:
        raise UserError(f"{path} names {name} in {folder} twice: every shard may be named once")
    names.append(name)


def _found(folder: Path, names: list[str] | None) -> FoundShards:
    build = "write shards with: python -m data_tools.shards build"
    if names is not None and any(not name.endswith(".tar") for name in names):
        wrong = next(name for name in names if not name.endswith(".tar"))
        if not (folder / wrong).exists():
            raise UserError(f"{folder / wrong} does not exist: name a folder of shards, or {build}")
        raise UserError(f"{folder / wrong} is not an uncompressed .tar shard: {build}")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: name a folder of shards, or {build}")
    index = read_shard_index(folder)
    listed = [shard["name"] for shard in index["shards"]] if index else sorted(f.name for f in folder.glob("*.tar"))
    if index is None and names is None and not listed:
        raise UserError(f"{folder} holds no shards (.tar): {build}")
    for name in names or ():
        if index is not None and name not in listed:
            raise UserError(f"{folder / name} is not listed in the {INDEX} beside it: use the shards it lists")
        if index is None and not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: bring it back, or leave it out of the pattern")
    return FoundShards(folder, names if names is not None else listed, index)


def is_tokens(found: list[FoundShards], path: str) -> bool:
    """True for token shards, False for text shards; an entry must not mix them."""
    formats = {entry.index["format"] if entry.index else TEXT_FORMAT for entry in found}
    if len(formats) > 1:
        raise UserError(f"{path} names text shards and token shards together: make two sources of them")
    return formats == {TOKEN_FORMAT}


def _text_shards(found: list[FoundShards]) -> tuple[list[TextShard], str]:
    shards: list[TextShard] = []
    kinds = []
    for folder, names, index in found:
        known = {shard.path.name: shard for shard in text_shards_of_index(folder, index)} if index else {}
        mine = [known.get(name) or TextShard(folder / name) for name in names]
        kinds.append(index["documents"] if index and "documents" in index else kind_of_documents(mine))
        shards += mine
    if len(set(kinds)) > 1:
        raise UserError(f"{found[0].folder} and others mix texts and conversations: make two sources of them")
    return shards, kinds[0] if kinds else TEXTS


def _key(shards: list[TextShard], fingerprint: str) -> str:
    from minillm.data.compile_shards import source_key_of

    return hashlib.sha256(json.dumps(source_key_of(shards, fingerprint)).encode()).hexdigest()[:16]


def _compiled(
    found: list[FoundShards], tokenizer, fingerprint: str, cache_dir: Path, name: str, max_bad_samples: int
) -> Path:
    """The folder of the token shards of text shards, compiled now if it is not there."""
    shards, kind = _text_shards(found)
    key = _key(shards, fingerprint)
    out = cache_dir / key
    if not out.is_dir():
        waiting = f"waiting for another process that compiles the text shards of {name} to {out}"
        try:
            with file_lock(cache_dir / f"{key}.lock", busy=lambda: say(waiting)):
                if not out.is_dir():
                    say(f"compiling {len(shards)} text shards of {name} to token shards in {out}")
                    _compile(shards, tokenizer, out, kind, key, None, max_bad_samples)
        except OSError as error:
            raise UserError(
                f"the text shards of {name} cannot be compiled to {out} ({error}): mend that, or name another folder "
                f"in data.cache_dir"
            ) from error
    else:
        say(f"{name}: token shards in {out}")
    return out


def _compile(shards, tokenizer, out: Path, kind: str, key: str, workers: int | None, max_bad_samples: int) -> None:
    from minillm.data.compile_shards import compile_text_shards

    compile_text_shards(
        shards, tokenizer, out, kind=kind, source_key=key, workers=workers, max_bad_samples=max_bad_samples
    )
