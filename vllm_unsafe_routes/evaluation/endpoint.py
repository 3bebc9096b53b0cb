"""The `openai` client as judges use it: bounds for every attempt, and one event loop for all of them.

Imported only where an endpoint is used (extra `judge`; vLLM brings both libraries).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import httpx
import openai

_MAX_ANSWER_BYTES = 8 << 20
# A body is handed on unpacked and whole.
_BODY_HEADERS = ("content-encoding", "content-length", "transfer-encoding")


def chat_client(url: str, key: str | None, *, concurrency: int, timeout: float, retries: int) -> openai.AsyncOpenAI:
    """A client that sends `key` or none, and nothing else from the environment.

    Args:
        url: up to and including `/v1`.
        key: bearer token; None: none is sent.
        concurrency: attempts in flight.
        timeout: seconds for an attempt, from start to the last byte.
        retries: further attempts after the first.

    """
    # What the client takes from the environment where nothing else is given.
    unsent = ["OpenAI-Organization", "OpenAI-Project", *([] if key else ["Authorization"])]
    http: Any = _BoundedClient(concurrency, timeout, unsent)
    return openai.AsyncOpenAI(base_url=url, api_key=key or "none", http_client=http, timeout=timeout, max_retries=retries)


class _BoundedClient(httpx.AsyncClient):
    """httpx bounds the time between two bytes only: a server that drips, or sends without end, must not hold a search."""

    def __init__(self, concurrency: int, timeout: float, unsent: Sequence[str]) -> None:
        super().__init__(timeout=timeout, limits=httpx.Limits(max_connections=concurrency))
        self._slots = asyncio.Semaphore(concurrency)
        self._seconds = timeout
        self._unsent = unsent

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """The response with its body; what exceeds the largest answer is cut off, and then is no chat completion any more."""
        for name in self._unsent:
            request.headers.pop(name, None)
        async with self._slots:
            try:
                async with asyncio.timeout(self._seconds):
                    return await self._send(request, {**options, "stream": True})
            except TimeoutError:
                raise httpx.ReadTimeout("the answer did not end in time", request=request) from None

    async def _send(self, request: httpx.Request, options: dict[str, Any]) -> httpx.Response:
        response = await super().send(request, **options)
        content = bytearray()
        try:
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > _MAX_ANSWER_BYTES:
                    break
        finally:
            await response.aclose()
        headers = [(name, value) for name, value in response.headers.multi_items() if name not in _BODY_HEADERS]
        return httpx.Response(response.status_code, headers=headers, content=bytes(content[:_MAX_ANSWER_BYTES]), request=request)


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The loop that all judges share: searches judge answer by answer, each from a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="judges", daemon=True).start()
    return loop
