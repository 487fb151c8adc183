"""All files of a dataset into one folder, with a record of what was loaded and how it was checked.

Contract: OUT/download.json lists every file with address, size, sha256 and how it was checked ("sha256": compared with
one that was known before; "size": no checksum was known, the one found is recorded and compared from now on). A file
that is there and agrees with the record is not loaded again; a file that differs, here or at its source, is an error
until --update takes the new one. One process writes into a folder.
"""

from __future__ import annotations

import datetime
import re
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path, PurePosixPath

from data_tools.downloading.progress import Progress, size_text
from data_tools.downloading.transfer import (
    Fetched,
    RemoteFile,
    bytes_here,
    fetch_file,
    forget_state,
    free_bytes,
    no_room,
    recorded_late,
)
from data_tools.downloading.web import Stopped, Web
from minillm.utils.errors import UserError
from minillm.utils.files import file_lock, read_json, sha256_file, write_json
from minillm.utils.logging import say

RECORD = "download.json"
_RECORD_EVERY_S = 2.0  # there may be ten thousand small files
_LINES = (".jsonl", ".txt", ".csv", ".tsv")  # of these the beginning of a file is of use


class Job:
    """One `download get`.

    Args:
        origin: what download.json says of the source (dataset, hub, repository, revision).
        jobs: files at a time.
        update: load files again that changed.
        verify: compute the checksums of files that are here.
    """

    def __init__(
        self,
        web: Web,
        out: Path,
        origin: dict[str, object],
        *,
        jobs: int = 2,
        update: bool = False,
        verify: bool = False,
    ) -> None:
        self.web, self.out, self.origin = web, out, origin
        self.jobs, self.update, self.verify = jobs, update, verify
        self.known: dict[str, dict] = {}
        self._noting = threading.Lock()
        self._unrecorded: list[str] = []
        self._recorded_at = 0.0

    def run(self, files: Sequence[RemoteFile], limit_bytes: int | None = None) -> list[str]:
        """Load the files; their paths below `out`.

        Args:
            limit_bytes: stop after about so many bytes: whole files, and the first lines of the one that crosses it.
        """
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file, and a folder is needed: name another one")

        def busy() -> None:
            raise UserError(f"another download writes into {self.out}: wait for it, or choose another --out")

        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.out} cannot be made ({error.strerror}): name another folder") from None
        with file_lock(self.out / ".download.lock", busy=busy):
            self._read_record()
            plan = limited(files, limit_bytes)
            for folder in {self.out, *((self.out / file.path).parent for file, _ in plan)}:
                for left_by_a_kill in (*folder.glob(f".{RECORD}.*.tmp"), *folder.glob("..*.part.json.*.tmp")):
                    left_by_a_kill.unlink()
            try:
                missing = [(file, stop) for file, stop in plan if not self._is_here(file, stop)]
                self._load(missing, len(plan))
            finally:
                self._write_record()
            return [local_path(file, stop) for file, stop in plan]

    def _read_record(self) -> None:
        path = self.out / RECORD
        if not path.is_file():
            return
        record = read_json(path)
        if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
            raise UserError(f"{path} is not the record of a download: move it away")
        if record.get("dataset") != self.origin["dataset"]:
            there, wanted = record.get("dataset"), self.origin["dataset"]
            raise UserError(f"{self.out} holds the dataset {there}: choose another --out for {wanted}")
        self.known = record["files"]

    def _is_here(self, file: RemoteFile, stop: int | None) -> bool:
        """True when the file need not be loaded.

        Raises:
            UserError: it is here with another content, or changed at its source, and --update was not given.
        """
        path = local_path(file, stop)
        target, known = self.out / path, self.known.get(path)
        if not target.is_file():
            if known and stop is None and file.sha256 not in (None, known["sha256"]):
                self._changed(path, f"it changed at its source since it was loaded on {known['date']}")
            return False
        size = target.stat().st_size
        if known is None:
            if late := recorded_late(target, file.url):
                self._note(path, file, late)
                return True
            if file.sha256 and stop is None and file.bytes in (None, size) and sha256_file(target) == file.sha256:
                self._note(path, file, Fetched(size, file.sha256, "sha256"))
                return True
            return not self._changed(path, f"{target} is there, and this tool did not load it")
        if size != known["bytes"] or self.verify and sha256_file(target) != known["sha256"]:
            return not self._changed(path, f"{target} is not what was loaded on {known['date']} any more")
        if stop is None and (file.bytes not in (None, size) or file.sha256 not in (None, known["sha256"])):
            return not self._changed(path, f"it changed at its source since it was loaded on {known['date']}")
        forget_state(target)  # of a process that was killed after it had recorded the file
        return True

    def _changed(self, path: str, how: str) -> bool:
        """True to load the file again."""
        if not self.update:
            raise UserError(f"{path}: {how}: --update loads it again, or choose another --out")
        self.known.pop(path, None)
        (self.out / path).unlink(missing_ok=True)
        return True

    def _load(self, missing: Sequence[tuple[RemoteFile, int | None]], num_files: int) -> None:
        if not missing:
            say(f"{self.out}: everything is here ({num_files} files)")
            return
        sizes = [stop if stop is not None else file.bytes for file, stop in missing]
        here = sum(bytes_here(self.out / local_path(file, stop)) for file, stop in missing)
        needed = sum(size or 0 for size in sizes) - here
        if needed > free_bytes(self.out):
            raise UserError(no_room(self.out, needed))
        size = "size unknown" if None in sizes else size_text(sum(sizes))
        which = f"{len(missing)} of {num_files} files" if num_files > 1 else missing[0][0].path
        say(f"{self.out}: loading {which}, {size}" + (f", of which {size_text(here)} are here" if here else ""))
        progress = Progress(sizes)
        pool = ThreadPoolExecutor(self.jobs)
        futures = [pool.submit(self._one, file, stop, progress) for file, stop in missing]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [error for future in finished if (error := future.exception()) and not isinstance(error, Stopped)]
            if failed:
                raise failed[0]
        finally:
            self.web.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            progress.close()
            self.web.stop.clear()

    def _one(self, file: RemoteFile, stop: int | None, progress: Progress) -> None:
        if self.web.stop.is_set():
            raise Stopped
        path = local_path(file, stop)
        before = self.known.get(path)
        fetched = fetch_file(self.web, file, self.out / path, progress, stop)
        if before and stop is None and before["sha256"] != fetched.sha256 and not self.update:
            (self.out / path).unlink()
            raise UserError(
                f"{path} has sha256 {fetched.sha256} now, {before['sha256']} was recorded on {before['date']}: it "
                "changed at its source, or one of the two was damaged; --update takes the new one"
            )
        self._note(path, file, fetched)
        progress.file_done()

    def _note(self, path: str, file: RemoteFile, fetched: Fetched) -> None:
        entry = {key: value for key, value in asdict(fetched).items() if value is not None}
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        with self._noting:
            self.known[path] = {"url": file.url, **entry, "date": date}
            self._unrecorded.append(path)
            if time.monotonic() > self._recorded_at + _RECORD_EVERY_S:
                self._write_record()

    def _write_record(self) -> None:
        """Write download.json; only then the states that say who loaded the files may go."""
        if self._unrecorded:
            write_json(self.out / RECORD, {**self.origin, "files": dict(sorted(self.known.items()))})
            for path in self._unrecorded:
                forget_state(self.out / path)
            self._unrecorded, self._recorded_at = [], time.monotonic()


