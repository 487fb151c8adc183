"""Shards behind http(s) URLs, kept in a folder on disk.

Contract: `fetch_shards` returns a local folder that looks like the remote one: index.json where the server has one, and
the shards asked for. A file appears under its name only when it is whole: as long as Content-Length says, and with the
size and sha256 of the remote index where there is one. Files already there are not loaded again unless the remote index
names others. Other processes wait. No scheme but http and https is followed, redirects included.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from minillm.data.text_shards import INDEX, check_shard_index, read_shard_index
from minillm.utils.errors import UserError
from minillm.utils.files import file_lock, sha256_file, sync_file, write_json
from minillm.utils.logging import say, warn

ATTEMPTS = 4
_TIMEOUT_S = 30
_BLOCK_BYTES = 1 << 20


class _Gone(Exception):
    """The server answers that there is no such file (4xx): asking again does not help."""


class _Interrupted(Exception):
    """The transfer failed in a way that another try may mend."""


def split_url(url: str) -> tuple[str, str | None]:
    """(URL of the folder, name of the shard); the name is None when the URL names a folder or its index.json."""
    parts = urlsplit(url)
    folder, _, name = parts.path.rpartition("/")
    if name == INDEX:
        name = ""
    elif name and not name.endswith(".tar"):
        folder, name = parts.path, ""
    return urlunsplit((parts.scheme, parts.netloc, folder.rstrip("/") + "/", parts.query, "")), name or None


def fetch_shards(base: str, names: Sequence[str] | None, cache_dir: Path, *, wait_s: float = 1.0) -> Path:
    """Bring shards of one remote folder to disk.

    Args:
        base: URL of the folder, from `split_url`.
        names: the shards; None takes all that the remote index.json lists.
        wait_s: pause after the first failed attempt; it doubles.

    Returns:
        A folder below `cache_dir` with the shards, and index.json if there is one.

    Raises:
        UserError: not reachable, no such file, cut short or changed every time, or no index to tell the names.
    """
    folder = cache_dir / "downloads" / hashlib.sha256(base.encode()).hexdigest()[:16]
    with file_lock(folder.with_suffix(".lock"), busy=lambda: say(f"waiting for another process that loads {base}")):
        folder.mkdir(parents=True, exist_ok=True)
        index = _fetch_index(base, folder, wait_s)
        entries = {entry["name"]: entry for entry in index["shards"]} if index else {}
        if names is None:
            if index is None:
                raise UserError(f"{base} has no {INDEX} to tell its shards: name them, {base}name-{{000..009}}.tar")
            names = list(entries)
        missing = [name for name in names if not _is_here(folder / name, entries.get(name))]
        if missing:
            say(f"loading {len(missing)} of {len(names)} shards from {base} to {folder}")
        for name in missing:
            if index is not None and name not in entries:
                raise UserError(f"{_join(base, name)}: the {INDEX} beside it does not list {name}")
            _download(_join(base, name), folder / name, entries.get(name), wait_s)
    return folder


def _join(base: str, name: str) -> str:
    parts = urlsplit(base)
    return urlunsplit(parts._replace(path=parts.path + name))


def _is_here(path: Path, entry: dict | None) -> bool:
    """True when the file was loaded before; `path` got its name only after its content was checked."""
    return path.is_file() and (entry is None or path.stat().st_size == entry["bytes"])


def _fetch_index(base: str, folder: Path, wait_s: float) -> dict | None:
    """The remote index.json, kept in `folder`; the one kept before when the server cannot be reached."""
    known = read_shard_index(folder)
    url = _join(base, INDEX)
    try:
        raw = _retry(url, lambda: _read_small(url), wait_s)
    except _Gone:
        return None
    except UserError as error:
        if known is None:
            raise
        warn(f"{error}; going on with the shards in {folder}")
        return known
    try:
        index = check_shard_index(json.loads(raw), url)
    except (ValueError, UserError) as error:
        warn(f"{url} is not an index of shards ({error}); going on without one")
        return None
    if known is not None and known != index:
        before = {entry["name"]: entry for entry in known["shards"]}
        for entry in index["shards"]:  # the same name with another content must be loaded again
            if before.get(entry["name"]) != entry:
                (folder / entry["name"]).unlink(missing_ok=True)
    write_json(folder / INDEX, index)
    return index


def _open(url: str):
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url}: only http and https are followed")
    opener = urllib.request.build_opener(_SameKindRedirects)
    return opener.open(urllib.request.Request(url, headers={"User-Agent": "minillm"}), timeout=_TIMEOUT_S)


class _SameKindRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, url):
        if urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"{request.full_url} redirects to {url}: only http and https are followed")
        return super().redirect_request(request, file, code, message, headers, url)


def _retry(url: str, attempt, wait_s: float):
    """Run `attempt` until it succeeds, ATTEMPTS times at most; _Gone passes through."""
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            if 400 <= error.code < 500 and error.code not in (408, 429):
                raise _Gone(f"the server answers {error.code} {error.reason}") from error
            reason: object = f"the server answers {error.code} {error.reason}"
        except (_Interrupted, urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = error
        if number < ATTEMPTS:
            warn(f"{url}: {reason}; trying again ({number} of {ATTEMPTS})")
            time.sleep(wait_s * 2 ** (number - 1))
    raise UserError(f"{url} could not be loaded in {ATTEMPTS} attempts ({reason}): check the address and the server")


def _read_small(url: str) -> bytes:
    with _open(url) as response:
        data = response.read()
        _check_length(response, len(data))
        return data


def _check_length(response, received: int) -> None:
    length = response.headers.get("Content-Length")
    if length is not None and int(length) != received:
        raise _Interrupted(f"it ended after {received} of {length} bytes")


def _download(url: str, path: Path, entry: dict | None, wait_s: float) -> None:
    try:
        _retry(url, lambda: _download_once(url, path, entry), wait_s)
    except _Gone as error:
        raise UserError(f"{url} could not be loaded ({error}): check the address") from error


def _download_once(url: str, path: Path, entry: dict | None) -> None:
    from tqdm import tqdm

    temporary = path.with_name(f".{path.name}.part")
    received = 0
    try:
        with _open(url) as response, open(temporary, "wb") as file:
            total = int(response.headers.get("Content-Length") or 0) or None
            bar = tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=None, file=sys.stderr)
            with bar:
                while block := response.read(_BLOCK_BYTES):
                    file.write(block)
                    received += len(block)
                    bar.update(len(block))
            _check_length(response, received)
        if entry is not None and received != entry["bytes"]:
            raise _Interrupted(f"it has {received} bytes, its {INDEX} says {entry['bytes']}")
        if entry is not None and sha256_file(temporary) != entry["sha256"]:
            raise _Interrupted(f"it does not match the checksum in its {INDEX}")
        sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
