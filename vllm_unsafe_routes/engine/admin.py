"""The admin endpoint of a server: which policy is in force, putting another one in force, and how often experts are picked.

An endpoint plugin of vLLM (group `vllm.endpoint_plugins`), which is loaded only if `VLLM_PLUGINS` names it. vLLM's own `--api-key`
does not cover its paths; they have a token of its own, because who may complete a prompt need not be who may change the policy.

    GET /unsafe-routes/policy             the active policy's digest, mode and content
    PUT /unsafe-routes/policy[?mode=...]  body: a policy document; answers once every worker runs it
    GET /unsafe-routes/usage              how often each expert was picked since the last reset, in all and by label
    DELETE /unsafe-routes/usage           the same, and count from 0 again
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from argparse import Namespace
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from ..errors import RouteError
from ..policy import POLICY_MODES, RoutePolicy
from .config import route_config
from .data_parallel import replace_everywhere, status_of_all, usage_of_all
from .log import logger_of
from .plugin import OFF_SWITCH, is_registered, monitor_of
from .swap import BAD_POLICY, SwapError
from .usage import READ, RESET, usage_document

logger = logger_of(__name__)

TOKEN_ENV = "VLLM_UNSAFE_ROUTES_ADMIN_TOKEN"
PATH = "/unsafe-routes/policy"
USAGE_PATH = "/unsafe-routes/usage"
MAX_BODY_BYTES = 8 << 20
_STATE = "unsafe_routes_admin"


class PolicyEndpoint:
    """What vLLM's endpoint plugin group loads."""

    name = "unsafe_routes_admin"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        router = APIRouter()
        router.add_api_route(PATH, show_policy, methods=["GET"], include_in_schema=False)
        router.add_api_route(PATH, put_policy, methods=["PUT"], include_in_schema=False)
        router.add_api_route(USAGE_PATH, show_usage, methods=["GET", "DELETE"], include_in_schema=False)
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Take hold of the engine client.

        Raises:
            RuntimeError: `VLLM_PLUGINS` leaves out the plugin that controls routes; a policy would not be in force.

        """
        if not is_registered() and os.environ.get(OFF_SWITCH, "0") in ("", "0"):
            raise RuntimeError(f"VLLM_PLUGINS names {self.name} but not unsafe_routes, which controls the routes; name both")
        if not os.environ.get(TOKEN_ENV):
            logger.warning("%s is not set: %s and %s refuse everything", TOKEN_ENV, PATH, USAGE_PATH)
        setattr(state, _STATE, _Admin(engine_client))


class _Admin:
    """The endpoint's state in one API server."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.lock = asyncio.Lock()
        self.is_enabled = is_registered() and route_config(client.vllm_config) is not None


def _refusal(request: Request) -> JSONResponse | None:
    """Why a request may not be served; None if it may."""
    token = os.environ.get(TOKEN_ENV, "")
    if not token:
        return _error(HTTPStatus.FORBIDDEN, f"{TOKEN_ENV} is not set in the server's environment: all is refused")
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    # Digests have one length, so the comparison tells nothing about the token's.
    is_equal = secrets.compare_digest(hashlib.sha256(given.strip().encode()).digest(), hashlib.sha256(token.encode()).digest())
    if scheme.lower() != "bearer" or not is_equal:
        answer = _error(HTTPStatus.UNAUTHORIZED, f"send 'Authorization: Bearer' with the server's {TOKEN_ENV}")
        answer.headers["WWW-Authenticate"] = "Bearer"
        return answer
    admin = getattr(request.app.state, _STATE)
    if not admin.is_enabled:
        return _error(
            HTTPStatus.CONFLICT,
            "route control is off in this server; start it with --route-policy PATH or --enable-route-overrides",
        )
    return None


def _error(status: HTTPStatus, message: str) -> JSONResponse:
    body = {"error": {"message": message, "type": status.phrase, "param": None, "code": status.value}}
    return JSONResponse(body, status_code=status.value)


async def show_policy(request: Request) -> JSONResponse:
    """Answer GET."""
    refusal = _refusal(request)
    if refusal is not None:
        return refusal
    admin = getattr(request.app.state, _STATE)
    status = await status_of_all(admin.client.engine_core)
    return JSONResponse(
        {
            "digest": status["policy"],
            "mode": status["active"]["mode"] if status["policy"] else None,
            "policy": status["active"]["policy"],
            "swaps": status["generation"],
        }
    )


async def put_policy(request: Request) -> JSONResponse:
    """Answer PUT: 200 once the new policy is in force everywhere; else the old one is, and the answer says why."""
    refusal = _refusal(request)
    if refusal is not None:
        return refusal
    mode = request.query_params.get("mode")
    if mode is not None and mode not in POLICY_MODES:
        return _error(HTTPStatus.BAD_REQUEST, f"mode {mode!r} is not one of {', '.join(POLICY_MODES)}")
    try:
        policy = RoutePolicy.from_json(await _body(request))
    except (RouteError, UnicodeDecodeError) as error:
        return _error(HTTPStatus.BAD_REQUEST, f"{error}; the old policy is in force")
    admin = getattr(request.app.state, _STATE)
    async with admin.lock:
        # A client that goes away meanwhile must not leave this server checking plans under the old policy.
        swap = asyncio.ensure_future(_swap(admin.client, policy, mode))
        try:
            said = await asyncio.shield(swap)
        except SwapError as error:
            status = HTTPStatus.BAD_REQUEST if error.kind == BAD_POLICY else HTTPStatus.CONFLICT
            return _error(status, f"{error}; the old policy is in force")
    return JSONResponse(
        {
            "digest": said["policy"],
            "mode": said["mode"],
            "previous_digest": said["previous"],
            "requests_restarted": said["num_restarted"],
            "requests_aborted": len(said["aborted"]),
        }
    )


async def show_usage(request: Request) -> JSONResponse:
    """Answer GET and DELETE."""
    refusal = _refusal(request)
    if refusal is not None:
        return refusal
    client = getattr(request.app.state, _STATE).client
    try:
        said = await usage_of_all(client.engine_core, RESET if request.method == "DELETE" else READ)
        return JSONResponse(usage_document(said))
    except SwapError as error:
        return _error(HTTPStatus.CONFLICT, str(error))


async def _swap(client: Any, policy: RoutePolicy, mode: str | None) -> Any:
    document = {"policy": policy.to_dict(), "mode": mode}
    said = await replace_everywhere(client.engine_core, document)
    await monitor_of(client).refresh()
    return said


async def _body(request: Request) -> str:
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise RouteError(f"the policy is larger than {MAX_BODY_BYTES} bytes")
            parts.append(part)
    except ClientDisconnect:
        raise RouteError("the request's body was cut off") from None
    return b"".join(parts).decode("utf-8")
