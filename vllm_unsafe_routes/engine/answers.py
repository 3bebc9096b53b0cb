"""Receipts and plans over HTTP, whatever the endpoint: a middleware that `flags.py` adds to vLLM's own list (`--middleware`).

vLLM's endpoints carry the receipt of one request at most, and mostly where they do not stream; some drop `vllm_xargs`. Here every
HTTP request has an `HttpAnswer`, which the engine requests made for it find as a context variable. It hands them `vllm_xargs`,
collects their receipts, and puts these into the answer's `kv_transfer_params`: of a stream, into the chunk that ends the choice. A
refused plan is a 400 also where the answer would be streamed; vLLM says 200 before it makes a stream's engine requests.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from ..extras import KEYS
from ..receipt import CARRIER, RECEIPT_KEY, receipts_document
from .attributes import ANSWER

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_XARGS = "vllm_xargs"
# What the chunk that ends a choice has: OpenAI's and vLLM's own forms, Anthropic's, Cohere's.
_LAST_EVENTS = ("message_delta", "message-end")
_LAST_MARKS = (b'"finish_reason":"', b'"message_delta"', b'"message-end"')
_NATIVE_MARK = f'"{RECEIPT_KEY}":'.encode()


class HttpAnswer:
    """What one HTTP request asks of the engine, and the receipts of it."""

    def __init__(self) -> None:
        self._body: list[bytes] = []
        self._num_requests = 0
        # A beam search makes an engine request a token and beam; none of their receipts is one of the answer.
        self.is_beam_search = False
        # What is wrong with a plan, in the form of vLLM's errors.
        self.refusal: bytes | None = None
        # Travelling form of the receipts by choice: sample s of the p-th prompt is p * n + s.
        self.receipts: dict[int, dict[str, Any]] = {}
        self._waiting: dict[int, dict[str, Any]] = {}

    def keeping(self, receive: Receive) -> Receive:
        """`receive`, with the body that passes through it kept."""

        async def receive_and_keep() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self._body.append(message.get("body", b""))
            return message

        return receive_and_keep

    def asks_for_routes(self) -> bool:
        """Whether the request may have something for us."""
        body = b"".join(self._body)
        return any(key.encode() in body for key in KEYS)

    def xargs(self) -> dict[str, Any]:
        """What the request's `vllm_xargs` has for us."""
        body = b"".join(self._body)
        if _XARGS.encode() not in body:
            return {}
        try:
            document = json.loads(body)
        except ValueError:  # a form: its endpoints read `vllm_xargs` themselves
            return {}
        xargs = document.get(_XARGS) if isinstance(document, Mapping) else None
        return {key: xargs[key] for key in KEYS if key in xargs} if isinstance(xargs, Mapping) else {}

    def refuse(self, message: str, parameter: str) -> None:
        """The plan of a request is refused."""
        error = {"message": message, "type": "BadRequestError", "param": parameter, "code": HTTPStatus.BAD_REQUEST.value}
        self.refusal = json.dumps({"error": error}).encode()

    def attach(self, queue: Any) -> None:
        """Collect the receipts of an engine request; `queue` is vLLM's `RequestOutputCollector` of it."""
        if not self.is_beam_search and not hasattr(queue, ANSWER):
            setattr(queue, ANSWER, (self, self._num_requests))
            self._num_requests += 1

    def add(self, request: int, sample: int, num_samples: int, document: dict[str, Any]) -> None:
        """A sample of an engine request has ended."""
        choice = request * num_samples + sample
        self.receipts[choice] = self._waiting[choice] = document

    def complete_chunk(self, body: bytes) -> bytes:
        """A piece of a stream, with the receipts of the choices that end in it."""
        if not self._waiting or not any(mark in body for mark in _LAST_MARKS):
            return body
        return b"\n".join(map(self._complete_line, body.split(b"\n")))

    def _complete_line(self, line: bytes) -> bytes:
        if not line.startswith(b"data: {"):
            return line
        chunk = json.loads(line[len(b"data: ") :])
        choices = chunk.get("choices") or []
        ended = [choice["index"] for choice in choices if choice.get("finish_reason") is not None]
        if chunk.get("type") in _LAST_EVENTS:
            ended = [0]
        documents = [self._waiting.pop(choice) for choice in ended if choice in self._waiting]
        return b"data: " + _with_receipts(chunk, documents) if documents else line

    def complete(self, body: bytes) -> bytes:
        """A whole answer, with the receipts that vLLM's endpoint did not put into it."""
        if not self.receipts or (len(self.receipts) == 1 and _NATIVE_MARK in body):
            return body
        answer = json.loads(body)
        if not isinstance(answer, dict):
            return body
        return _with_receipts(answer, [self.receipts.get(choice) for choice in range(max(self.receipts) + 1)])


def _with_receipts(answer: dict[str, Any], documents: list[Any]) -> bytes:
    document = documents[0] if len(documents) == 1 else receipts_document(documents)
    answer[CARRIER] = {**(answer.get(CARRIER) or {}), RECEIPT_KEY: document}
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()


_answer: ContextVar[HttpAnswer | None] = ContextVar("unsafe_routes_answer", default=None)


def current_answer() -> HttpAnswer | None:
    """The answer that engine requests made now are for; None outside of an HTTP request."""
    return _answer.get()


class RouteAnswers:
    """The middleware.

    Args:
        app: the ASGI application behind it.

    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = HttpAnswer()
        token = _answer.set(answer)
        try:
            await self._app(scope, answer.keeping(receive), _Completing(answer, send))
        finally:
            _answer.reset(token)


class _Completing:
    """`send`, with the receipts put into what passes through it.

    Args:
        answer: has the receipts.
        send: of the server.

    """

    def __init__(self, answer: HttpAnswer, send: Send) -> None:
        self._answer = answer
        self._send = send
        self._held: Message | None = None
        self._parts: list[bytes] = []
        self._is_stream = False
        self._is_refused = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            self._is_stream = kind.startswith(b"text/event-stream")
            is_ours = self._answer.asks_for_routes() if self._is_stream else kind.startswith(b"application/json")
            if message["status"] == HTTPStatus.OK and is_ours:
                # Its length, or whether it is a 200 at all, is known when the body is.
                self._held = message
                return
        elif message["type"] == "http.response.body":
            if self._is_refused:
                return
            if self._held is not None and not self._is_stream:
                # Another middleware may hand the body on in parts.
                self._parts.append(message.get("body", b""))
                if message.get("more_body"):
                    return
                message = {**message, "body": b"".join(self._parts)}
            message = {**message, **await self._start_and_complete(message)}
        await self._send(message)

    async def _start_and_complete(self, message: Message) -> Message:
        """Send the start, if it waits, and give the body that follows."""
        body, start = message.get("body", b""), self._held
        self._held = None
        if start is not None and self._is_stream and self._answer.refusal is not None:
            self._is_refused = True
            body = self._answer.refusal
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await self._send({**start, "status": HTTPStatus.BAD_REQUEST.value, "headers": headers})
            return {"body": body, "more_body": False}
        if self._is_stream:
            body = self._answer.complete_chunk(body)
        elif start is not None:
            body = self._answer.complete(body)
            start["headers"] = _with_length(start.get("headers", ()), len(body))
        if start is not None:
            await self._send(start)
        return {"body": body}


def _with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    return [(name, str(length).encode() if name.lower() == b"content-length" else value) for name, value in headers]
