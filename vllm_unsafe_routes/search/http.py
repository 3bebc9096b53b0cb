"""Search on a list of servers: how a campaign grows past one machine.

Each server is vLLM's OpenAI-compatible one, started with `--enable-route-overrides`. Replicas serve the same model; a request
goes to the one with the fewest in flight, and to another if its server dies.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cells import Cells
from ..errors import RouteError
from ..files import read_object
from ..policy import RoutePolicy
from ..receipt import receipt_of
from ..shape import ModelShape
from .backend import About, Request, Response, own_versions

# How long a server that could not be reached is asked only when the others have failed too.
_DOWN_SECONDS = 10.0


class HttpBackend:
    """Servers as a search backend.

    Args:
        urls: base URLs, such as `http://host:8000`; each must serve the same model with the same policy.
        model: folder with the model's config.json.
        policy: the policy that the servers enforce, so that candidates keep to it; None if they have none. A receipt that names
            another policy ends the search with an error.
        per_server: requests in flight at one server.
        timeout: seconds for one request.
        attempts: servers that a request is tried on before it fails.

    Raises:
        RouteError: no server, an unreadable config, a server that cannot be reached.

    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str | Path,
        policy: RoutePolicy | None = None,
        per_server: int = 128,
        timeout: float = 600.0,
        attempts: int = 4,
    ) -> None:
        if not urls:
            raise RouteError("a backend of servers needs at least one URL")
        self.shape = ModelShape.from_hf_config(read_object(Path(model) / "config.json", "model config"))
        self.policy = policy
        self._urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self._timeout, self._attempts = timeout, attempts
        self.capacity = per_server * len(self._urls)
        self._results: queue.Queue[tuple[int, Response | RouteError]] = queue.Queue()
        self._in_flight: set[int] = set()
        self._load = dict.fromkeys(self._urls, 0)
        # A server that could not be reached has nothing in flight and would else be everybody's first choice.
        self._down_until = dict.fromkeys(self._urls, 0.0)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="unsafe-routes-http", daemon=True)
        self._thread.start()
        self._client: Any = None
        models = [self._run(self._describe(url)) for url in self._urls]
        if any(described != models[0] for described in models):
            raise RouteError(f"the servers do not serve the same model: {dict(zip(self._urls, models, strict=True))}")
        self._model_name, self.max_model_len = models[0]

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _open(self) -> Any:
        if self._client is None:
            import httpx

            limits = httpx.Limits(max_connections=self.capacity, max_keepalive_connections=self.capacity)
            self._client = httpx.AsyncClient(timeout=self._timeout, limits=limits)
        return self._client

    async def _describe(self, url: str) -> tuple[str, int]:
        import httpx

        client = await self._open()
        try:
            answer = await client.get(f"{url}/v1/models", timeout=10.0)
            answer.raise_for_status()
            entry = answer.json()["data"][0]
            return str(entry["id"]), int(entry["max_model_len"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise RouteError(f"server {url} cannot be used: {type(error).__name__}: {error}") from None

    def submit(self, number: int, request: Request) -> None:
        """Start a request."""
        self._in_flight.add(number)
        asyncio.run_coroutine_threadsafe(self._send(number, request), self._loop)

    def score_cells(self, items: Sequence[Cells]) -> None:
        """Not over HTTP: candidates go as requests."""
        return

    def poll(self) -> list[tuple[int, Response | RouteError]]:
        """Wait for a request to finish."""
        if not self._in_flight:
            return []
        done = [self._results.get()]
        while True:
            try:
                done.append(self._results.get_nowait())
            except queue.Empty:
                break
        self._in_flight.difference_update(number for number, _ in done)
        return done

    def about(self) -> About:
        """The servers, and vLLM's version as the first of them says it; which device they have they do not say."""
        plural = "" if len(self._urls) == 1 else "s"
        return About(f"{len(self._urls)} server{plural}", own_versions() | self._run(self._version(self._urls[0])))

    async def _version(self, url: str) -> dict[str, str]:
        import httpx

        try:
            answer = await (await self._open()).get(f"{url}/version", timeout=10.0)
            return {"vllm": str(answer.raise_for_status().json()["version"])}
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return {}

    async def _send(self, number: int, request: Request) -> None:
        try:
            result: Response | RouteError = await self._try(request)
        except RouteError as error:
            result = error
        except Exception as error:
            result = RouteError(f"the request failed: {type(error).__name__}: {error}")
        self._results.put((number, result))

    async def _try(self, request: Request) -> Response:
        import httpx

        client = await self._open()
        body = {
            "model": self._model_name,
            "prompt": list(request.token_ids),
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "return_token_ids": True,
            "stop_token_ids": list(request.stop_token_ids),
            "vllm_xargs": request.extras.to_extra_args() or None,
        }
        tried: set[str] = set()
        problem = ""
        for attempt in range(self._attempts):
            now = time.monotonic()
            url = min(self._urls, key=lambda name: (name in tried, now < self._down_until[name], self._load[name]))
            tried.add(url)
            self._load[url] += 1
            try:
                answer = await client.post(f"{url}/v1/completions", json=body)
                if answer.status_code == 200:
                    return self._read(answer.json(), len(request.token_ids))
                problem = f"{url}: HTTP {answer.status_code}: {answer.text[:300]}"
                if answer.status_code < 500 and answer.status_code not in (408, 429):
                    raise RouteError(problem)
            except httpx.HTTPError as error:
                problem = f"{url}: {type(error).__name__}: {error}"
                self._down_until[url] = time.monotonic() + _DOWN_SECONDS
            finally:
                self._load[url] -= 1
            await asyncio.sleep(0.2 * 2**attempt)
        raise RouteError(f"the request failed on {self._attempts} tries, last: {problem}")

    def _read(self, document: dict[str, Any], num_tokens: int) -> Response:
        choice = document["choices"][0]
        details = (document.get("usage") or {}).get("prompt_tokens_details") or {}
        computed = num_tokens - int(details.get("cached_tokens") or 0)
        token_ids = tuple(choice.get("token_ids") or ())
        if not document.get("kv_transfer_params"):
            return Response(token_ids, computed)
        receipt = receipt_of(document)
        expected = self.policy.digest if self.policy is not None else None
        if receipt.policy != expected:
            raise RouteError(f"the server enforces policy {receipt.policy}, the search was told {expected}")
        return Response(
            token_ids,
            num_tokens - receipt.cached_tokens,
            receipt.scores,
            receipt.route_ids,
            receipt.route_weights,
            receipt.routes_set,
        )

    def close(self) -> None:
        """End the connections."""
        if self._client is not None:
            self._run(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