def local_path(file: RemoteFile, stop: int | None) -> str:
    """Where a file goes: its own path, or NAME.first-BYTES.SUFFIX for the beginning of one."""
    if stop is None:
        return file.path
    path = PurePosixPath(file.path)
    return str(path.with_name(f"{path.stem}.first-{stop}{path.suffix}"))


def without_parts_of(paths: Iterable[str]) -> list[str]:
    """Of a file and beginnings of it, as several --limit-bytes leave them, only the longest."""
    longest: dict[str, tuple[float, str]] = {}
    for path in paths:
        match = re.fullmatch(r"(.*)\.first-(\d+)(\.[^./]+)", path)
        whole, length = (match[1] + match[3], float(match[2])) if match else (path, float("inf"))
        longest[whole] = max(longest.get(whole, (0.0, "")), (length, path))
    return sorted(path for _, path in longest.values())


def limited(files: Sequence[RemoteFile], limit_bytes: int | None) -> list[tuple[RemoteFile, int | None]]:
    """(file, bytes of it or None for all) until the limit is reached.

    Raises:
        UserError: the limit ends within the first file, and half of such a file is of no use.
    """
    if limit_bytes is None:
        return [(file, None) for file in files]
    plan: list[tuple[RemoteFile, int | None]] = []
    left = limit_bytes
    for file in files:
        if file.bytes is not None and file.bytes <= left:
            plan.append((file, None))
            left -= file.bytes
            continue
        if file.path.endswith(_LINES):
            plan.append((file, left))
        elif not plan:
            size = "unknown" if file.bytes is None else f"{file.bytes:,} bytes"
            raise UserError(
                f"--limit-bytes {limit_bytes:,} ends within the first file, {file.path} ({size}), and only of "
                f"{', '.join(_LINES)} files the beginning can be used: raise it, or choose a smaller file with --files"
            )
        break
    return plan
