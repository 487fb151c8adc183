"""A page's bytes as text, links and rules for robots.

Contract: `read_page` returns the main text (without menus and footers, by trafilatura) with title, date and language
where they are known, and the links that may be followed. The encoding is the one that fits: byte order mark, header,
meta element, UTF-8, then a guess; GB2312 and GBK are read as GB18030, which holds them both.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from data_tools.crawling.fetching import Answer
from data_tools.crawling.urls import canonical

_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "iso-8859-1": "cp1252", "ascii": "utf-8", "big5": "big5hkscs"}
_GUESSES = ["gb18030", "big5", "shift_jis", "euc_jp", "euc_kr", "cp1252", "cp1251", "cp1250", "koi8_r"]
_META_BYTES = 4096
_REPLACED = 0.01  # share of characters that may be unreadable in a declared encoding
_ENOUGH_FOR_LANGUAGE = 50  # characters


@dataclass
class Page:
    """What a page holds; `problem` says why it gives no record."""

    text: str = ""
    title: str | None = None
    date: str | None = None
    language: str | None = None
    links: list[str] = field(default_factory=list)
    num_nofollow: int = 0
    problem: str | None = None
    detail: str = ""


def read_page(answer: Answer, product: str) -> Page:
    """Text and links of an answer with status 200; `product` is the crawler's name in robots rules."""
    from data_tools.extras import require

    if b"\0" in answer.body[:2048] and not answer.body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return Page(problem="binary", detail=f"it says {answer.content_type} and holds something else")
    decoded = decode(answer.body, answer.headers.get("Content-Type", ""))
    if decoded is None:
        return Page(problem="encoding", detail="no encoding fits its bytes")
    text, encoding = decoded
    rules = _header_rules(answer.headers.get("X-Robots-Tag", ""), product)
    if answer.content_type == "text/plain":
        page = Page(text=text.strip())
    else:
        page = _read_html(text, answer.url, encoding, product, rules)
    if "noindex" in rules:
        page.text, page.problem, page.detail = "", "noindex", "the page asks not to be indexed"
    elif page.problem is None and not page.text.strip():
        page.problem, page.detail = "no_text", "no main text was found"
    if len(page.text) >= _ENOUGH_FOR_LANGUAGE:  # what a template declares is often not what the page is in
        page.language = require("py3langid").classify(page.text[:2000])[0]
    return page


def decode(body: bytes, content_type: str) -> tuple[str, str] | None:
    """(text, encoding) of a body, or None where nothing fits."""
    for bom, encoding in _BOMS:
        if body.startswith(bom):
            return body.decode(encoding, errors="replace").lstrip("\ufeff"), encoding
    declared = [_known(name) for name in _declared(body, content_type)]
    candidates = [name for name in declared if name]
    for encoding in dict.fromkeys([*candidates, "utf-8"]):
        try:
            return body.decode(encoding), encoding
        except (UnicodeDecodeError, LookupError):
            continue
    for encoding in dict.fromkeys(candidates):  # a few broken bytes in a page that says what it is
        text = body.decode(encoding, errors="replace")
        if text.count("\ufffd") <= _REPLACED * len(text):
            return text, encoding
    from charset_normalizer import from_bytes

    best = from_bytes(body[: 1 << 18], cp_isolation=_GUESSES).best()
    if best is None:
        return None
    encoding = _SUPERSETS.get(best.encoding, best.encoding)
    return body.decode(encoding, errors="replace"), encoding


def _declared(body: bytes, content_type: str) -> Iterator[str]:
    if match := re.search(r"charset=[\"']?\s*([\w.:-]+)", content_type, re.IGNORECASE):
        yield match[1]
    if match := re.search(rb"<meta[^>]{0,200}?charset=[\"']?\s*([\w.:-]+)", body[:_META_BYTES], re.IGNORECASE):
        yield match[1].decode("ascii", errors="replace")
    if match := re.match(rb"\s*<\?xml[^>]{0,100}?encoding=[\"']([\w.:-]+)", body):
        yield match[1].decode("ascii", errors="replace")


def _known(name: str) -> str | None:
    name = name.lower()
    try:
        codecs.lookup(_SUPERSETS.get(name, name))
    except LookupError:
        return None
    return _SUPERSETS.get(name, name)


