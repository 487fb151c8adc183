"""One file from a server to disk, in as many pieces as it takes.

Contract: the file appears under its name only when it is whole and its checksum (where one is known) agrees. Until
then `.NAME.part` holds its first bytes and `.NAME.part.json` tells of what; the next call, of this process or of
another, asks for the missing bytes only: by Range, and where no checksum is known by If-Range too, so that a file that
changed in between comes from its beginning. What cannot be continued safely (no validator and no checksum, a server
without ranges) starts anew. The state is left for the caller, who drops it (`forget_state`) once the file is recorded:
a file that lies beside its state was finished by this tool (`recorded_late`).
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.downloading.progress import Progress
from data_tools.downloading.web import Stopped, Transient, Web, root_cause
from minillm.utils.errors import UserError
from minillm.utils.files import read_json, sha256_file, sync_file, write_json
from minillm.utils.logging import say, warn

if TYPE_CHECKING:
    import requests

SPARE_BYTES = 64 << 20  # left free on the disk
_BLOCK_BYTES = 1 << 20
_SLOWEST = 100  # bytes a second over two timeouts; slower counts as stalled
_RESTARTS = 3


@dataclass(frozen=True)
class RemoteFile:
    """A file of a dataset: path within it, where it is, and what is known of its content."""

    path: str
    url: str
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Fetched:
    """What was written: size, checksum, and how the content was checked ("sha256" against a known one, or "size")."""

    bytes: int
    sha256: str
    checked: str
    etag: str | None = None


class _Restart(Exception):
    """What is here does not belong to what the server has now."""


def free_bytes(folder: Path) -> int:
    """Bytes that may be written to the disk of `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free - SPARE_BYTES


def part_paths(target: Path) -> tuple[Path, Path]:
    """(unfinished file, its state) of a target."""
    return target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.part.json")


def bytes_here(target: Path) -> int:
    """Bytes of the unfinished file."""
    part, state = part_paths(target)
    return part.stat().st_size if part.exists() and state.exists() else 0


def forget_state(target: Path) -> None:
    """Drop the state of a finished file."""
    part_paths(target)[1].unlink(missing_ok=True)


def recorded_late(target: Path, url: str) -> Fetched | None:
    """What a finished file is whose process died before it was recorded; None for any other file."""
    part, state_path = part_paths(target)
    if part.exists() or not state_path.exists():
        return None
    state = read_json(state_path)
    if not isinstance(state, dict) or state.get("url") != url:
        return None
    size, digest = target.stat().st_size, sha256_file(target)
    whole = state.get("stop_at") is None
    if whole and (state.get("bytes") not in (None, size) or state.get("sha256") not in (None, digest)):
        return None
    return Fetched(size, digest, "sha256" if whole and state.get("sha256") else "size", state.get("etag"))


def fetch_file(web: Web, remote: RemoteFile, target: Path, progress: Progress, stop_at: int | None = None) -> Fetched:
    """Bring one file to disk; see the module's contract.

    Args:
        progress: told of every byte that arrives, or is found here.
        stop_at: load the first bytes only, up to the last line end within them.

    Raises:
        UserError: refused, gone, never whole, another checksum twice, no room on the disk.
        Stopped: `web.stop` was set; what has arrived stays.
    """
    transfer = _Transfer(web, remote, target, progress, stop_at)
    try:
        return transfer.run()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{target}: the disk is full: make room, then run the same command again") from None
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None


class _Transfer:
    def __init__(self, web: Web, remote: RemoteFile, target: Path, progress: Progress, stop_at: int | None) -> None:
        self.web, self.remote, self.target, self.progress, self.stop_at = web, remote, target, progress, stop_at
        self.part, self.state_path = part_paths(target)
        self.expected = remote.sha256  # may become known with the first answer
        self.etag: str | None = None
        self.last_modified: str | None = None
        self.total = remote.bytes
        self.have = 0
        self.digest = hashlib.sha256()
        self.restarts = self.mismatches = 0
        self.whole = self.packed = False  # packed: compressed for the way, of which no part can be asked for
        self.announced = remote.bytes is not None or stop_at is not None

    def run(self) -> Fetched:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._recall()
        self.web.retry(self.remote.url, self._attempt)
        self.part.touch()  # an empty file has no body
        if self.stop_at is not None:
            self._cut_at_line_end()
        sync_file(self.part)
        os.replace(self.part, self.target)
        sync_file(self.target.parent)
        checked = "sha256" if self.expected and self.stop_at is None else "size"
        return Fetched(self.have, self.digest.hexdigest(), checked, self.etag)

    def _recall(self) -> None:
        """Take up what an earlier call left, if it is of the same file."""
        if not (self.part.exists() and self.state_path.exists()):
            return
        try:
            state = read_json(self.state_path)
        except UserError:
            return
        if not isinstance(state, dict) or state.get("packed"):
            return
        same_content = self.expected is not None and state.get("sha256") == self.expected
        same_place = state.get("url") == self.remote.url and self.expected in (None, state.get("sha256"))
        if not (same_content or same_place) or state.get("stop_at") != self.stop_at:
            say(f"{self.remote.path}: what is here is of another version; starting over")
            return
        self.expected, self.total = state.get("sha256"), state.get("bytes") or self.total
        self._learn(self.total)
        if state.get("url") == self.remote.url:  # a mirror has its own tags
            self.etag, self.last_modified = state.get("etag"), state.get("last_modified")
        with open(self.part, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                self.digest.update(block)
                self.have += len(block)
        self.progress.add(self.have)
        if self.have:
            say(f"{self.remote.path}: going on after {self.have:,} bytes")
        else:
            self._start_over()

    def _attempt(self) -> None:
        """One request, from where the last ended."""
        try:
            self._request()
        except _Restart as reason:
            self.restarts += 1
            if self.restarts > _RESTARTS:
                raise UserError(f"{self.remote.url} {reason}, {_RESTARTS} times: try again later") from None
            warn(f"{self.remote.path}: {reason}; starting over")
            self._start_over()
            raise Transient(str(reason), wait_s=0, progressed=True) from None
        if self.expected and self.stop_at is None and self.digest.hexdigest() != self.expected:
            found, wanted = self.digest.hexdigest(), self.expected
            self.mismatches += 1
            self._start_over()
            self.part.unlink(missing_ok=True)
            self.state_path.unlink(missing_ok=True)
            if self.mismatches > 1:
                raise UserError(
                    f"{self.remote.url} has sha256 {found}, {wanted} was expected, twice: the file was changed or "
                    "damaged at its source; compare with the dataset's page"
                )
            raise Transient(f"its content has sha256 {found}, not {wanted}", wait_s=0)

    def _request(self) -> None:
        if self.have and not self._is_whole():
            if self.packed:
                raise _Restart("comes compressed, which cannot be continued")
            if not (self._validator() or self.expected):
                raise _Restart("cannot be continued safely: the server gave no ETag, date or checksum")
        if self._is_whole():
            return
        headers = {}
        if self.have or self.stop_at is not None:
            headers["Range"] = f"bytes={self.have}-{'' if self.stop_at is None else self.stop_at - 1}"
        # with a checksum the pieces are proved to fit in the end; the tags of a hub's stores differ from day to day
        if self.have and not self.expected and (validator := self._validator()):
            headers["If-Range"] = validator
        with self.web.open(self.remote.url, headers) as response:
            self._take_head(response)
            if not self._is_whole():
                self._take_body(response)

    def _is_whole(self) -> bool:
        goal = self.total if self.stop_at is None else min(self.stop_at, self.total or self.stop_at)
        return self.whole or (goal is not None and self.have == goal)

    def _validator(self) -> str | None:
        """What If-Range may hold: a strong ETag, or the date."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def _take_head(self, response: requests.Response) -> None:
        """Compare the answer's headers with what is here; on a fresh start remember them."""
        etag, encoded = response.headers.get("ETag"), response.headers.get("Content-Encoding", "identity")
        match = re.match(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
        total = int(match[2]) if match and match[2] != "*" else None
        if response.status_code == 416:
            if total == self.have and (self.expected or not self.have):
                self.total = total
                return
            raise _Restart(f"has no bytes after {self.have:,}")
        if response.status_code == 206 and (not match or int(match[1] or -1) != self.have):
            raise _Restart("is sent from another place than asked for")
        told, self.packed = linked_sha256(response), encoded != "identity"
        if self.have:
            if response.status_code == 200:
                raise _Restart("comes from its beginning (the server knows no ranges, or the file changed)")
            other_tag = not self.expected and self.etag and etag and etag != self.etag
            if other_tag or self.total not in (None, total) or told and self.expected and told != self.expected:
                raise _Restart("was changed on the server meanwhile")
            return
        if response.status_code == 200 and encoded == "identity" and "Content-Length" in response.headers:
            total = int(response.headers["Content-Length"])
        if total is not None and self.remote.bytes not in (None, total):
            raise UserError(
                f"{self.remote.url} has {total:,} bytes, {self.remote.bytes:,} were announced: the dataset is being "
                "changed, or this address gives something else; try again later or another --endpoint"
            )
        if told and self.expected and told != self.expected:
            raise UserError(
                f"{self.remote.url}: the server announces sha256 {told}, {self.expected} was expected: the file was "
                "changed at its source"
            )
        self._learn(total)
        self.total, self.etag, self.expected = total, etag, self.expected or told
        self.last_modified = response.headers.get("Last-Modified")
        missing = (total if self.stop_at is None else min(self.stop_at, total or self.stop_at)) or 0
        if missing > free_bytes(self.target.parent):
            raise UserError(no_room(self.target.parent, missing))
        state = {"url": self.remote.url, "bytes": total, "sha256": self.expected, "etag": etag}
        state |= {"last_modified": self.last_modified, "stop_at": self.stop_at, "packed": self.packed}
        write_json(self.state_path, state)

    def _take_body(self, response: requests.Response) -> None:
        from urllib3.exceptions import HTTPError

        before = window_have = self.have
        window_start = time.monotonic()
        with open(self.part, "ab" if self.have else "wb") as file:
            while not (self.stop_at is not None and self.have >= self.stop_at):
                try:
                    block = response.raw.read1(_BLOCK_BYTES, decode_content=True)
                except (HTTPError, http.client.HTTPException, OSError) as error:
                    raise Transient(root_cause(error), progressed=self.have > before) from None
                if not block:
                    break
                if self.stop_at is not None:
                    block = block[: self.stop_at - self.have]
                file.write(block)
                self.digest.update(block)
                self.have += len(block)
                self.progress.add(len(block))
                if self.web.stop.is_set():
                    raise Stopped
                if (passed := time.monotonic() - window_start) > 2 * self.web.timeout_s:
                    if self.have - window_have < _SLOWEST * passed:
                        raise Transient(f"only {self.have - window_have} bytes came in {passed:.0f} s")
                    window_start, window_have = time.monotonic(), self.have
        if self.total is None:
            self.whole = True
            return
        if self.have > self.total:
            raise _Restart(f"is longer than its {self.total:,} bytes")
        if not self._is_whole():
            raise Transient(f"it ended after {self.have:,} of {self.total:,} bytes", progressed=self.have > before)

    def _learn(self, total: int | None) -> None:
        """Tell the progress a size that it did not know."""
        if total is not None and not self.announced:
            self.announced = True
            self.progress.learn(total)

    def _start_over(self) -> None:
        self.progress.add(-self.have)
        self.have, self.digest, self.whole = 0, hashlib.sha256(), False
        self.expected, self.total, self.etag, self.last_modified = self.remote.sha256, self.remote.bytes, None, None

    def _cut_at_line_end(self) -> None:
        """Drop the unfinished last line of a file that was loaded in part."""
        if self.total is not None and self.have >= self.total:
            return
        with open(self.part, "rb+") as file:
            place = self.have
            while place > 0:
                begin = max(0, place - _BLOCK_BYTES)
                file.seek(begin)
                found = file.read(place - begin).rfind(b"\n")
                if found >= 0:
                    break
                place = begin
            else:
                first = f"{self.remote.path} has no line end in its first {self.stop_at:,} bytes"
                raise UserError(f"{first}: raise --limit-bytes")
            self.have = begin + found + 1
            file.truncate(self.have)
        self.digest = hashlib.sha256()
        with open(self.part, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                self.digest.update(block)


def linked_sha256(response: requests.Response) -> str | None:
    """The checksum that the Hugging Face hub tells: X-Linked-Etag is the sha256 of a large (LFS) file."""
    for answer in (*response.history, response):
        tag = answer.headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"')
        if re.fullmatch(r"[0-9a-f]{64}", tag):
            return tag
    return None


def no_room(folder: Path, missing: int) -> str:
    """The sentence for a disk that is too small."""
    return (
        f"{folder} has {max(0, free_bytes(folder)) / 1e9:.2f} GB free (beside a reserve), {missing / 1e9:.2f} GB are "
        "to be loaded: make room, choose another --out, or take less (--files, --limit-bytes)"
    )
