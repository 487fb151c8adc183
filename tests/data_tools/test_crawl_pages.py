"""What the crawler makes of addresses and of pages: spellings, traps, encodings, links."""

from __future__ import annotations

import pytest

from data_tools.crawling.fetching import Answer
from data_tools.crawling.pages import decode, read_page
from data_tools.crawling.urls import build_scope, canonical, trap
from minillm.utils.errors import UserError
from tests.data_tools.local_server import html_page as html

CHINESE = "春天来了，花儿开了，小鸟在树上唱歌，孩子们在草地上奔跑。" * 8
TRADITIONAL = "國破山河在，城春草木深。感時花濺淚，恨別鳥驚心。烽火連三月，家書抵萬金。" * 8


@pytest.mark.parametrize(
    "text, encoding, content_type, meta",
    [
        (CHINESE, "utf-8", "text/html", ""),
        (CHINESE, "gb18030", "text/html; charset=GB2312", ""),
        (CHINESE + "镕", "gb18030", "text/html", '<meta charset="gbk">'),
        (CHINESE, "gb18030", "text/html", '<meta http-equiv="Content-Type" content="text/html; charset=gb2312">'),
        (CHINESE, "gb18030", "text/html", ""),  # told nowhere
        (CHINESE, "gb18030", "text/html; charset=utf-8", '<meta charset="gb18030">'),  # the header lies
        (TRADITIONAL, "big5", "text/html; charset=big5", ""),
        (TRADITIONAL, "big5", "text/html", ""),
        (CHINESE, "utf-16", "text/html", ""),
        (CHINESE, "utf-8-sig", "text/html; charset=gbk", ""),
        ("Füße und Straßen, naïve Cafés – «ça va» " * 9, "cp1252", "text/html; charset=iso-8859-1", ""),
        (
            "Привет, как дела? Это длинная русская страница. " * 9,
            "cp1251",
            "text/html",
            '<meta charset="windows-1251">',
        ),
    ],
)
def test_encodings(text, encoding, content_type, meta):
    page = f"<html><head>{meta}<title>{text[:8]}</title></head><body><article><p>{text}</p></article></body></html>"
    answer = Answer("http://h/x", 200, {"Content-Type": content_type}, page.encode(encoding))
    found = read_page(answer, "me")
    assert found.problem is None and text.strip() in found.text and found.title == text[:8].strip()


def test_encodings_with_damage():
    body = (CHINESE * 20).encode("gb18030")
    assert decode(body[:1000] + b"\xff" + body[1000:], "text/html; charset=gbk")[0].count("\ufffd") <= 5
    assert decode(b"caf\xc3\xa9", "text/html; charset=no-such-thing") == ("café", "utf-8")


def test_titles_are_those_that_the_page_states():
    menu = "<h2>Keyboard shortcuts</h2><p>Press ? for help</p>"
    for head, expected in [
        ("", "If and else - The Book"),
        ('<meta property="og:title" content="If">', "If"),
        ('<meta property="og:title" content=" ">', "If and else - The Book"),
    ]:
        body = html("If and else - The Book", head=head).replace(b"<nav>", f"<nav>{menu}".encode())
        assert read_page(Answer("http://h/", 200, {"Content-Type": "text/html"}, body), "me").title == expected


def test_links_with_base_frames_and_refresh():
    body = html(
        "T", "rel", head='<base href="/dir/"><meta http-equiv="refresh" content="5; url=next">',
        body='<iframe src="frame"></iframe><map><area href="area"></map><a href="#top">x</a><a href="tel:1">y</a>',
    )  # fmt: skip
    page = read_page(Answer("http://h/a/b", 200, {"Content-Type": "text/html"}, body), "me")
    assert page.links == [f"http://h/dir/{name}" for name in ("next", "rel", "frame", "area", "")]


@pytest.mark.parametrize(
    "url, expected",
    [
        ("HTTP://Example.ORG:80/a/../b/./c#x", "http://example.org/b/c"),
        ("https://h:443", "https://h/"),
        ("http://h/%7euser/%e4%b8%ad?b=2&a=1", "http://h/~user/%E4%B8%AD?b=2&a=1"),
        ("http://例子.中国/中 文", "http://xn--fsqu00a.xn--fiqs8s/%E4%B8%AD%20%E6%96%87"),
        ("http://u:p@h./x?", "http://h/x"),
        ("http://[::1]:8080/x", "http://[::1]:8080/x"),
        ("ftp://h/x", None), ("javascript:x", None), ("http://", None), ("http://h:99999/", None), ("http://[x", None),
    ],
)  # fmt: skip
def test_canonical_addresses(url, expected):
    assert canonical(url) == expected
    assert expected is None or canonical(expected) == expected


def test_traps_and_scopes():
    assert trap("http://h/" + "x" * 2000) == "url_too_long" and trap("http://h/a/a/a/a/") == "url_trap"
    assert trap("http://h/x.PDF") == "file_type" and trap("http://h/x.html") is None and trap("http://h.zip/") is None
    scope = build_scope(["http://www.example.org/"], ["b.net", "c.io:8080"], False)
    allowed = ["http://www.example.org/x", "https://b.net/", "http://x.b.net:81/", "http://c.io:8080/"]
    refused = ["http://example.org/", "http://xb.net/", "http://c.io/", "http://www.example.org.evil.com/"]
    assert all(map(scope.allows, allowed)) and not any(map(scope.allows, refused))
    scope = build_scope(["http://news.example.co.uk/"], [], True)
    assert scope.allows("https://example.co.uk/") and not scope.allows("https://other.co.uk/")
    with pytest.raises(UserError, match="is not a domain"):
        build_scope([], ["http://x/y"], False)
