"""One request of the crawler, with limits on size, time and kind of content, and no redirect followed.

Contract: `Fetcher.get` never raises for what a server does: the Answer says what came, or in `problem` why nothing of
use did; `transient` marks what another try may mend. No cookies, no credentials (.netrc included). Addresses in private
networks are asked only at the hosts named as starts.
"""

from __future__ import annotations

import contextlib
import http.client
import http.cookiejar
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from data_tools.crawling.urls import canonical, is_private
from data_tools.downloading.web import retry_after_s, root_cause

PAGE_TYPES = ("text/html", "application/xhtml+xml", "text/plain")
SITEMAP_TYPES = ("text/xml", "application/xml", "application/gzip", "application/x-gzip", "text/plain")
_CHUNK_BYTES = 1 << 16


@dataclass
class Answer:
    """What one request brought."""

    url: str
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    problem: str | None = None  # short stable name
    detail: str = ""
    transient: bool = False
    location: str | None = None  # where a redirect leads, canonical
    wait_s: float | None = None  # what Retry-After asks for

    @property
    def content_type(self) -> str:
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()


class Fetcher:
    """Makes requests, for several threads.

    Args:
        private_hosts: host[:port] that may lie in a private network.
        max_bytes: of a body, decompressed.
        timeout_s: until a connection, and between two pieces; a whole page may take three times as long.
    """

    def __init__(self, user_agent: str, private_hosts: frozenset[str], max_bytes: int, timeout_s: float) -> None:
        self.user_agent, self.private_hosts = user_agent, private_hosts
        self.max_bytes, self.timeout_s = max_bytes, timeout_s
        self._local = threading.local()
        self._private: dict[str, bool] = {}

    def get(self, url: str, types: tuple[str, ...] | None = PAGE_TYPES, head_bytes: int | None = None) -> Answer:
        """Ask for an address.

        Args:
            types: a body of another type is not read; None takes any.
            head_bytes: read so much of the body and no more, in the place of refusing one that is too large.
        """
        import requests

        answer = Answer(url)
        refused = self._refused(url)
        if refused is not None:
            answer.problem, answer.detail, answer.transient = refused
            return answer
        accept = f"{', '.join(types)};q=0.9, */*;q=0.1" if types else "*/*"
        try:
            response = self._session().get(
                url, headers={"Accept": accept}, stream=True, timeout=self.timeout_s, allow_redirects=False
            )
        except requests.exceptions.SSLError as error:
            answer.problem, answer.detail = "certificate", root_cause(error)
            return answer
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, ValueError) as error:
            answer.problem, answer.detail = "bad_url", root_cause(error)
            return answer
        except requests.exceptions.Timeout as error:
            answer.problem, answer.detail, answer.transient = "timeout", root_cause(error), True
            return answer
        except requests.exceptions.RequestException as error:
            answer.problem, answer.detail, answer.transient = "connection", root_cause(error), True
            return answer
        with contextlib.closing(response):
            self._read(response, answer, types, head_bytes)
        return answer

    def _read(self, response, answer: Answer, types: tuple[str, ...] | None, head_bytes: int | None) -> None:
        status = answer.status = response.status_code
        answer.headers = response.headers
        if status in (301, 302, 303, 307, 308):
            location = _as_utf8(response.headers.get("Location"))
            answer.location = canonical(location, answer.url) if location else None
            answer.problem = None if answer.location else "bad_redirect"
            answer.detail = location or "no Location"
        elif status != 200:
            answer.problem = f"http_{status}"
            answer.transient = status >= 500 or status in (408, 425, 429)
            answer.wait_s = retry_after_s(response.headers, time.time()) if answer.transient else None
            answer.detail = f"the server answers {status} {response.reason}"
        elif types is not None and answer.content_type not in types:
            answer.problem, answer.detail = "content_type", answer.content_type or "none told"
        else:
            self._read_body(response, answer, head_bytes)

    def _read_body(self, response, answer: Answer, head_bytes: int | None) -> None:
        from urllib3.exceptions import HTTPError

        length = response.headers.get("Content-Length", "")
        if head_bytes is None and length.isdigit() and int(length) > self.max_bytes:
            answer.problem, answer.detail = "too_large", f"{int(length):,} bytes"
            return
        start, pieces, size = time.monotonic(), [], 0
        try:
            while piece := response.raw.read1(_CHUNK_BYTES, decode_content=True):
                pieces.append(piece)
                size += len(piece)
                if head_bytes is not None and size >= head_bytes:
                    break
                if head_bytes is None and size > self.max_bytes:
                    answer.problem, answer.detail = "too_large", f"more than {self.max_bytes:,} bytes"
                    return
                if time.monotonic() - start > 3 * self.timeout_s:
                    answer.problem, answer.detail = "too_slow", f"{size:,} bytes in {3 * self.timeout_s:.0f} s"
                    return
        except (HTTPError, http.client.HTTPException, OSError) as error:
            answer.problem, answer.detail, answer.transient = "connection", root_cause(error), True
            return
        answer.body = b"".join(pieces)[:head_bytes]

    def _refused(self, url: str) -> tuple[str, str, bool] | None:
        """(problem, detail, transient) for an address that is not asked: inside a private network, or unknown."""
        parts = urlsplit(url)
        if parts.netloc in self.private_hosts:
            return None
        host = parts.hostname or ""
        if host not in self._private:
            try:
                self._private[host] = is_private(host)
            except (OSError, UnicodeError):
                if parts.scheme in getproxies() and not proxy_bypass(host):
                    return None  # the proxy resolves the name
                return "unresolved", f"the name {host} cannot be resolved", True
        return ("private_address", f"{host} is in a private network", False) if self._private[host] else None

    def _session(self):
        """One session a thread, without cookies and without what .netrc knows."""
        import requests

        if not hasattr(self._local, "session"):
            session = requests.Session()
            session.headers["User-Agent"] = self.user_agent
            session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
            session.auth = lambda request: request
            self._local.session = session
        return self._local.session


def _as_utf8(value: str | None) -> str | None:
    """A header that holds UTF-8, which the library reads as Latin-1."""
    try:
        return value and value.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return value
