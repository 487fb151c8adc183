"""The loop of a crawl: which host may be asked now, several hosts at a time, and what becomes of each page.

Contract: one request at a time to a host, and `delay_s` (or what its robots.txt asks for) between the end of one and
the beginning of the next, robots.txt and sitemaps included. One thread decides and writes; others fetch and extract.
Killed at any moment, the next run with the same folder goes on: no page is written twice, none that was found is lost.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from data_tools.crawling.fetching import SITEMAP_TYPES, Answer, Fetcher
from data_tools.crawling.frontier import DONE, LEFT, PAGE, REDIRECTED, SITEMAP, Entry, Frontier
from data_tools.crawling.output import Output
from data_tools.crawling.pages import Page, read_page, sitemap_urls
from data_tools.crawling.robots import Robots, fetch_robots, product_of
from data_tools.crawling.urls import Scope, host_of, same_site, trap
from data_tools.downloading.progress import Line
from minillm.utils.logging import say, warn

MAX_HOPS = 5  # redirects in a row
MAX_TRIES = 4
MAX_SITEMAP_DEPTH = 2  # sitemaps of sitemaps
MAX_WAIT_S = 3600.0  # a host that asks for a longer pause is left
MAX_FAILURES = 5  # in a row without any connection, then the host is left
MAX_QUERIES = 200  # addresses of one path that differ in their query
LONG_DELAY_S = 30.0
_ROBOTS_AGE_S = 24 * 3600.0
_IDLE_S = 0.5


class Clock:
    """Time that tests can hold."""

    def now(self) -> float:
        """Seconds of Unix time."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True)
class Limits:
    """How far a crawl goes, and how gently."""

    depth: int = 5
    max_pages: int = 10_000
    max_pages_per_host: int = 5_000
    delay_s: float = 1.0
    max_bytes: int = 5 << 20
    timeout_s: float = 20.0
    workers: int = 4
    sitemaps: bool = False


@dataclass
class _Host:
    """What is known of a host in this run."""

    ready_at: float = 0.0
    robots: Robots | None = None
    delay_s: float = 0.0
    tries: int = 0  # of robots.txt
    failures: int = 0  # in a row without a connection
    fetched: int = 0
    busy: bool = False
    left: tuple[str, str] | None = None  # why nothing of it is asked for any more in this run: (reason, detail)


@dataclass
class _Work:
    """A request in flight; `entry` is None where it is for robots.txt."""

    host: str
    entry: Entry | None = None
    answer: Answer | None = None
    page: Page | None = None
    robots: str | None = None
    pages: list[str] = field(default_factory=list)  # of a sitemap
    sitemaps: list[str] = field(default_factory=list)


