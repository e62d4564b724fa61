"""A local HTTP server that serves files, and fails in the ways in which servers fail.

`Server.plan` holds, for a path, what its next answers are; once they are used up, the path is served well. An answer is
one of the names of `Handler.ANSWERS`, or a number: that status.
"""

import hashlib
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves `files` {path: content} at `url`; `requests` has (path, headers) of every GET."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.plan: dict[str, list] = defaultdict(list)
        self.requests: list[tuple[str, dict]] = []
        self.retry_after: str | None = None
        self.changed: dict[str, bytes] = {}  # what a path holds after the answer "cut and change"
        self.ranges, self.tags, self.pace, self.cut_at = True, True, 0.0, 0.5
        self.stall = 1.5  # seconds without a byte
        self.at_once, self.most_at_once, self.lock = 0, 0, threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def asked(self, path: str) -> list[dict]:
        """The headers of the GETs of a path."""
        return [headers for own, headers in self.requests if own == path]

    def handle_error(self, request, client_address):
        """Clients that hang up are what is tested."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        """Silence."""

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        server = self.server
        with server.lock:
            server.requests.append((self.path, dict(self.headers)))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            planned = server.plan[self.path]
            answer = planned.pop(0) if planned else "well"
        try:
            self.answer(answer)
        finally:
            with server.lock:
                server.at_once -= 1

    def answer(self, answer: str | int) -> None:
        content = self.server.files.get(self.path)
        if isinstance(answer, int) or content is None:
            return self.status(answer if isinstance(answer, int) else 404)
        cut = int(len(content) * self.server.cut_at)
        if answer == "close":  # without a word
            return self.hang_up()
        if answer == "stall":
            time.sleep(self.server.stall)
            return self.hang_up()
        if answer == "redirect":
            self.send_response(302)
            self.send_header("Location", self.server.url + self.path)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if answer == "web page":
            return self.whole(b"<!DOCTYPE html><html>Please log in.</html>")
        if answer == "longer":  # announces more than it has
            return self.whole(content, len(content) + 100)
        if answer == "shorter":
            return self.whole(content, cut)
        if answer == "size unknown, cut":  # as HTTP/1.0 does
            self.head(200, content, None)
            self.wfile.write(content[:cut])
            return self.hang_up()
        if answer == "other bytes":  # of the right number
            return self.whole(bytes(len(content)))
        if answer in ("cut", "cut and change", "stall in the middle"):
            first = self.head_of(content)
            self.wfile.write(content[first : first + max(1, int((len(content) - first) * self.server.cut_at))])
            self.wfile.flush()
            if answer == "stall in the middle":
                time.sleep(1.5)
            if answer == "cut and change":
                self.server.files[self.path] = self.server.changed[self.path]
            return self.hang_up()
        self.body(content[self.head_of(content) :])

    def status(self, status: int) -> None:
        self.send_response(status)
        if self.server.retry_after is not None:
            self.send_header("Retry-After", self.server.retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def head_of(self, content: bytes) -> int:
        """Send the head of an answer to the range that is asked for; returns its first byte."""
        wanted, tag = self.headers.get("Range", ""), self.tag(content)
        first = int(wanted.removeprefix("bytes=").partition("-")[0] or 0)
        if not wanted or not self.server.ranges or self.headers.get("If-Range", tag) != tag:
            self.head(200, content, len(content))
            return 0
        if first >= len(content):
            self.head(416, content, 0, f"bytes */{len(content)}")
            return len(content)
        self.head(206, content, len(content) - first, f"bytes {first}-{len(content) - 1}/{len(content)}")
        return first

    def head(self, status: int, content: bytes, length: int | None, of: str = "") -> None:
        self.send_response(status)
        for name, value in (("ETag", self.tag(content)), ("Content-Length", length), ("Content-Range", of)):
            if value not in (None, ""):
                self.send_header(name, str(value))
        if length is None:
            self.send_header("Connection", "close")
        self.end_headers()

    def tag(self, content: bytes) -> str:
        return f'"{hashlib.md5(content).hexdigest()}"' if self.server.tags else ""

    def whole(self, content: bytes, length: int | None = None) -> None:
        self.head(200, content, len(content) if length is None else length)
        self.body(content)
        if length is not None:
            self.hang_up()

    def body(self, content: bytes) -> None:
        if not self.server.pace:
            self.wfile.write(content)
        else:
            for start in range(0, len(content), 1 << 12):
                self.wfile.write(content[start : start + (1 << 12)])
                self.wfile.flush()
                time.sleep(self.server.pace)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()
