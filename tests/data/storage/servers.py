"""Servers on loopback: files over HTTP, with or without byte ranges, and a TCP proxy that breaks connections."""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Request(NamedTuple):
    method: str
    path: str
    range: tuple[int, int] | None
    """First and last byte asked for."""


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Connections break here on purpose."""


class Web:
    """Serves `files` by path and writes down what it was asked for."""

    def __init__(self, ranges: bool = True, etags: bool = True) -> None:
        self.ranges, self.etags = ranges, etags
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.status: dict[str, deque[int]] = {}
        """Path -> answers to give before the real one."""
        self.before: Callable[[Request], None] = lambda request: None
        self.body: Callable[[Request, bytes], bytes] = lambda request, body: body
        self.log: list[Request] = []
        self.etag_of: dict[int, tuple[bytes, str]] = {}
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                web._answer(self)

            do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

            def log_message(self, *_: object) -> None: ...

        self.server = _Quiet(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, path: str, port: int | None = None) -> str:
        return f"http://127.0.0.1:{port or self.port}{path}"

    def gets(self) -> list[Request]:
        return [request for request in self.log if request.method == "GET"]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        span = (int(asked[1]), int(asked[2])) if asked else None
        request = Request(handler.command, handler.path, span)
        self.log.append(request)
        self.before(request)
        waiting = self.status.get(handler.path)
        content = self.files.get(handler.path)
        etag = self._etag(content or b"")
        code = waiting.popleft() if waiting else 404 if content is None else 200
        if code == 200 and handler.headers.get("If-Match", etag) != etag:
            code = 412
        handler.send_response(206 if code == 200 and span and self.ranges else code)
        body = content if code == 200 and content is not None else b""
        if body and span and self.ranges:
            handler.send_header("Content-Range", f"bytes {span[0]}-{span[1]}/{len(body)}")
            body = body[span[0] : span[1] + 1]
        if self.etags:
            handler.send_header("ETag", etag)
        for name, value in self.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command == "GET":
            try:
                handler.wfile.write(self.body(request, body))
            except ConnectionError:
                handler.close_connection = True

    def _etag(self, content: bytes) -> str:
        found = self.etag_of.get(id(content))
        if found is None or found[0] is not content:
            found = self.etag_of[id(content)] = content, f'"{hashlib.sha1(content).hexdigest()}"'
        return found[1]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Proxy:
    """Forwards connections to a port; each takes the next of `faults`, or none.

    ('drop', n): reset after n bytes came back; ('truncate', n): closed in good order there; ('stall', n): silent from
    there on; ('refuse', 0): reset at once.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.faults: deque[tuple[str, int]] = deque()
        self.connections = 0
        self.passed: list[int] = []
        """Bytes that each connection gave back."""
        self.closing = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self.closing.is_set():
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            self.passed.append(0)
            fault = self.faults.popleft() if self.faults else ("", 0)
            threading.Thread(target=self._serve, args=(client, fault, len(self.passed) - 1), daemon=True).start()

    def _serve(self, client: socket.socket, fault: tuple[str, int], number: int) -> None:
        kind, limit = fault
        if kind == "refuse":
            _reset(client)
            return
        server = socket.create_connection(("127.0.0.1", self.target))
        threading.Thread(target=_pump, args=(client, server), daemon=True).start()
        try:
            while block := server.recv(1 << 14):
                if kind and self.passed[number] + len(block) > limit:
                    block = block[: limit - self.passed[number]]
                client.sendall(block)
                self.passed[number] += len(block)
                if kind and self.passed[number] >= limit:
                    break
            else:
                kind = "truncate"
            time.sleep(0.05 if kind == "drop" else 0)  # a reset takes back what the other side has not read yet
            while kind == "stall" and not self.closing.is_set():
                time.sleep(0.02)
        except OSError:
            kind = "drop"
        if kind == "truncate":
            client.shutdown(socket.SHUT_WR)
            client.close()
        else:
            _reset(client)
        server.close()

    def close(self) -> None:
        self.closing.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self.listener.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while block := source.recv(1 << 14):
            target.sendall(block)
    except OSError:
        return


def _reset(client: socket.socket) -> None:
    """Close so that the other side sees a broken connection, not an end."""
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RD)  # wakes the thread that reads from it, without which nothing is closed
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
