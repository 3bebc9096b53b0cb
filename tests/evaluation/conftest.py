"""A real HTTP server that plays a judge model: what it does is chosen by a word in the message it gets."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class JudgeServer(ThreadingHTTPServer):
    """Counts the requests by word; keeps their bodies and headers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.counts: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers_seen: list[Message] = []
        self.times: list[float] = []
        self.in_flight = self.most_in_flight = 0
        self.mutex = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        raw = self.path == "/v1/completions"
        word = (body["prompt"] if raw else body["messages"][-1]["content"]).split()[-1]
        with server.mutex:
            server.bodies.append(body)
            server.headers_seen.append(self.headers)
            server.times.append(time.monotonic())
            server.counts[word] += 1
            count = server.counts[word]
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            self._answer(word, count)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.mutex:
                server.in_flight -= 1

    def _answer(self, word: str, count: int) -> None:
        if self.path == "/v1/completions":
            self._send(
                200, json.dumps({"object": "text_completion", "choices": [{"text": word, "finish_reason": "stop"}]}).encode()
            )
        elif self.path != "/v1/chat/completions":
            self._send(404, b"{}")
        elif word == "slow":
            time.sleep(30)
            self._say("no")
        elif word == "slow-once":
            time.sleep(30 if count == 1 else 0)
            self._say("yes")
        elif word == "drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(300):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        elif word == "broken":
            self._send(500, b"oops")
        elif word == "broken-twice":
            self._send(503, b"oops") if count < 3 else self._say("yes")
        elif word == "busy-once":
            self._send(429, b"{}", {"Retry-After": "0.4"}) if count == 1 else self._say("no")
        elif word == "busy":
            self._send(429, b"{}", {"Retry-After": "30"})
        elif word == "forbidden":
            self._send(401, b"{}")
        elif word == "hang-up":
            self.close_connection = True
            self.connection.close()
        elif word == "not-json":
            self._send(200, b"<html>")
        elif word == "other-json":
            self._send(200, b'{"choices": []}')
        elif word == "silent":
            self._say(None)
        elif word == "filtered":
            self._say("no", "content_filter")
        elif word == "endless":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            while True:
                self.wfile.write(bytes(1 << 20))
        elif word == "cut-off":
            self._say("<think>let me plim and", "length")
        elif word == "nonsense":
            self._say("florble plim")
        elif word == "pause":
            time.sleep(0.2)
            self._say("no")
        else:
            self._say(word)

    def _say(self, text: str | None, reason: str = "stop") -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        self._send(200, json.dumps({"object": "chat.completion", "choices": [choice]}).encode())

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    """A judge model's server on a free port."""
    running = JudgeServer()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield running
    finally:
        running.shutdown()
        thread.join()
        running.server_close()
