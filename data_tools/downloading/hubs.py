"""Which files a dataset has: the listings of Hugging Face and ModelScope, or a plain list of addresses.

Sources of the two interfaces (both read from public documentation and client code, not tried against the live hubs):
Hugging Face `GET /api/datasets/REPO/tree/REVISION?recursive=true` (huggingface_hub's list_repo_tree: entries with type,
path, size, and lfs.oid, which is the content's sha256; further pages by the Link header), files at
`/datasets/REPO/resolve/REVISION/PATH`. ModelScope `GET /api/v1/datasets/OWNER/NAME/repo/tree?Revision&Root&PageNumber&
PageSize` (entries Path, Type blob|tree, Size, Sha256; folder by folder), files at
`/datasets/OWNER/NAME/resolve/REVISION/PATH`.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from urllib.parse import quote, urlencode, urlsplit

from data_tools.downloading.catalogue import Source
from data_tools.downloading.transfer import RemoteFile
from data_tools.downloading.web import Web
from minillm.utils.errors import UserError

HUGGINGFACE, MODELSCOPE = "https://huggingface.co", "https://www.modelscope.cn"
_PAGE = 100
_NOT_DATA = ("README.md", ".gitattributes", "dataset_infos.json")  # left out unless a pattern names them


def endpoint_of(source: Source, given: str | None) -> str:
    """The address a hub is asked at: --endpoint, else HF_ENDPOINT or MODELSCOPE_DOMAIN, else the hub's own."""
    if given is None and source.kind == "huggingface":
        given = os.environ.get("HF_ENDPOINT") or HUGGINGFACE
    elif given is None and source.kind == "modelscope":
        given = os.environ.get("MODELSCOPE_DOMAIN") or MODELSCOPE
    given = given or ""
    if given and "://" not in given:
        given = f"https://{given}"
    if given and (urlsplit(given).scheme not in ("http", "https") or not urlsplit(given).netloc):
        raise UserError(f"the endpoint {given} is not an address: write it like {HUGGINGFACE}")
    return given.rstrip("/")


def web_for(source: Source, endpoint: str, **options: object) -> Web:
    """The way to a source; HF_TOKEN goes with requests to Hugging Face (or the mirror named) only."""
    token = os.environ.get("HF_TOKEN") if source.kind == "huggingface" else None
    host = urlsplit(endpoint).netloc if source.kind == "huggingface" else ""
    return Web(token, host, **options)


def list_files(web: Web, source: Source, endpoint: str, patterns: Sequence[str] = ()) -> list[RemoteFile]:
    """The files of a source in the order of their paths.

    Args:
        patterns: globs on the whole path (`*` also crosses `/`) or on the name; empty takes those of the source.

    Raises:
        UserError: the listing fails, or nothing matches (the message shows what there is).
    """
    if source.kind == "http":
        found = [RemoteFile(file.path, file.url, file.bytes, file.sha256) for file in source.files]
        return _select(found, patterns, source.name)
    wanted = list(patterns) or [file.path for file in source.files]
    if source.kind == "huggingface":
        found = _huggingface(web, endpoint, source)
    else:
        found = _modelscope(web, endpoint, source, wanted)
    known = {file.path: file for file in source.files}
    checked = []
    for file in found:
        pinned = known[file.path].sha256 if file.path in known else None
        if pinned and file.sha256 not in (None, pinned):
            raise UserError(
                f"{source.name}/{file.path} has sha256 {file.sha256} at {endpoint}, the catalogue says {pinned}: it "
                "was changed at its source; if that is right, mend the catalogue (--catalogue)"
            )
        checked.append(replace(file, sha256=file.sha256 or pinned))
    return _select(checked, wanted, source.name)


def _address(endpoint: str, source: Source, path: str) -> str:
    """Where a hub gives out a file; both have the same form."""
    return f"{endpoint}/datasets/{quote(source.name)}/resolve/{quote(source.revision, safe='')}/{quote(path)}"


