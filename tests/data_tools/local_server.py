"""A web server on this machine that behaves and misbehaves as tests ask: ranges, stalls, cuts, redirects, hub APIs.

`LocalServer` answers paths with `Page` objects; `faults` of a page are used up one a request, in order, before the
page is served as it should be. Every request is kept in `log` with the number of body bytes that were sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]


@dataclass
class Fault:
    """What goes wrong with one request: another status, or a body that is cut or stops for a while after some bytes."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body, then the connection is closed
    stall_after: int | None = None  # bytes of the body, then `stall_s` seconds of silence, then closed
    stall_s: float = 0.0
    body: bytes | None = None  # another content, for this request only


@dataclass
class Page:
    """One path: its bytes, and how the server treats requests for it."""

    content: bytes = b""
    type: str = "application/octet-stream"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    etag: str | None = "auto"  # "auto": made from the content; None: no ETag and no If-Range
    ranges: bool = True
    if_range: bool = True  # False: a server that honours Range and ignores If-Range
    chunked: bool = False  # no Content-Length
    needs_token: str | None = None
    rate: float | None = None  # bytes a second
    faults: list[Fault] = field(default_factory=list)

    def tag(self) -> str | None:
        return f'"{hashlib.md5(self.content).hexdigest()}"' if self.etag == "auto" else self.etag


@dataclass
class Request:
    """A request as the server saw it."""

    time: float
    path: str
    host: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0
    finished: float = 0.0


class LocalServer:
    """Serves `pages` (path with query, or path alone) or what `answer(path)` gives; see the module's docstring."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.answer: Callable[[str], Page | None] | None = None
        self.log: list[Request] = []
        self.stopping = threading.Event()
        outer = self

        class Handler(_Handler):
            server_of_test = outer

        self._server = _Quiet(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def url(self, path: str = "", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def find(self, path: str) -> Page | None:
        page = self.pages.get(path) or self.pages.get(urlsplit(path).path)
        return page if page is not None or self.answer is None else self.answer(path)

    def requests(self, path: str) -> list[Request]:
        return [request for request in self.log if request.path == path]

    def sent(self, path: str) -> int:
        """Body bytes sent for a path, over all requests; a client may have the last block before it is counted."""
        deadline = time.monotonic() + 2
        while not all(request.finished for request in self.requests(path)) and time.monotonic() < deadline:
            time.sleep(0.001)
        return sum(request.sent for request in self.requests(path))

    def close(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_test: LocalServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server_of_test
        seen = Request(time.monotonic(), self.path, self.headers.get("Host", ""), dict(self.headers))
        server.log.append(seen)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._respond(server, seen)
        seen.finished = time.monotonic()

    do_HEAD = do_GET

    def _respond(self, server: LocalServer, seen: Request) -> None:
        page = server.find(self.path)
        if page is None:
            return self._whole(seen, 404, {}, b"not here")
        if page.needs_token and self.headers.get("Authorization") != f"Bearer {page.needs_token}":
            return self._whole(seen, 401, {"X-Error-Code": "GatedRepo"}, b"gated")
        fault = page.faults.pop(0) if page.faults else Fault()
        if fault.status is not None:
            return self._whole(seen, fault.status, fault.headers, b"trouble")
        content = page.content if fault.body is None else fault.body
        status, start, stop, headers = page.status, 0, len(content), {"Content-Type": page.type, **page.headers}
        tag = page.tag()
        if tag is not None:
            headers["ETag"] = tag
        match = (
            re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if page.ranges and status == 200 else None
        )
        condition = self.headers.get("If-Range")
        if match and (condition is None or not page.if_range or condition == tag):
            start = int(match[1])
            stop = min(stop, int(match[2]) + 1) if match[2] else stop
            if start >= len(content):
                return self._whole(seen, 416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{len(content)}"
        self._send_head(seen, status, headers, None if page.chunked else stop - start)
        body = content[start:stop] if self.command == "GET" else b""
        end = fault.cut_after if fault.cut_after is not None else fault.stall_after
        self._send_body(seen, body if end is None else body[:end], page.rate)
        if end is not None:
            if fault.stall_after is not None:
                server.stopping.wait(fault.stall_s)
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        if page.chunked:
            self.close_connection = True

    def _whole(self, seen: Request, status: int, headers: dict[str, str], body: bytes) -> None:
        self._send_head(seen, status, headers, len(body))
        self._send_body(seen, body if self.command == "GET" else b"", None)

    def _send_head(self, seen: Request, status: int, headers: dict[str, str], length: int | None) -> None:
        seen.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is None:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send_body(self, seen: Request, body: bytes, rate: float | None) -> None:
        step = len(body) if rate is None else max(1, int(rate / 50))
        for begin in range(0, len(body), max(step, 1)):
            block = body[begin : begin + step]
            self.wfile.write(block)
            seen.sent += len(block)
            if rate is not None and self.server_of_test.stopping.wait(len(block) / rate):
                return


def html_page(title: str, *links: str, head: str = "", body: str = "", words: str = "") -> bytes:
    """A page with a menu, an article of its own and a footer."""
    told = words or f"The article about {title} says something that no other page says, namely {title} and {title}."
    text = "".join(f"<p>{told} This is paragraph {number}, long enough to count as one.</p>" for number in range(4))
    anchors = "".join(f'<li><a href="{link}">link</a></li>' for link in links)
    return (
        f"<!doctype html><html lang='en-GB'><head><title>{title}</title>{head}</head><body>"
        f"<nav><ul>{anchors}</ul></nav><article><h1>{title}</h1>{text}{body}</article>"
        "<footer>All rights reserved, imprint, cookies</footer></body></html>"
    ).encode()


def run_tool(module: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` from the project's folder."""
    line = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


@contextlib.contextmanager
def serving() -> Iterator[LocalServer]:
    """A server that ends with the `with` block."""
    server = LocalServer()
    try:
        yield server
    finally:
        server.close()
