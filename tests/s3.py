"""An S3 server for tests, and a proxy before it that does what networks and busy servers do."""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_SERVER = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
_DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
_HOP = ("connection", "transfer-encoding", "keep-alive", "date", "server")


@contextlib.contextmanager
def server() -> Iterator[int]:
    """Moto's S3 in a process of its own; the port at which it answers. It ends with the test's process."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.communicate(timeout=20)


def make_bucket(port: int, name: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    connection.close()


@dataclass
class Fault:
    """What happens to the next requests of a method whose path holds a text."""

    kind: str  # busy, denied, silent, cut_request, cut_answer
    method: str
    path: str = ""
    times: int = 1
    seconds: float = 0.0  # of silence


@dataclass
class Proxy:
    """Forwards to the server, with faults; ``requests`` lists what came."""

    upstream: int
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, start: str, end: str = "") -> int:
        """Requests whose line starts and ends so."""
        return sum(line.startswith(start) and line.endswith(end) for line in self.requests)

    def take(self, method: str, path: str) -> Fault | None:
        """Note a request; the fault that is due."""
        with self._lock:
            self.requests.append(f"{method} {path.partition('?')[0]}")
            for fault in self.faults:
                if fault.times and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault
        return None

    @contextlib.contextmanager
    def listening(self) -> Iterator[int]:
        """The port of the proxy."""
        proxy = self

        class Handler(_Handler):
            of = proxy

        listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        listener.daemon_threads = True
        thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield listener.server_port
        finally:
            listener.shutdown()
            listener.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    of: Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _forward(self) -> None:
        fault = self.of.take(self.command, self.path)
        kind = fault.kind if fault else ""
        if kind == "cut_request":
            self.rfile.readline()  # it has come, and its content is on the way
            self.close_connection = True
            return
        body = self._body()
        if kind in ("busy", "denied"):
            self._answer(*((503, _SLOW_DOWN) if kind == "busy" else (403, _DENIED)), {})
            return
        if fault is not None and kind == "silent":
            time.sleep(fault.seconds)
        connection = http.client.HTTPConnection("127.0.0.1", self.of.upstream, timeout=60)
        dropped = ("expect", "content-length", "transfer-encoding")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
        self._answer(answer.status, content, kept, cut=kind == "cut_answer")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, content: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward
