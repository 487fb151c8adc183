"""Addresses: one spelling for each, which of them belong to a crawl, and which look like a trap.

Contract: `canonical` is idempotent; two addresses that RFC 3986 calls equivalent get one spelling (scheme and host in
small letters, no default port, no fragment, dot segments resolved, escapes in capitals and only where needed). The
order of a query is kept: servers may care.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit, urlunsplit

from minillm.utils.errors import UserError

MAX_URL_LENGTH = 2000
MAX_SEGMENTS = 16  # of a path
MAX_REPEATS = 3  # of one segment in a path: /a/b/a/b/a/b/a is a loop of relative links
MAX_PARAMETERS = 12
_PORTS = {"http": 80, "https": 443}
_UNRESERVED = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
_NO_PAGES = frozenset(
    ".7z .apk .avi .bin .bmp .bz2 .css .csv .dmg .doc .docx .epub .exe .flac .flv .gif .gz .ico .iso .jar .jpeg .jpg "
    ".js .json .m4a .mkv .mov .mp3 .mp4 .mpeg .mpg .odt .ogg .pdf .png .ppt .pptx .ps .rar .rss .svg .tar .tgz .tif "
    ".tiff .torrent .ttf .wav .webm .webp .wma .wmv .woff .woff2 .xls .xlsx .xml .xz .zip".split()
)


def canonical(url: str, base: str | None = None, encoding: str = "utf-8") -> str | None:
    """The one spelling of an address, None for what is not an http(s) address.

    Args:
        base: the address of the page that holds a relative one.
        encoding: of the page: browsers escape the query in it.
    """
    url = re.sub(r"[\t\r\n]", "", url).strip(" \0")
    try:
        parts = urlsplit(urljoin(base, url) if base else url)
        scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
        if scheme not in _PORTS or not host:
            return None
        host = host.rstrip(".")
        if not host.isascii():
            host = host.encode("idna").decode()
    except (ValueError, UnicodeError):
        return None
    if not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host):
        return None
    netloc = f"[{host}]" if ":" in host else host
    if port is not None and port != _PORTS[scheme]:
        netloc += f":{port}"
    # urljoin leaves the dot segments of an absolute address as they are
    path = urlsplit(urljoin(f"{scheme}://{netloc}/", parts.path or "/")).path if parts.path.startswith("/") else "/"
    query = _escaped(parts.query, "/?:@!$&'()*+,;=", encoding)
    return urlunsplit((scheme, netloc, _escaped(path, "/:@!$&'()*+,;=", "utf-8"), query, ""))


def _escaped(text: str, keep: str, encoding: str) -> str:
    """Escapes in capitals, none where none is needed, and new ones where they are."""
    text = "".join(
        part
        if part.startswith("%")
        else quote(part, safe=keep + _UNRESERVED + "%", encoding=encoding, errors="replace")
        for part in re.split(r"(%[0-9A-Fa-f]{2})", text)
    )
    text = re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", text)

    def simplest(match: re.Match[str]) -> str:
        character = unquote_to_bytes(match[0]).decode("latin-1")
        return character if character in _UNRESERVED else match[0].upper()

    return re.sub(r"%[0-9A-Fa-f]{2}", simplest, text)


def host_of(url: str) -> str:
    """Scheme, host and port: what robots.txt and delays belong to."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


@dataclass(frozen=True)
class Scope:
    """Which addresses a crawl may visit.

    Attributes:
        starts: host[:port] of the start addresses.
        domains: more of them, with everything below (example.org: also www.example.org, at any port).
    """

    starts: frozenset[str]
    domains: tuple[str, ...] = ()

    def allows(self, url: str) -> bool:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.netloc in self.starts or "*" in self.domains:
            return True
        return any(
            parts.netloc == domain
            or host == domain
            or host.endswith("." + domain)
            or parts.netloc.endswith("." + domain)
            for domain in self.domains
        )


def build_scope(starts: list[str], domains: list[str], same_domain: bool) -> Scope:
    """The scope of a command line; the start addresses are canonical.

    Args:
        same_domain: everything below the registered domains of the starts (news.example.org: example.org).

    Raises:
        UserError: something that is not a domain.
    """
    named = []
    for domain in domains:
        domain = domain.lower().strip(".")
        if domain != "*":
            known = canonical(f"http://{domain}/")
            if known is None or urlsplit(known).path != "/" or "/" in domain:
                raise UserError(f"--domains {domain} is not a domain: write it like example.org or example.org:8080")
            domain = urlsplit(known).netloc
        named.append(domain)
    if same_domain:
        from data_tools.extras import require

        extract_domain = require("courlan", "trafilatura").extract_domain
        named += [extract_domain(start) or urlsplit(start).hostname or "" for start in starts]
    return Scope(frozenset(urlsplit(start).netloc for start in starts), tuple(dict.fromkeys(named)))


def same_site(one: str, other: str) -> bool:
    """Whether two addresses belong to one registered domain."""
    from data_tools.extras import require

    extract_domain = require("courlan", "trafilatura").extract_domain
    return extract_domain(one) is not None and extract_domain(one) == extract_domain(other)


def trap(url: str) -> str | None:
    """Why an address is not worth asking for (a short name), None for most."""
    if len(url) > MAX_URL_LENGTH:
        return "url_too_long"
    parts = urlsplit(url)
    segments = [segment for segment in parts.path.split("/") if segment]
    if len(segments) > MAX_SEGMENTS or any(segments.count(segment) > MAX_REPEATS for segment in set(segments)):
        return "url_trap"
    if parts.query.count("&") >= MAX_PARAMETERS:
        return "url_trap"
    if segments and not parts.path.endswith("/") and PurePosixPath(parts.path).suffix.lower() in _NO_PAGES:
        return "file_type"
    return None


def is_private(host: str) -> bool:
    """Whether a host name or address leads into a private network, or to this machine.

    Raises:
        OSError: the name cannot be resolved.
    """
    try:
        found = {host: ipaddress.ip_address(host)}
    except ValueError:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        found = {str(answer[4][0]): ipaddress.ip_address(str(answer[4][0]).partition("%")[0]) for answer in answers}
    return any(not address.is_global for address in found.values())
