"""A web server on this machine that behaves well, badly, or not at all, for tests of downloads."""

import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ptqsam import sources

MODEL = bytes(range(256)) * 4096 + b'end'
MODEL_SHA256 = hashlib.sha256(MODEL).hexdigest()


@dataclass
class Server:
    """What the server does, and what it was asked."""

    url: str = ''
    files: dict[str, bytes] = field(default_factory=dict)  # path -> content
    ranges: bool = True
    tags: tuple[str, ...] = ('ETag', 'Last-Modified')  # what is said of the version of a file
    weak: bool = False  # the ETag
    conditional: bool = True  # If-Range is minded
    status: int = 200
    content_type: str = 'application/octet-stream'
    cuts: list[int] = field(default_factory=list)  # bytes after which the next answers break off
    hang_after: int | None = None  # bytes after which the answer stalls until `release` is set
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range header
    conditions: list[str | None] = field(default_factory=list)  # If-Range headers

    def tags_of(self, content: bytes) -> dict[str, str]:
        """Headers that tell one version of a file from another."""
        digest = hashlib.sha256(content).hexdigest()
        date = formatdate(int(digest[:7], 16), usegmt=True)
        known = {'ETag': ('W/' if self.weak else '') + f'"{digest[:16]}"', 'Last-Modified': date}
        return {name: known[name] for name in self.tags}

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer a GET request."""
        wanted = handler.headers.get('Range')
        self.asked.append((handler.path, wanted))
        # as a proxy it is asked for whole addresses
        content = self.files.get('/' + handler.path.rpartition('host.invalid')[2].lstrip('/'))
        if self.status != 200 or content is None:
            handler.send_error(self.status if self.status != 200 else 404)
            return
        condition = handler.headers.get('If-Range')
        self.conditions.append(condition)
        tags = self.tags_of(content)
        wanted = wanted if self.ranges and (condition in (None, *tags.values()) or not self.conditional) else None
        start = int(wanted.removeprefix('bytes=').removesuffix('-')) if wanted else 0
        if start >= len(content):
            handler.send_response(416)
            handler.send_header('Content-Range', f'bytes */{len(content)}')
            handler.end_headers()
            return
        body = content[start:]
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        for name, value in tags.items():
            handler.send_header(name, value)
        handler.send_header('Content-Type', self.content_type)
        handler.send_header('Content-Length', str(len(body)))
        handler.end_headers()
        if self.cuts:
            body = body[: self.cuts.pop(0)]
        if self.hang_after is not None:
            handler.wfile.write(body[: self.hang_after])
            handler.wfile.flush()
            self.stalled.set()
            self.release.wait(30)
            return
        handler.wfile.write(body)


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> Iterator[Server]:
    """Run a server for a while, with no proxy in the way and no waiting between retries."""
    state = Server(files=files)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            state.answer(self)

    class QuietServer(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            """A client that hangs up is part of the tests."""

    httpd = QuietServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True)
    thread.start()
    state.url = f'http://127.0.0.1:{httpd.server_port}'
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources, 'RETRY_WAIT_SECONDS', 0.0)
    try:
        yield state
    finally:
        state.release.set()
        httpd.shutdown()
        httpd.server_close()
        thread.join()


@contextmanager
def serve_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serve one file, `MODEL`; the state's `url` is its address."""
    with serve(monkeypatch, {'/model.pth': MODEL}) as state:
        state.url += '/model.pth'
        yield state


def closed_port() -> int:
    """A port on which nobody answers."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]