def _huggingface(web: Web, endpoint: str, source: Source) -> list[RemoteFile]:
    place = f"{quote(source.name)}/tree/{quote(source.revision, safe='')}"
    url: str | None = f"{endpoint}/api/datasets/{place}?recursive=true"
    found = []
    while url:
        entries, links = web.get_json(url)
        if not isinstance(entries, list) or not all(isinstance(e, dict) and "path" in e for e in entries):
            raise UserError(f"{url} does not answer with a list of files: is this a Hugging Face address?")
        for entry in entries:
            if entry.get("type") == "file":
                path, lfs = str(entry["path"]), entry.get("lfs") or {}
                size = lfs.get("size", entry.get("size"))
                found.append(RemoteFile(path, _address(endpoint, source, path), size, lfs.get("oid")))
        following = links.get("next", {}).get("url")
        # a mirror may hand out the hub's own address here
        url = None if following is None else endpoint + urlsplit(following)._replace(scheme="", netloc="").geturl()
    return found


def _modelscope(web: Web, endpoint: str, source: Source, wanted: Sequence[str]) -> list[RemoteFile]:
    """Folder by folder, since the listing is not recursive everywhere; folders that no pattern meets are left out."""
    found: dict[str, RemoteFile] = {}
    folders = [""]
    seen = set(folders)
    while folders:
        folder, page = folders.pop(), 0
        while True:
            page += 1
            query = {"Revision": source.revision, "Root": folder, "PageNumber": page, "PageSize": _PAGE}
            url = f"{endpoint}/api/v1/datasets/{quote(source.name)}/repo/tree?{urlencode(query)}"
            answer, _ = web.get_json(url)
            data = answer.get("Data") if isinstance(answer, dict) else None
            entries = data.get("Files") if isinstance(data, dict) else None
            if not isinstance(entries, list) or not all(isinstance(e, dict) and "Path" in e for e in entries):
                said = answer.get("Message") if isinstance(answer, dict) else None
                raise UserError(f"{url} lists no files{f' ({said})' if said else ''}: check the name {source.name}")
            fresh = 0
            for entry in entries:
                path = str(entry["Path"])
                if entry.get("Type") == "tree":
                    if path not in seen and _may_hold(path, wanted):
                        folders.append(path)
                    fresh += path not in seen
                    seen.add(path)
                elif path not in found:
                    address = _address(endpoint, source, path)
                    found[path] = RemoteFile(path, address, entry.get("Size"), entry.get("Sha256") or None)
                    fresh += 1
            if len(entries) < _PAGE or not fresh:  # nothing new: a server that knows no pages
                break
    return list(found.values())


def _may_hold(folder: str, patterns: Sequence[str]) -> bool:
    """Whether a file below the folder could match."""
    for pattern in patterns or ["*"]:
        fixed = pattern[: min((pattern.find(c) for c in "*?[" if c in pattern), default=len(pattern))]
        if "/" not in pattern or fixed.startswith(folder + "/") or (folder + "/").startswith(fixed):
            return True
    return False


def _select(found: Sequence[RemoteFile], patterns: Sequence[str], name: str) -> list[RemoteFile]:
    ordered = sorted(found, key=lambda file: file.path)
    for file in ordered:
        parts = PurePosixPath(file.path).parts
        if not parts or file.path.startswith("/") or ".." in parts or "\\" in file.path or "\0" in file.path:
            raise UserError(
                f"{name} lists the file {file.path!r}, which would lie outside the folder: nothing is loaded"
            )
    if not patterns:
        return [file for file in ordered if PurePosixPath(file.path).name not in _NOT_DATA]
    chosen = []
    for file in ordered:
        whole, last = file.path, PurePosixPath(file.path).name
        if any(fnmatch.fnmatchcase(whole, p) or ("/" not in p and fnmatch.fnmatchcase(last, p)) for p in patterns):
            chosen.append(file)
    if not chosen:
        there = ", ".join(file.path for file in ordered[:10]) + (", ..." if len(ordered) > 10 else "")
        raise UserError(f"no file of {name} matches {', '.join(patterns)}: there are {there or 'none at all'}")
    return chosen