class Crawler:
    """One run of a crawl; see the module.

    Args:
        out: the folder of the parts.
        work: the folder of the state.
    """

    def __init__(
        self, scope: Scope, limits: Limits, user_agent: str, out: Path, work: Path, clock: Clock | None = None
    ) -> None:
        self.limits, self.clock = limits, clock or Clock()
        self.product = product_of(user_agent)
        self.fetcher = Fetcher(user_agent, scope.starts, limits.max_bytes, limits.timeout_s)
        self.frontier = Frontier(work / "frontier.sqlite")
        self.scope = replace(scope, starts=scope.starts | set(self.frontier.get("joined", [])))
        self.output = Output(out, work, self.frontier)
        self.hosts: dict[str, _Host] = {}
        for host, fetched in self.frontier.fetched_of_hosts().items():
            self._host(host).fetched = fetched
        self.fetched = sum(host.fetched for host in self.hosts.values())
        self.extracted = int(self.frontier.get("records", 0))
        self.started = self.clock.now()
        self._at_start = self.fetched
        self._line = Line(self.text)

    def close(self) -> None:
        self._line.close()
        self.output.close()
        self.frontier.close()

    def text(self) -> str:
        """The progress line."""
        passed = max(self.clock.now() - self.started, 1e-9)
        queued = self.frontier.num_queued()
        rate = (self.fetched - self._at_start) / passed
        return (
            f"{self.fetched:,} pages fetched, {self.extracted:,} texts, {queued:,} in the queue, "
            f"{len(self.hosts):,} hosts, {rate:.2f} pages/s"
        )

    def run(self, starts: list[str]) -> None:
        """Crawl until nothing is left, a limit is met, or Ctrl-C."""
        with self.frontier as frontier:
            frontier.add(starts, 0)
        with ThreadPoolExecutor(self.limits.workers) as pool:
            running: dict[Future[_Work], _Work] = {}
            try:
                while True:
                    wake_at = self._start(pool, running)
                    if not running and wake_at is None:
                        break
                    pause = _IDLE_S if wake_at is None else min(max(wake_at - self.clock.now(), 0.0), _IDLE_S)
                    if running:
                        finished, _ = wait(running, timeout=pause, return_when=FIRST_COMPLETED)
                        for future in finished:
                            running.pop(future)
                            self._settle(future.result())
                    elif pause:
                        self.clock.sleep(pause)
                    self._line.tick()
            finally:
                for future in running:
                    future.cancel()
                self.output.roll(least=1)

    # -- what to ask next

    def _host(self, host: str) -> _Host:
        if host not in self.hosts:
            self.hosts[host] = _Host(delay_s=self.limits.delay_s)
        return self.hosts[host]

    def _start(self, pool: ThreadPoolExecutor, running: dict[Future[_Work], _Work]) -> float | None:
        """Start requests to all hosts that may be asked; when to look again, None when only running ones matter."""
        wake_at = None
        waiting = [
            (max(self._host(name).ready_at, since), name) for name, since in self.frontier.queued_hosts().items()
        ]
        for ready_at, name in sorted(waiting):  # the host that rested longest comes first
            host = self._host(name)
            if host.busy:
                continue
            in_flight = sum(1 for work in running.values() if work.entry and work.entry.kind == PAGE)
            if self.fetched + in_flight >= self.limits.max_pages:
                return None
            if len(running) >= self.limits.workers:
                return None
            now = self.clock.now()
            if ready_at > now:
                return ready_at if wake_at is None else wake_at
            work = self._choose(name, host, now)
            if work is None:  # all that was queued of it is settled without a request
                wake_at = now
                continue
            host.busy = True
            running[pool.submit(self._fetch, work)] = work
        return wake_at

    def _choose(self, name: str, host: _Host, now: float) -> _Work | None:
        """The next request to a host, None where nothing of it needs one now."""
        if host.left is not None:
            with self.frontier as frontier:
                frontier.leave_host(name, *host.left)
            return None
        if host.robots is None:
            known = self.frontier.robots_of(name, now - _ROBOTS_AGE_S)
            if known is None:
                return _Work(name)
            self._learn_robots(name, host, known)
        if host.fetched >= self.limits.max_pages_per_host:
            with self.frontier as frontier:
                frontier.leave_host(name, "host_limit", f"{host.fetched:,} pages of {name} were fetched")
            return None
        while (entry := self.frontier.next_of(name, now)) is not None:
            if host.robots is not None and not host.robots.allows(entry.url):
                with self.frontier as frontier:
                    frontier.finish(entry, LEFT, "robots", "robots.txt does not allow it")
                continue
            return _Work(name, entry)
        return None

    def _learn_robots(self, name: str, host: _Host, content: str) -> None:
        host.robots = Robots(content, self.product)
        host.delay_s = max(self.limits.delay_s, host.robots.delay_s)
        if host.delay_s > max(LONG_DELAY_S, self.limits.delay_s):
            warn(f"{name} asks for {host.delay_s:.0f} s between two requests, which is kept")

    # -- in the threads

    def _fetch(self, work: _Work) -> _Work:
        if work.entry is None:
            work.robots, work.answer = fetch_robots(self.fetcher, work.host)
            return work
        is_page = work.entry.kind == PAGE
        work.answer = answer = self.fetcher.get(work.entry.url, *(() if is_page else (SITEMAP_TYPES,)))
        if answer.problem is None and answer.location is None:
            try:
                if is_page:
                    work.page = read_page(answer, self.product)
                else:
                    work.pages, work.sitemaps = sitemap_urls(answer.body, answer.url, 10 * self.limits.max_bytes)
            except Exception as error:  # what breaks a parser is counted; it must not end the crawl
                answer.problem, answer.detail = "broken_page", f"{type(error).__name__}: {error}"
            answer.body = b""
        return work

    # -- what became of it

    def _settle(self, work: _Work) -> None:
        host, answer = self._host(work.host), work.answer
        assert answer is not None
        host.busy = False
        host.ready_at = self.clock.now() + host.delay_s
        lost = answer.status == 0 and answer.transient
        host.failures = host.failures + 1 if lost else 0
        if work.entry is None:
            self._settle_robots(work, host, answer)
        elif answer.transient:
            self._settle_failure(work.entry, host, answer)
        else:
            with self.frontier as frontier:
                frontier.add_up(requests=1)
                self._settle_answer(frontier, work, work.entry, answer)
            self.output.roll()
        if host.failures >= MAX_FAILURES:
            self._leave(work.host, host, "host_unreachable", answer.detail)

    def _leave(self, name: str, host: _Host, reason: str, detail: str) -> None:
        host.left = (reason, detail)
        with self.frontier as frontier:
            count = frontier.leave_host(name, reason, detail)
        warn(f"{name} is left ({reason}: {detail}), {count:,} addresses with it")

    def _settle_robots(self, work: _Work, host: _Host, answer: Answer) -> None:
        if work.robots is None:
            host.tries += 1
            if not answer.transient:  # a private network, a certificate that is not accepted
                self._leave(work.host, host, answer.problem or "robots_unreachable", answer.detail)
            elif host.tries >= MAX_TRIES:
                self._leave(work.host, host, "robots_unreachable", answer.detail)
            else:
                host.ready_at = self.clock.now() + self._back_off(host, host.tries, answer)
            return
        with self.frontier as frontier:
            frontier.add_up(requests=1)
            frontier.put_robots(work.host, work.robots, self.clock.now())
            self._learn_robots(work.host, host, work.robots)
            host.ready_at = self.clock.now() + host.delay_s
            if self.limits.sitemaps and host.robots is not None:
                named = [url for url in host.robots.sitemaps if url] or [f"{work.host}/sitemap.xml"]
                frontier.add((url for url in named if self.scope.allows(url)), 0, kind=SITEMAP)

    def _settle_failure(self, entry: Entry, host: _Host, answer: Answer) -> None:
        pause = self._back_off(host, entry.tries + 1, answer)
        with self.frontier as frontier:
            frontier.add_up(requests=1)
            if entry.tries + 1 >= MAX_TRIES or pause > MAX_WAIT_S:
                frontier.finish(entry, LEFT, answer.problem, answer.detail)
            else:
                frontier.postpone(entry, self.clock.now() + pause)
        if answer.status in (429, 503):  # it is the host that is busy, not the page
            host.ready_at = self.clock.now() + pause
            if pause > MAX_WAIT_S:
                self._leave(entry.host, host, answer.problem or "", f"asks to come back in {pause:.0f} s")

    def _back_off(self, host: _Host, tries: int, answer: Answer) -> float:
        return max(answer.wait_s or 0.0, max(host.delay_s, 0.1) * 2**tries)

    def _settle_answer(self, frontier: Frontier, work: _Work, entry: Entry, answer: Answer) -> None:
        if answer.location is not None:
            self._settle_redirect(frontier, entry, answer.location)
        elif answer.problem is not None:
            frontier.finish(entry, LEFT, answer.problem, answer.detail)
        elif entry.kind == SITEMAP:
            frontier.finish(entry, DONE)
            self._add_links(frontier, work.pages, 1)
            if entry.depth < MAX_SITEMAP_DEPTH:
                frontier.add((url for url in work.sitemaps if self.scope.allows(url)), entry.depth + 1, kind=SITEMAP)
        else:
            assert work.page is not None
            self.fetched += 1
            self._host(work.host).fetched += 1
            frontier.add_up(links_nofollow=work.page.num_nofollow)
            if entry.depth < self.limits.depth:
                self._add_links(frontier, work.page.links, entry.depth + 1)
            else:
                frontier.add_up(links_too_deep=len(work.page.links))
            self._write(frontier, entry, work.page)

    def _settle_redirect(self, frontier: Frontier, entry: Entry, location: str) -> None:
        frontier.finish(entry, REDIRECTED, None, location)
        if (
            entry.depth == 0
            and entry.kind == PAGE
            and not self.scope.allows(location)
            and same_site(entry.url, location)
        ):
            # example.org that answers from www.example.org
            self._join(frontier, urlsplit(location).netloc)
        if entry.hops >= MAX_HOPS:
            frontier.finish(entry, LEFT, "too_many_redirects", location)
        elif not self.scope.allows(location):
            frontier.finish(entry, LEFT, "redirect_outside", location)
        elif reason := trap(location):
            frontier.leave(location, entry.depth, reason)
        else:
            frontier.add([location], entry.depth, entry.hops + 1, entry.kind)

    def _join(self, frontier: Frontier, netloc: str) -> None:
        """Take a host into the scope, also of the runs that go on with this one."""
        say(f"the start leads to {netloc}, which is crawled too")
        frontier.put("joined", [*frontier.get("joined", []), netloc])
        self.scope = replace(self.scope, starts=self.scope.starts | {netloc})

    def _add_links(self, frontier: Frontier, links: list[str], depth: int) -> None:
        outside = 0
        for link in links:
            if not self.scope.allows(link):
                outside += 1
            elif reason := trap(link):
                frontier.leave(link, depth, reason)
            elif (parts := urlsplit(link)).query and frontier.num_below(host_of(link) + parts.path) >= MAX_QUERIES:
                frontier.add_up(links_too_many_queries=1)
            else:
                frontier.add([link], depth)
        frontier.add_up(links_outside=outside)

    def _write(self, frontier: Frontier, entry: Entry, page: Page) -> None:
        problem, detail = page.problem, page.detail
        if problem is None:
            fingerprint = hashlib.sha256(" ".join(page.text.split()).encode("utf-8", "replace")).digest()
            if not frontier.is_new_text(fingerprint):
                problem, detail = "duplicate", "its text is that of another page"
        frontier.finish(entry, DONE, problem, detail)
        if problem is not None:
            return
        when = datetime.datetime.fromtimestamp(self.clock.now(), datetime.timezone.utc)
        record = {"id": entry.url, "text": page.text, "title": page.title, "date": page.date,
                  "language": page.language, "url": entry.url, "fetched": when.isoformat(timespec="seconds"),
                  "depth": entry.depth}  # fmt: skip
        size = self.output.add({key: value for key, value in record.items() if value is not None})
        frontier.add_up(records=1, bytes_out=size)
        self.extracted += 1


def report(crawler: Crawler) -> None:
    """Say how far it came."""
    say(crawler.text())
