"""Two policies for the tiny OLMoE, and the endpoint that puts one in the other's place."""

from __future__ import annotations

import json
import time

import httpx

from vllm_unsafe_routes import RoutePolicy

TOKEN = "zorblax"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
PATH = "/unsafe-routes/policy"
USAGE_PATH = "/unsafe-routes/usage"
NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 16, 4
# Each policy leaves what the other bans, so that a token routed under the wrong one can hardly hide.
BANNED = {
    "a": {0: [0, 1, 2, 3, 4, 5, 6, 7], 1: [8, 9, 10, 11, 12, 13, 14, 15], 2: [0, 2, 4, 6, 8, 10, 12, 14]},
    "b": {0: [8, 9, 10, 11, 12, 13, 14, 15], 1: [0, 1, 2, 3, 4, 5, 6, 7], 2: [1, 3, 5, 7, 9, 11, 13, 15]},
}
POLICY = {
    name: {"version": "route-policy/1", "layers": {str(layer): {"disabled": experts} for layer, experts in banned.items()}}
    for name, banned in BANNED.items()
}
NAME_OF = {RoutePolicy.from_json(document).digest: name for name, document in POLICY.items()}


def put(started, document, mode=None, headers=ADMIN):
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    parameters = {"mode": mode} if mode else {}
    return httpx.put(started.url + PATH, content=body, params=parameters, headers=headers, timeout=120)


def eventually(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