def _read_html(text: str, url: str, encoding: str, product: str, rules: set[str]) -> Page:
    from data_tools.extras import require

    html = require("lxml.html", "lxml")
    text = text.replace("\0", "")
    try:
        tree = html.document_fromstring(text.encode("utf-8", "replace"), parser=html.HTMLParser(encoding="utf-8"))
    except (ValueError, html.etree.LxmlError) as error:
        return Page(problem="no_text", detail=f"no HTML in it ({' '.join(str(error).split())[:100]})")
    rules |= _meta_rules(tree, product)
    page, title = Page(language=_declared_language(tree)), _title(tree)  # the extraction changes the tree
    if "nofollow" not in rules:
        page.links, page.num_nofollow = _links(tree, url, encoding)
    if "noindex" in rules:
        return page
    found = require("trafilatura").bare_extraction(
        tree, url=url, with_metadata=True, include_comments=False,
        date_extraction_params={"extensive_search": False, "original_date": True},  # a stated date, not a guessed one
    )  # fmt: skip
    if found is not None:
        page.text, page.date = (found.text or "").strip(), found.date
        page.title = title or found.title
    return page


def _title(tree) -> str | None:
    """What the page says of itself; trafilatura's guess may be the name of the site, or a heading of a menu."""
    stated = [*tree.xpath("//meta[@property='og:title']/@content"), *tree.xpath("//head/title/text()")]
    return next((cleaned for text in stated if (cleaned := " ".join(text.split()))), None)


def _links(tree, url: str, encoding: str) -> tuple[list[str], int]:
    """(canonical addresses in the page's order, number of links marked nofollow)."""
    bases = tree.xpath("//base/@href")
    base = (canonical(bases[0], url) if bases else None) or url
    found: dict[str, None] = {}
    num_nofollow = 0
    for element in tree.iter("a", "area", "frame", "iframe", "meta"):
        if element.tag == "meta":
            refresh = re.search(r"url\s*=\s*[\"']?([^\"']+)", element.get("content", ""), re.IGNORECASE)
            is_refresh = element.get("http-equiv", "").lower() == "refresh"
            target = refresh[1] if refresh and is_refresh else None
        else:
            target = element.get("href") or element.get("src")
        if not target:
            continue
        if "nofollow" in element.get("rel", "").lower().split():
            num_nofollow += 1
        elif (link := canonical(target, base, encoding)) is not None:
            found[link] = None
    return list(found), num_nofollow


def _meta_rules(tree, product: str) -> set[str]:
    rules: set[str] = set()
    for element in tree.iter("meta"):
        if element.get("name", "").lower() in ("robots", product.lower()):
            rules |= _rules(element.get("content", ""))
    return rules


def _header_rules(value: str, product: str) -> set[str]:
    """X-Robots-Tag: rules for all, or for the crawler that is named before a colon."""
    rules: set[str] = set()
    name = ""
    for part in value.split(","):
        before, colon, after = part.partition(":")
        if colon and "unavailable_after" not in before:
            name, part = before.strip().lower(), after
        if name in ("", product.lower()):
            rules |= _rules(part)
    return rules


def _rules(value: str) -> set[str]:
    found = {part.strip().lower() for part in value.split(",")}
    return {"noindex", "nofollow"} if "none" in found else found & {"noindex", "nofollow"}


def _declared_language(tree) -> str | None:
    declared = (tree.get("lang") or tree.get("{http://www.w3.org/XML/1998/namespace}lang") or "").strip().lower()
    return declared.replace("_", "-").partition("-")[0] if re.match(r"[a-z]{2,3}([-_]|$)", declared) else None


def sitemap_urls(body: bytes, url: str, max_bytes: int) -> tuple[list[str], list[str]]:
    """(pages, further sitemaps) that a sitemap names; nothing where it is not a sitemap."""
    import zlib

    from data_tools.extras import require

    if body.startswith(b"\x1f\x8b"):
        try:
            body = zlib.decompressobj(wbits=31).decompress(body, max_bytes)
        except zlib.error:
            return [], []
    if not body.lstrip().startswith(b"<"):  # the plain form: an address a line
        lines = body.decode("utf-8", errors="replace").split()
        return [link for line in lines if (link := canonical(line)) is not None], []
    etree = require("lxml.etree", "lxml")
    parser = etree.XMLParser(resolve_entities=False, no_network=True, recover=True, huge_tree=False)
    tree = etree.fromstring(body, parser)
    if tree is None:
        return [], []
    found: dict[str, list[str]] = {"url": [], "sitemap": []}
    for element in tree.iter("{*}loc"):
        parent = element.getparent()
        kind = etree.QName(parent).localname if parent is not None else ""
        link = canonical((element.text or "").strip(), url)
        if kind in found and link is not None:
            found[kind].append(link)
    return found["url"], found["sitemap"]
