"""`python -m data_tools.crawl` on sites of a server on this machine: what it asks for, when, and what it writes."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from data_tools.crawl import main, start_url
from data_tools.crawling import crawler as crawler_module
from data_tools.crawling.crawler import Crawler, Limits
from data_tools.crawling.fetching import Answer
from data_tools.crawling.frontier import Frontier
from data_tools.crawling.output import Output
from data_tools.crawling.pages import sitemap_urls
from data_tools.crawling.robots import Robots, product_of
from data_tools.crawling.urls import build_scope, canonical, is_private, same_site
from data_tools.workshop import encode
from tests.data_tools.local_server import Fault, LocalServer, Page, run_tool, serving
from tests.data_tools.local_server import html_page as html
from tests.data_tools.test_crawl_pages import CHINESE, TRADITIONAL

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server():
    with serving() as running:
        yield running


def site(server: LocalServer, pages: dict[str, bytes], robots: str = "") -> None:
    for path, content in pages.items():
        server.pages[path] = Page(content, "text/html; charset=utf-8", etag=None)
    if robots:
        server.pages["/robots.txt"] = Page(robots.encode(), "text/plain")


def crawl(
    out: Path, *starts: str, domains: tuple[str, ...] = (), agent: str = "minillm-crawl", **limits: object
) -> dict:
    """Crawl in this process; the records by path of their address."""
    work = out / ".work"
    work.mkdir(parents=True, exist_ok=True)
    begin = [canonical(start) for start in starts]
    options = {"delay_s": 0.0, "timeout_s": 5.0, **limits}
    crawler = Crawler(build_scope(begin, list(domains), False), Limits(**options), agent, out, work)
    try:
        crawler.run(begin)
    finally:
        crawler.close()
    return records(out)


def records(out: Path) -> dict[str, dict]:
    lines = [line for part in sorted(out.glob("part-*.jsonl")) for line in part.read_text().splitlines()]
    found = [json.loads(line) for line in lines]
    assert len({record["id"] for record in found}) == len(found)
    return {urlsplit(record["url"])._replace(scheme="", netloc="").geturl(): record for record in found}


def reasons(out: Path) -> dict[str, str]:
    """Why addresses gave no record, by path."""
    frontier = Frontier(out / ".work" / "frontier.sqlite")
    rows = frontier._db.execute("select url, reason from urls where reason is not null").fetchall()
    frontier.close()
    return {urlsplit(url)._replace(scheme="", netloc="").geturl(): reason for url, reason in rows}


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_tool("data_tools.crawl", *arguments)


def paths(server: LocalServer) -> list[str]:
    return [request.path for request in server.log]


# -- what is fetched ---------------------------------------------------------------------------------------------------


def test_the_command_crawls_a_site_and_writes_texts_and_a_summary(server, tmp_path):
    site(
        server,
        {
            "/": html("Home", "/a", "b#part", "/private/x", "/missing", "http://elsewhere.example/", "mailto:me@x.y"),
            "/a": html(
                "Apples",
                "/",
                "/a?x=1",
                "/pic.jpg",
                head='<meta property="article:published_time" content="2024-03-05">',
            ),
            "/b": html("Bears", "/a", "c/"),
            "/c/": html("Cats", "../a"),
            "/a?x=1": html("Apples"),
        },
        "User-agent: *\nDisallow: /private\n",
    )
    done = command(server.url(), "--out", tmp_path / "o", "--delay", 0)
    assert done.returncode == 0, done.stderr
    found = records(tmp_path / "o")
    assert set(found) == {"/", "/a", "/b", "/c/"}
    apples = found["/a"]
    assert apples["id"] == apples["url"] == server.url("/a") and apples["title"] == "Apples"
    assert apples["date"] == "2024-03-05" and apples["language"] == "en" and apples["depth"] == 1
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", apples["fetched"])
    assert "The article about Apples" in apples["text"] and "rights reserved" not in apples["text"]
    assert len(paths(server)) == len(set(paths(server))) and "/private/x" not in paths(server)
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert (summary["records_in"], summary["records_out"]) == (5, 4)
    assert summary["rejected"] == {"duplicate": 1}
    assert summary["statistics"]["left"] == {"file_type": 1, "http_404": 1, "robots": 1}
    assert summary["statistics"]["links"]["outside"] == 1 and summary["statistics"]["in_queue"] == 0
    assert summary["examples"]["robots"] == [{"id": server.url("/private/x"), "detail": "robots.txt does not allow it"}]
    server.log.clear()
    again = command(server.url(), "--out", tmp_path / "o", "--delay", 0)
    assert again.returncode == 0 and not server.log and records(tmp_path / "o") == found
    other = command(server.url(), "--out", tmp_path / "o", "--depth", 1)
    assert other.returncode == 2 and "holds a crawl with other depth" in other.stderr
    from data_tools.readers import iterate_documents

    assert len(list(iterate_documents(tmp_path / "o"))) == 4  # the next tool reads the folder


def test_depth_and_page_limits_and_going_on_with_more(server, tmp_path):
    site(server, {f"/{n}": html(f"Number{n}", f"/{n + 1}") for n in range(9)})
    assert set(crawl(tmp_path / "a", server.url("/0"), depth=3)) == {"/0", "/1", "/2", "/3"}
    assert set(crawl(tmp_path / "b", server.url("/0"), max_pages=2)) == {"/0", "/1"}
    server.log.clear()
    assert len(crawl(tmp_path / "b", server.url("/0"), max_pages=5, depth=9)) == 5
    assert paths(server) == ["/2", "/3", "/4"]  # robots.txt is known, too
    assert len(crawl(tmp_path / "c", server.url("/0"), max_pages_per_host=3, depth=9)) == 3
    assert list(reasons(tmp_path / "c").values()) == ["host_limit"]


def test_pages_near_the_start_come_first(server, tmp_path):
    tree = {"/": "ab", "/a": "cd", "/b": "ef", "/c": "gh"}
    site(server, {f"/{c}": html(c.upper()) for c in "defgh"})
    site(server, {path: html(f"Page{path}", *[f"/{c}" for c in below]) for path, below in tree.items()})
    crawl(tmp_path, server.url())
    assert "".join(path[1:] for path in paths(server)[1:]) == "abcdefgh"


def test_a_calendar_without_end_and_loops_of_relative_links_end(server, tmp_path):
    def answer(path: str) -> Page | None:
        parts = urlsplit(path)
        if parts.path == "/calendar":
            day = int(parse_qs(parts.query).get("day", ["0"])[0])
            page = html(f"Day{day}", f"/calendar?day={day + 1}", f"/calendar?day={day + 2}&view=week")
        elif parts.path.startswith("/loop"):
            page = html(f"Loop{parts.path.count('/')}", "loop/x/")
        else:
            return None
        return Page(page, "text/html")

    server.answer = answer
    crawler_module.MAX_QUERIES, before = 20, crawler_module.MAX_QUERIES
    try:
        found = crawl(tmp_path, server.url("/calendar"), server.url("/loop/"), depth=1000)
    finally:
        crawler_module.MAX_QUERIES = before
    days = [path for path in found if path.startswith("/calendar")]
    assert 20 <= len([path for path in paths(server) if path.startswith("/calendar")]) <= 22
    assert "url_trap" in reasons(tmp_path).values() and len(found) - len(days) <= 8


def test_redirects_are_followed_within_the_rules(server, tmp_path):
    site(server, {
        "/": html("Home", "/moved", "/out", "/hidden", "/round", "/chain0", "/nowhere"),
        "/new": html("New"),
        "/private/x": html("Secret"),
    }, "User-agent: *\nDisallow: /private")  # fmt: skip
    with serving() as other:
        for path, target in {"/moved": "/new", "/out": other.url("/"), "/hidden": "/private/x", "/round": "/round2",
                             "/round2": "/round", "/nowhere": "mailto:x@y",
                             **{f"/chain{n}": f"/chain{n + 1}" for n in range(20)}}.items():  # fmt: skip
            server.pages[path] = Page(status=302, headers={"Location": target})
        found = crawl(tmp_path, server.url())
        assert not other.log
    assert set(found) == {"/", "/new"}
    why = reasons(tmp_path)
    assert why["/out"] == "redirect_outside" and why["/private/x"] == "robots" and why["/nowhere"] == "bad_redirect"
    assert [why.get(f"/chain{n}") for n in (4, 5, 6)] == [None, "too_many_redirects", None]
    assert paths(server).count("/round") == 1 and "/chain6" not in paths(server)


def test_several_hosts_and_private_networks(server, tmp_path):
    with serving() as other:
        site(server, {"/": html("Here", other.url("/"), other.url("/", host="localhost"))})
        site(other, {"/": html("There", server.url("/late")), "/x": html("X")})
        site(server, {"/late": html("Late")})
        # only the start's own host
        assert set(crawl(tmp_path / "a", server.url())) == {"/"} and not other.log
        # every host is allowed, but a private network only where it was named as a start
        crawl(tmp_path / "b", server.url(), domains=("*",))
        assert not other.log and list(reasons(tmp_path / "b").values()) == ["private_address"]
        found = crawl(tmp_path / "c", server.url(), other.url())
        assert {record["title"] for record in found.values()} >= {"Late"}
        assert "/x" not in paths(other)
        lines = (tmp_path / "c" / "part-00000.jsonl").read_text().splitlines()
        assert {json.loads(line)["id"] for line in lines} == {server.url("/"), server.url("/late"), other.url("/")}


def test_a_start_that_answers_from_another_host_of_its_site(server, tmp_path, monkeypatch):
    with serving() as other:
        server.pages["/"] = Page(status=301, headers={"Location": other.url("/")})
        site(other, {"/": html("Home", "/a"), "/a": html("A")})
        crawl(tmp_path / "a", server.url())
        assert reasons(tmp_path / "a") == {"/": "redirect_outside"} and not other.log
        monkeypatch.setattr(crawler_module, "same_site", lambda *_: True)
        crawl(tmp_path / "b", server.url())  # it joins the crawl, and is in a private network that was not named
        assert reasons(tmp_path / "b") == {"/": "private_address"}
    assert same_site("https://example.org/", "http://www.example.org/x")
    assert not same_site("http://x.co.uk/", "http://y.co.uk/") and not same_site(
        "http://127.0.0.1/", "http://127.0.0.1/"
    )


@pytest.mark.parametrize(
    "host, private",
    [("127.0.0.1", True), ("10.1.2.3", True), ("169.254.169.254", True), ("::1", True), ("localhost", True),
     ("2130706433", True), ("8.8.8.8", False), ("2001:4860:4860::8888", False)],
)  # fmt: skip
def test_private_addresses(host, private):
    assert is_private(host) is private


def test_content_that_is_no_page(server, tmp_path):
    site(
        server, {"/": html("Home", "/pdf", "/big", "/bigger", "/empty", "/text", "/image", "/xhtml", "/broken", "/zip")}
    )
    server.pages |= {
        "/pdf": Page(b"%PDF", "application/pdf"),
        "/image": Page(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "text/html"),
        "/big": Page(b"x" * 30_000, "text/html"),
        "/bigger": Page(b"y" * 30_000, "text/html", chunked=True),
        "/zip": Page(gzip.compress(b"z" * 5_000_000), "text/html", headers={"Content-Encoding": "gzip"}),
        "/empty": Page(b"", "text/html"),
        "/text": Page("Plain text, 中文也行.".encode(), "text/plain; charset=utf-8"),
        "/xhtml": Page(b'<?xml version="1.0" encoding="utf-8"?>\n' + html("Strict"), "application/xhtml+xml"),
        "/broken": Page(
            b"<html><body><p>Unclosed <b>tags <p>everywhere, but this is still a text of a page</html", "text/html"
        ),
    }
    found = crawl(tmp_path, server.url(), max_bytes=20_000)
    assert found["/text"]["text"] == "Plain text, 中文也行." and found["/xhtml"]["title"] == "Strict"
    assert reasons(tmp_path) == {
        "/pdf": "content_type", "/image": "binary", "/big": "too_large", "/bigger": "too_large", "/zip": "too_large",
        "/empty": "no_text", **({} if "/broken" in found else {"/broken": "no_text"}),
    }  # fmt: skip
    assert next(r.sent for r in server.log if r.path == "/pdf") <= 4


# -- politeness --------------------------------------------------------------------------------------------------------


def test_the_delay_is_kept_between_any_two_requests_to_a_host(server, tmp_path):
    site(server, {f"/{n}": html(f"N{n}", f"/{n + 1}", f"/{n + 2}") for n in range(4)})
    with serving() as other:
        site(other, {f"/{n}": html(f"M{n}", f"/{n + 1}", f"/{n + 2}") for n in range(4)})
        crawl(tmp_path, server.url("/0"), other.url("/0"), delay_s=0.15)
        for one in (server, other):
            assert len(one.log) == 7  # robots.txt, 4 pages, 2 that are missing
            assert all(b.time - a.finished >= 0.149 for a, b in zip(one.log, one.log[1:]))
        assert other.log[0].time < server.log[-1].time and server.log[0].time < other.log[-1].time  # side by side


def test_the_delay_that_robots_ask_for_is_longer(server, tmp_path):
    site(server, {"/": html("Home", "/a"), "/a": html("A")}, "User-agent: *\nCrawl-delay: 0.3\n")
    crawl(tmp_path, server.url(), delay_s=0.01)
    assert [b.time - a.finished >= 0.299 for a, b in zip(server.log, server.log[1:])] == [True, True]
    assert Robots("User-agent: *\nRequest-rate: 1/4s", "x").delay_s == 4
    assert Robots("User-agent: *\nCrawl-delay: 9\n\nUser-agent: me\nCrawl-delay: 2", "me").delay_s == 2


def test_robots_rules_by_name_and_when_they_cannot_be_read(server, tmp_path):
    rules = "User-agent: minillm-crawl\nDisallow: /mine\n\nUser-agent: *\nDisallow: /\n"
    site(server, {"/": html("Home", "/mine", "/yours"), "/mine": html("M"), "/yours": html("Y")}, rules)
    assert set(crawl(tmp_path / "a", server.url(), agent="minillm-crawl/1.0 (+mailto:x@y.z)")) == {"/", "/yours"}
    assert all(r.headers["User-Agent"] == "minillm-crawl/1.0 (+mailto:x@y.z)" for r in server.log)
    assert crawl(tmp_path / "b", server.url(), agent="other") == {}
    assert product_of("minillm-crawl/1.0 (+x)") == "minillm-crawl" and product_of("me too") == "me"
    # the first 500 KiB count
    long = b"User-agent: *\nDisallow: /mine\n" + b"# more\n" * 100_000
    server.pages["/robots.txt"] = Page(long, "text/plain")
    assert set(crawl(tmp_path / "g", server.url(), max_bytes=10_000)) == {"/", "/yours"}
    # a redirect is followed, 4xx allows everything, 5xx nothing
    server.pages["/robots.txt"] = Page(status=301, headers={"Location": "/rules"})
    server.pages["/rules"] = Page(b"User-agent: *\nDisallow: /mine", "text/plain")
    assert set(crawl(tmp_path / "c", server.url())) == {"/", "/yours"}
    server.pages["/robots.txt"] = Page(status=403)
    assert len(crawl(tmp_path / "d", server.url())) == 3
    server.pages["/robots.txt"] = Page(faults=[Fault(status=503)] * 99)
    server.log.clear()
    assert crawl(tmp_path / "e", server.url()) == {}
    assert paths(server) == ["/robots.txt"] * 4 and list(reasons(tmp_path / "e").values()) == ["robots_unreachable"]
    server.pages["/robots.txt"] = Page(b"", faults=[Fault(status=500)])
    assert len(crawl(tmp_path / "f", server.url())) == 3  # it was a passing failure


def test_busy_pages_are_tried_again(server, tmp_path):
    site(server, {"/": html("Home", "/a", "/b", "/c", "/d"), **{f"/{c}": html(c.upper()) for c in "abcd"}})
    server.pages["/a"].faults = [Fault(status=500), Fault(cut_after=20)]
    server.pages["/b"].faults = [Fault(status=429, headers={"Retry-After": "0.6"})]
    server.pages["/c"].faults = [Fault(status=500)] * 9
    server.pages["/d"].faults = [Fault(stall_after=10, stall_s=9)]
    found = crawl(tmp_path, server.url(), timeout_s=1.0)
    assert set(found) == {"/", "/a", "/b", "/d"} and reasons(tmp_path) == {"/c": "http_500"}
    assert [len(server.requests(f"/{c}")) for c in "abcd"] == [3, 2, 4, 2]
    first, second = server.requests("/b")
    assert second.time - first.finished >= 0.6
    # the whole host rests meanwhile
    assert not [r for r in server.log if first.finished < r.time < first.finished + 0.55]


def test_hosts_that_are_gone_or_want_to_be_left_alone(server, tmp_path, capsys):
    with serving() as gone:
        url = gone.url()
    site(server, {"/": html("Home", *[f"{url}/{n}" for n in range(9)]), "/x": html("X")})
    start = time.monotonic()
    crawl(tmp_path / "a", server.url(), url)
    assert time.monotonic() - start < 20 and set(reasons(tmp_path / "a").values()) == {"robots_unreachable"}
    assert "is refused" in capsys.readouterr().err
    site(server, {"/": html("Home", "/x", "/y")})
    server.pages["/x"].faults = [Fault(status=429, headers={"Retry-After": "86400"})]
    crawl(tmp_path / "b", server.url())
    assert reasons(tmp_path / "b") == {"/x": "http_429", "/y": "http_429"} and "/y" not in paths(server)


def test_nofollow_and_noindex(server, tmp_path):
    site(server, {
        "/": html("Home", "/meta", "/index", "/header", "/other", body='<a href="/never" rel="ugc nofollow">x</a>'),
        "/meta": html("Meta", "/from-meta", head='<meta name="ROBOTS" content="NoFollow">'),
        "/index": html("Index", "/from-index", head='<meta name="robots" content="noindex">'),
        "/header": html("Header", "/from-header"),
        "/other": html("Other", head='<meta name="googlebot" content="noindex">'),
        "/from-index": html("FromIndex"),
    })  # fmt: skip
    server.pages["/header"].headers = {"X-Robots-Tag": "otherbot: nofollow, minillm-crawl: none"}
    found = crawl(tmp_path, server.url())
    assert set(found) == {"/", "/meta", "/other", "/from-index"}
    assert reasons(tmp_path) == {"/index": "noindex", "/header": "noindex"}
    assert not {"/never", "/from-meta", "/from-header"} & set(paths(server))


def test_no_cookies_and_no_passwords_are_sent(server, tmp_path, monkeypatch):
    site(server, {"/": html("Home", "/a"), "/a": html("A", "/b"), "/b": html("B")})
    server.pages["/"].headers = {"Set-Cookie": "id=1; Path=/"}
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert len(crawl(tmp_path / "o", server.url())) == 3
    assert not any({"Cookie", "Authorization"} & set(request.headers) for request in server.log)


def test_sitemaps(server, tmp_path):
    site(server, {"/": html("Home"), "/deep/one": html("One"), "/deep/two": html("Two"), "/three": html("Three")},
         f"User-agent: *\nSitemap: {server.url('/index.xml')}")  # fmt: skip
    name = 'xmlns="http://www.sitemaps.org/schemas/sitemap/0.9"'
    inner = "".join(f"<url><loc>{server.url(path)}</loc></url>" for path in ("/deep/one", "/deep/two"))
    server.pages["/index.xml"] = Page(
        f"<?xml version='1.0'?><sitemapindex {name}><sitemap><loc>{server.url('/s.xml.gz')}</loc></sitemap>"
        f"<sitemap><loc>{server.url('/plain.txt')}</loc></sitemap></sitemapindex>".encode(),
        "text/xml",
    )
    packed = gzip.compress(f"<urlset {name}>{inner}</urlset>".encode())
    server.pages["/s.xml.gz"] = Page(packed, "application/x-gzip")
    server.pages["/plain.txt"] = Page(f"{server.url('/three')}\n".encode(), "text/plain")
    assert set(crawl(tmp_path / "a", server.url())) == {"/"}
    found = crawl(tmp_path / "b", server.url(), sitemaps=True)
    assert set(found) == {"/", "/deep/one", "/deep/two", "/three"}
    bomb = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><urlset><url><loc>http://h/&b;</loc></url></urlset>'
    assert "aaaa" not in str(sitemap_urls(bomb, "http://h/", 1000)) and sitemap_urls(b"", "http://h/", 9) == ([], [])


# -- a Chinese site ----------------------------------------------------------------------------------------------------


def test_a_chinese_site_in_gb18030(server, tmp_path):
    def page(title: str, body: str, *links: str) -> Page:
        anchors = "".join(f"<a href='{link}'>链接</a>" for link in links)
        text = (
            f"<html><head><meta charset=gb2312><title>{title}</title></head><body><p>{body}</p>{anchors}</body></html>"
        )
        return Page(text.encode("gb18030"), "text/html")

    server.pages["/"] = page("首页", CHINESE, "/诗?作者=李白")
    server.pages["/%E8%AF%97?%D7%F7%D5%DF=%C0%EE%B0%D7"] = page("诗", TRADITIONAL)  # the query in the page's encoding
    found = crawl(tmp_path, server.url())
    poem = found["/%E8%AF%97?%D7%F7%D5%DF=%C0%EE%B0%D7"]
    assert poem["title"] == "诗" and "國破山河在" in poem["text"] and poem["language"] == "zh"
    assert found["/"]["language"] == "zh" and CHINESE in found["/"]["text"]


# -- kills and mistakes ------------------------------------------------------------------------------------------------


def test_kill_in_the_middle_and_the_same_command_goes_on(server, tmp_path):
    site(server, {f"/{n}": html(f"Number{n}", *[f"/{m}" for m in range(30)]) for n in range(30)})
    line = [sys.executable, "-m", "data_tools.crawl", server.url("/0"), "--out", str(tmp_path / "o"), "--delay", "0.03"]
    for wanted in (6, 14):
        process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(server.log) < wanted:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not list((tmp_path / "o").glob("part-*"))
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = records(tmp_path / "o")  # which checks that no id comes twice
    assert set(found) == {f"/{n}" for n in range(30)}
    assert len(server.log) <= 31 + 2  # at most the page in flight is asked for again, robots.txt is not
    assert json.loads((tmp_path / "o" / "summary.json").read_text())["records_out"] == 30


def test_ctrl_c_leaves_what_was_found_and_goes_on(server, tmp_path):
    site(server, {f"/{n}": html(f"Number{n}", f"/{n + 1}") for n in range(9)})
    line = [sys.executable, "-m", "data_tools.crawl", server.url("/0"), "--out", str(tmp_path), "--depth", "20"]
    process = subprocess.Popen([*line, "--delay", "0.2"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while len(server.log) < 4:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 130 and "stopped; the same command goes on" in said
    assert 2 <= len(records(tmp_path)) <= 4
    done = subprocess.run([*line, "--delay", "0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "going on: " in done.stdout and len(records(tmp_path)) == 9


def test_the_output_is_cut_back_to_the_state(tmp_path):
    frontier = Frontier(tmp_path / "f.sqlite")
    output = Output(tmp_path, tmp_path, frontier)
    with frontier:
        output.add({"id": "a"})
    with pytest.raises(RuntimeError), frontier:
        output.add({"id": "b"})
        raise RuntimeError("killed before the state was written")
    output.close()
    output = Output(tmp_path, tmp_path, frontier)
    with frontier:
        output.add({"id": "c"})
    output.roll(least=1)
    assert (tmp_path / "part-00000.jsonl").read_bytes() == encode({"id": "a"}) + encode({"id": "c"})
    # killed between the renaming of a part and its note
    with frontier:
        output.add({"id": "d"})
    output.close()
    os.replace(tmp_path / "part.jsonl", tmp_path / "part-00001.jsonl")
    output = Output(tmp_path, tmp_path, frontier)
    with frontier:
        output.add({"id": "e"})
    output.roll(least=1)
    output.close()
    assert [path.read_text() for path in sorted(tmp_path.glob("part-*"))][1:] == ['{"id": "d"}\n', '{"id": "e"}\n']


def test_a_page_that_breaks_a_parser_is_counted(server, tmp_path, monkeypatch):
    site(server, {"/": html("Home", "/a"), "/a": html("A")})
    real = crawler_module.read_page

    def fragile(answer: Answer, product: str):
        if answer.url.endswith("/a"):
            raise RecursionError("too deep")
        return real(answer, product)

    monkeypatch.setattr(crawler_module, "read_page", fragile)
    assert set(crawl(tmp_path, server.url())) == {"/"} and reasons(tmp_path) == {"/a": "broken_page"}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["ftp://h/"], "ftp://h/ is not an http(s) address: write it like https://example.org/"),
        (["nonsense"], "is not an http(s) address"),
        (["http://localhost:1/", "--domains", "a/b"], "--domains a/b is not a domain"),
        (["http://localhost:1/", "--delay", "-1"], "cannot be negative"),
        (["http://localhost:1/", "--user-agent", " "], "--user-agent has to be a name"),
        (["http://localhost:1/", "--user-agent", "爬虫"], "--user-agent has to be a name"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["crawl", *arguments, "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_folders_in_the_way(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    for name, said in [("file", "is a file, and a folder is needed"), ("full", "exists and holds other files")]:
        monkeypatch.setattr(sys, "argv", ["crawl", "http://localhost:1/", "--out", str(tmp_path / name)])
        with pytest.raises(SystemExit):
            main()
        assert said in capsys.readouterr().err
    assert start_url("example.org/x") == "https://example.org/x"
