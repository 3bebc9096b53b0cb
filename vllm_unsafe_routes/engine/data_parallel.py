"""Several engine cores behind one server: each has a scheduler and workers of its own, and all of them run every step together.

A policy is put in force in all cores or the server ends; what they count is added up. A core without requests runs dummy steps
beside the others. Routers see a rank's own tokens, because modular expert kernels gather after routing; what gathers before is
refused (`bind.check_layer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .step import NO_STEP
from .swap import CLAIM, CLAIMED, REPLACE_METHOD, STATUS_METHOD, checked
from .usage import USAGE_METHOD

_ADDED_UP = ("table", "held_requests", "refused", "scored_prompts", "flagged_prompts")


async def replace_everywhere(client: Any, document: Mapping[str, Any]) -> Mapping[str, Any]:
    """`swap.replace_policy` in every engine core.

    Args:
        client: vLLM's asynchronous client of the engine cores.
        document: as for `replace_policy`.

    Raises:
        SwapError: the policy was not replaced anywhere.

    """
    cores, claim = client.core_engines, None
    if len(cores) > 1:
        # Two API servers may ask at once, and must not win in one core each: the first core decides.
        checked(await client._call_utility_async(REPLACE_METHOD, document, CLAIM, engine=cores[0]))
        claim = CLAIMED
    said = [checked(one) for one in await client.call_utility_all_async(REPLACE_METHOD, document, claim)]
    aborted = [req_id for one in said for req_id in one["aborted"]]
    return {**said[0], "num_restarted": sum(one["num_restarted"] for one in said), "aborted": aborted}


async def status_of_all(client: Any) -> dict[str, Any]:
    """`swap.route_status` of all engine cores as if they were one; during a swap, of the policy that is coming."""
    said = [checked(one) for one in await client.call_utility_all_async(STATUS_METHOD)]
    merged = dict(max(said, key=lambda one: int(one["generation"])))
    merged |= {key: added_up([one[key] for one in said]) for key in _ADDED_UP}
    counts = [one["counts"] for one in said if one["counts"] is not None]
    merged["counts"] = added_up(counts) if counts else None
    return merged


async def usage_of_all(client: Any, ask: str) -> Mapping[str, Any]:
    """`usage.core_usage` of all engine cores as if they were one. Raises `SwapError` if usage is not counted."""
    said = [checked(one) for one in await client.call_utility_all_async(USAGE_METHOD, ask)]
    counts = [one["counts"] for one in said]
    return {**said[0], "counts": None if None in counts else added_up(counts)}


def added_up(values: Sequence[Any]) -> Any:
    """Numbers, or lists and objects of numbers of one shape, added up."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: added_up([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [added_up(items) for items in zip(*values, strict=True)]
    return sum(values)


def leave_dummies_out(worker: Any, controller: Any) -> None:
    """A forward pass that this rank runs because others have requests is no step of ours; replaces the worker's method."""
    own = worker.execute_dummy_batch

    def execute_dummy_batch() -> None:
        controller.step = NO_STEP
        controller.watch.stage(NO_STEP)
        own()

    worker.execute_dummy_batch = execute_dummy_batch
