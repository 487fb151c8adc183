"""Web pages as a corpus: a crawler that asks politely, and the main text of what it finds.

    python -m data_tools.crawl START_URL ... --out DIR [--domains NAME ...] [--depth N] [--max-pages N] [--delay S]

Contract: writes OUT/part-*.jsonl, a record a page: id and url (its address), text (the main text, without menus),
title, date and language where the page has them, fetched (time, UTC), depth. robots.txt, Crawl-delay, nofollow and
noindex are kept; only http and https, and only the hosts of the START_URLs unless --domains or --same-domain name more.
The same command goes on after a break (state in OUT/.work), also with other limits of amount and speed; summary.json
tells what was fetched, written and left, by reason.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from data_tools.crawling.urls import build_scope, canonical
from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error
from minillm.utils.files import file_lock, write_json
from minillm.utils.logging import say

USER_AGENT = "minillm-crawl/1.0"
_EXAMPLES = 5


def crawl(options: argparse.Namespace) -> dict[str, object]:
    """Run the crawl of a command line; its summary.

    Raises:
        UserError: something that is not an address or a domain, OUT in use or of another crawl.
    """
    from data_tools.crawling.crawler import Crawler, Limits
    from data_tools.extras import require

    for module in ("trafilatura", "protego", "py3langid"):
        require(module)
    starts = [start_url(url) for url in options.starts]
    scope = build_scope(starts, options.domains or [], options.same_domain)
    limits = Limits(
        depth=options.depth, max_pages=options.max_pages, max_pages_per_host=options.max_pages_per_host,
        delay_s=options.delay, max_bytes=options.max_bytes, timeout_s=options.timeout, workers=options.workers,
        sitemaps=options.sitemap,
    )  # fmt: skip
    # limits of amount and speed may change when a crawl goes on; what it is about may not
    command = {"starts": starts, "domains": list(scope.domains), "depth": limits.depth, "sitemap": limits.sitemaps}
    out = options.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, and a folder is needed: name another one")
    if (
        out.exists()
        and not (out / ".work" / "frontier.sqlite").exists()
        and any(p.name != ".work" for p in out.iterdir())
    ):
        raise UserError(f"{out} exists and holds other files: remove it or choose another --out")
    work = out / ".work"
    work.mkdir(parents=True, exist_ok=True)

    def busy() -> None:
        raise UserError(f"another crawl writes into {out}: wait for it, or choose another --out")

    with file_lock(work / "lock", busy=busy):
        started = time.monotonic()
        crawler = Crawler(scope, limits, options.user_agent, out, work)
        try:
            _check_same(crawler.frontier, command, out)
            if crawler.fetched:
                say(f"going on: {crawler.text()}")
            stopped = False
            try:
                crawler.run(starts)
            except KeyboardInterrupt:
                stopped = True
            summary = summarize(crawler, command | {"user_agent": options.user_agent}, starts)
            seconds = float(crawler.frontier.get("seconds", 0)) + time.monotonic() - started
            summary["seconds"] = round(seconds, 2)
            with crawler.frontier as frontier:
                frontier.put("seconds", seconds)
            write_json(out / "summary.json", summary)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{out} cannot be written ({error}): make room, then run the same command again") from None
        finally:
            crawler.close()
    report(summary, out)
    if stopped:
        say("stopped; the same command goes on")
        sys.exit(130)
    if not summary["records_out"]:
        raise UserError(f"{out}: no page gave a text, for the reasons above")
    return summary


def start_url(url: str) -> str:
    """A start address in its one spelling; `example.org` is taken as https."""
    known = canonical(url if "://" in url else f"https://{url}")
    host = urlsplit(known or "").hostname or ""
    if known is None or host != "localhost" and not set(".:") & set(host):
        raise UserError(f"{url} is not an http(s) address: write it like https://example.org/")
    return known


def _check_same(frontier, command: dict[str, object], out: Path) -> None:
    before = frontier.get("command")
    if before is None:
        with frontier:
            frontier.put("command", command)
    elif before != command:
        differing = ", ".join(key for key in command if before.get(key) != command[key])
        raise UserError(f"{out} holds a crawl with other {differing}: give the same ones or choose another --out")


def summarize(crawler, options: dict[str, object], starts: list[str]) -> dict[str, object]:
    """What became of the addresses: pages fetched and why some gave no record, addresses left and why."""
    frontier = crawler.frontier
    rejected: dict[str, int] = {}
    left: dict[str, int] = {}
    totals = {"queued": 0, "done": 0, "left": 0, "redirected": 0}
    for state, reason, count in frontier.counts():
        totals[state] += count
        if reason is not None:
            (rejected if state == "done" else left)[reason] = count
    links = {key: frontier.get(f"links_{key}", 0) for key in ("outside", "nofollow", "too_deep", "too_many_queries")}
    return {
        "tool": "crawl",
        "options": options,
        "inputs": starts,
        "records_in": totals["done"],
        "records_out": frontier.get("records", 0),
        "bytes_out": frontier.get("bytes_out", 0),
        "rejected": rejected,
        "examples": {reason: frontier.examples(reason, _EXAMPLES) for reason in (*rejected, *left)},
        "statistics": {
            "requests": frontier.get("requests", 0),
            "redirects": totals["redirected"],
            "in_queue": totals["queued"],
            "left": left,
            "links": links,
            "hosts": frontier.fetched_of_hosts(),
        },
    }


def report(summary: dict, out: Path) -> None:
    """Say what came out, a line a reason."""
    say(
        f"{out}: {summary['records_out']:,} texts of {summary['records_in']:,} pages, "
        f"{summary['bytes_out'] / 1e6:,.2f} MB, {summary['seconds']:.1f} s; "
        f"{summary['statistics']['in_queue']:,} addresses still in the queue"
    )
    reasons = {**summary["rejected"], **summary["statistics"]["left"]}
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        example = summary["examples"][reason][0]
        say(f"  {count:>8,} {reason:<20} {example['id'][:100]} {example['detail'][:100]}")


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m data_tools.crawl`."""
    from data_tools.workshop import byte_size, positive

    parser = argparse.ArgumentParser(prog=command_name("data_tools.crawl"), description="Crawl web pages politely.")
    parser.add_argument("starts", nargs="+", metavar="START_URL", help="where to begin; their hosts are crawled")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the parts and summary.json")
    parser.add_argument(
        "--domains", nargs="+", metavar="NAME", help="more hosts, with all below them ('*': everywhere)"
    )
    parser.add_argument("--same-domain", action="store_true", help="all hosts of the starts' registered domains")
    parser.add_argument("--depth", type=int, default=5, metavar="N", help="links from a start, 0: only the starts (5)")
    parser.add_argument("--max-pages", type=positive, default=10_000, metavar="N", help="pages to fetch (10,000)")
    parser.add_argument("--max-pages-per-host", type=positive, default=5_000, metavar="N", help="of one host (5,000)")
    parser.add_argument("--delay", type=float, default=1.0, metavar="S", help="seconds between requests to a host (1)")
    parser.add_argument("--timeout", type=float, default=20.0, metavar="S", help="seconds to wait for a server (20)")
    parser.add_argument("--max-bytes", type=byte_size, default=5 << 20, metavar="N", help="of a page (5M)")
    parser.add_argument("--workers", type=positive, default=4, metavar="N", help="hosts asked at the same time (4)")
    parser.add_argument("--sitemap", action="store_true", help="also take the addresses of the hosts' sitemaps")
    parser.add_argument("--user-agent", default=USER_AGENT, metavar="TEXT",
                        help=f"its name; add a contact: '{USER_AGENT} (+mailto:me@example.org)'")  # fmt: skip
    options = parser.parse_args(argv)
    with exit_on_user_error():
        if options.delay < 0 or options.timeout <= 0 or options.depth < 0:
            raise UserError("--delay and --depth cannot be negative, and --timeout has to be above 0")
        if not options.user_agent.strip() or not options.user_agent.isascii() or not options.user_agent.isprintable():
            raise UserError("--user-agent has to be a name in plain letters: hosts have to know who asks")
        crawl(options)


if __name__ == "__main__":
    main()
