"""The state of a crawl on disk: which addresses are known, what became of them, and how far the output goes.

Contract: an SQLite file in WAL mode. Everything that one page changes (its fate, its links, its text's fingerprint, the
length of the output) is one transaction, so that after a kill the state is that of some whole page, and the output is
cut back to it. Addresses come by depth, then in the order they were found.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.crawling.urls import host_of
from minillm.utils.errors import UserError

QUEUED, DONE, LEFT, REDIRECTED = "queued", "done", "left", "redirected"
PAGE, SITEMAP = "page", "sitemap"

_SCHEMA = """
create table if not exists urls (
    id integer primary key, url text not null unique, host text not null, kind text not null, depth integer not null,
    hops integer not null, state text not null, tries integer not null default 0, not_before real not null default 0,
    reason text, detail text
);
create index if not exists urls_next on urls (host, state, depth, id);
create index if not exists urls_queue on urls (state, host, not_before);
create index if not exists urls_counts on urls (kind, state, reason);
create table if not exists hosts (host text primary key, robots text, fetched real);
create table if not exists texts (digest blob primary key) without rowid;
create table if not exists meta (key text primary key, value text not null) without rowid;
"""


@dataclass(frozen=True)
class Entry:
    """An address that waits to be fetched."""

    id: int
    url: str
    host: str
    kind: str
    depth: int
    hops: int  # redirects on the way here
    tries: int


class Frontier:
    """See the module. One thread uses it."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        try:
            self._db.execute("pragma journal_mode=wal")
            self._db.execute("pragma synchronous=normal")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} is not a crawl's state ({error}): remove it or choose another --out") from None

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Frontier:
        """A transaction: all of it happens, or nothing."""
        self._db.execute("begin immediate")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._db.execute("commit" if kind is None else "rollback")

    # -- numbers and settings

    def get(self, key: str, default: object = None) -> object:
        row = self._db.execute("select value from meta where key = ?", (key,)).fetchone()
        return default if row is None else json.loads(row[0])

    def put(self, key: str, value: object) -> None:
        self._db.execute("insert or replace into meta values (?, ?)", (key, json.dumps(value)))

    def add_up(self, **counts: int) -> None:
        for key, count in counts.items():
            if count:
                self.put(key, int(self.get(key, 0)) + count)

    # -- addresses

    def add(self, urls: Iterable[str], depth: int, hops: int = 0, kind: str = PAGE) -> int:
        """Queue addresses that are not known yet; how many those were."""
        before = self._db.total_changes
        rows = ((url, host_of(url), kind, depth, hops, QUEUED) for url in urls)
        line = "insert or ignore into urls (url, host, kind, depth, hops, state) values (?, ?, ?, ?, ?, ?)"
        self._db.executemany(line, rows)
        return self._db.total_changes - before

    def leave(self, url: str, depth: int, reason: str, detail: str = "") -> None:
        """Note an address that is not even queued."""
        line = (
            "insert or ignore into urls (url, host, kind, depth, hops, state, reason, detail) values (?,?,?,?,0,?,?,?)"
        )
        self._db.execute(line, (url, host_of(url), PAGE, depth, LEFT, reason, detail))

    def next_of(self, host: str, now: float) -> Entry | None:
        """The first address of a host that may be fetched now."""
        row = self._db.execute(
            "select id, url, host, kind, depth, hops, tries from urls where host = ? and state = ? and not_before <= ? "
            "order by depth, id limit 1",
            (host, QUEUED, now),
        ).fetchone()
        return Entry(*row) if row else None

    def finish(self, entry: Entry, state: str, reason: str | None = None, detail: str = "") -> None:
        line = "update urls set state = ?, reason = ?, detail = ?, tries = tries + 1 where id = ?"
        self._db.execute(line, (state, reason, detail[:300], entry.id))

    def postpone(self, entry: Entry, not_before: float) -> None:
        """Try again later."""
        line = "update urls set tries = tries + 1, not_before = ? where id = ?"
        self._db.execute(line, (not_before, entry.id))

    def leave_host(self, host: str, reason: str, detail: str) -> int:
        """Give up all that is queued of a host; how many those were."""
        line = "update urls set state = ?, reason = ?, detail = ? where host = ? and state = ?"
        return self._db.execute(line, (LEFT, reason, detail[:300], host, QUEUED)).rowcount

    def num_below(self, path: str) -> int:
        """Addresses known of one path, whatever their query."""
        # "?" is 0x3f: what begins with PATH? lies between PATH? and PATH@
        line = "select count(*) from urls where url >= ? and url < ?"
        return self._db.execute(line, (path + "?", path + "@")).fetchone()[0]

    def queued_hosts(self) -> dict[str, float]:
        """Hosts with something queued, and when the first of it may be fetched."""
        line = "select host, min(not_before) from urls where state = ? group by host"
        return dict(self._db.execute(line, (QUEUED,)).fetchall())

    def num_queued(self) -> int:
        return self._db.execute("select count(*) from urls where state = ?", (QUEUED,)).fetchone()[0]

    def fetched_of_hosts(self) -> dict[str, int]:
        """Pages that were fetched, by host."""
        line = "select host, count(*) from urls where state = ? and kind = ? group by host"
        return dict(self._db.execute(line, (DONE, PAGE)).fetchall())

    def counts(self) -> Iterator[tuple[str, str | None, int]]:
        """(state, reason, number) of the pages."""
        line = "select state, reason, count(*) from urls where kind = ? group by state, reason order by 1, 2"
        yield from self._db.execute(line, (PAGE,))

    def examples(self, reason: str, count: int) -> list[dict[str, str]]:
        line = "select url, detail from urls where reason = ? order by id limit ?"
        return [{"id": url, "detail": detail or ""} for url, detail in self._db.execute(line, (reason, count))]

    # -- hosts and texts

    def robots_of(self, host: str, since: float) -> str | None:
        """The robots.txt of a host if it was fetched after `since`."""
        row = self._db.execute("select robots from hosts where host = ? and fetched > ?", (host, since)).fetchone()
        return row[0] if row else None

    def put_robots(self, host: str, content: str, now: float) -> None:
        self._db.execute("insert or replace into hosts values (?, ?, ?)", (host, content, now))

    def is_new_text(self, digest: bytes) -> bool:
        """Note a text's fingerprint; False when it was known."""
        return self._db.execute("insert or ignore into texts values (?)", (digest,)).rowcount > 0
