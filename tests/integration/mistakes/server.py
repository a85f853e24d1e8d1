"""A web server that says the same to everybody."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def serve(stack: ExitStack, status: int, body: bytes = b"") -> str:
    """Starts a server for the time of ``stack``; returns ``host:port``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, status, body))
    stack.callback(server.server_close)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    stack.callback(thread.join)
    stack.callback(server.shutdown)
    return f"127.0.0.1:{server.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, status: int, body: bytes, *arguments: Any) -> None:
        self._status, self._body = status, body
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self._body)

    def do_HEAD(self) -> None:
        self.send_response(self._status)
        self.send_header("Content-Length", str(len(self._body)))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""
