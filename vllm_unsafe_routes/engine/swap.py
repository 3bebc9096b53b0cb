"""Replacing the policy of a running engine: between two steps, everywhere, or not at all.

`replace_policy` and `route_status` become methods of vLLM's `EngineCore`, which clients reach as utility calls; these run in the
engine core's own thread, between steps. The order of a swap, and why nothing mixes:

1. The new policy is checked. A bad one ends here; nothing has happened.
2. The scheduler pauses as vLLM pauses it for new weights: steps that are on their way end under the old policy, nothing new starts.
   Workers are asked whether their kernels can keep the new one.
3. All running requests are preempted and the prefix cache is emptied: no KV computed under the old policy is left.
4. Plans are compiled and KV blocks are keyed again under the new policy. A request whose plan it does not permit ends with
   finish reason "abort" and the reason in `stop_reason`.
5. Every worker writes the new policy's rows.
6. The scheduler goes on. Requests compute their prompt and what they have generated again, under the new policy.

A failure in 2 or 3 leaves the old policy in force. One in 4 or 5 would leave parts of the engine under different policies: the
engine ends itself, still paused. With several engine cores so does one in 2 or 3, because other cores may be further; the first
core is asked for a claim before, so that all cores take the same policy (`data_parallel.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequestType, FinishReason
from vllm.v1.request import RequestStatus

from ..errors import RouteError
from ..policy import ActivePolicy, RoutePolicy
from ..receipt import RECEIPT_KEY
from .frontend import plan_guard
from .log import logger_of

logger = logger_of(__name__)

REPLACE_METHOD = "unsafe_routes_replace_policy"
STATUS_METHOD = "unsafe_routes_status"
WORKER_REPLACE_METHOD = "unsafe_routes_use_policy"
WORKER_CHECK_METHOD = "unsafe_routes_check_policy"
WORKER_COUNTS_METHOD = "unsafe_routes_counts"
# Kinds of failure that a caller may want to tell apart.
BAD_POLICY, CONFLICT = "bad_policy", "conflict"
# Two calls of a swap in several engine cores: only check and keep others out, in the first core; then go on, in all.
CLAIM, CLAIMED = "claim", "claimed"
_OFF = "route control is off in this engine; start it with a policy or with overrides enabled"


class SwapError(RouteError):
    """The policy was not replaced; the old one is in force.

    Args:
        message: for the user.
        kind: `BAD_POLICY` or `CONFLICT`.

    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message, "policy")
        self.kind = kind


def replace_policy(core: Any, admission: Any, document: Mapping[str, Any], claim: str | None = None) -> Any:
    """Replace the policy of an engine core; in its thread, between steps.

    Args:
        core: vLLM's `EngineCore`.
        admission: its `RouteAdmission`, or None.
        document: `ActivePolicy.to_dict`; a null mode keeps the present one.
        claim: `CLAIM`, `CLAIMED`, or None for an engine with one core.

    Returns:
        A dict, empty for a claim, or a future of one where steps are on their way: `policy`, `mode`, `previous`, `num_restarted`,
        `aborted` (request ids); or `error` and `kind`.

    """
    if admission is None:
        return {"error": _OFF, "kind": CONFLICT}
    if admission.is_swapping and claim != CLAIMED:
        return {"error": "another policy is just being put in force; try again", "kind": CONFLICT}
    try:
        active = ActivePolicy.from_dict({**document, "mode": document["mode"] or admission.active.mode})
        if active.policy is None:
            raise RouteError("an engine's policy can be replaced, not removed")
        compiler = admission.config.compiler(admission.shape, active)
    except RouteError as error:
        return {"error": str(error), "kind": BAD_POLICY}
    admission.is_swapping = True
    if claim == CLAIM:
        return {}
    finish = functools.partial(_finish, core, admission, active, compiler, core.scheduler.pause_state)
    try:
        paused = core.pause_scheduler("keep", False)
    except Exception as error:
        paused = Future()
        paused.set_exception(error)
    if paused is None or paused.done():
        return finish(paused)
    done: Future[dict[str, Any]] = Future()

    def finish_later(paused: Any) -> None:
        try:
            done.set_result(finish(paused))
        except Exception as error:
            done.set_exception(error)

    paused.add_done_callback(finish_later)
    return done


def _finish(core: Any, admission: Any, active: ActivePolicy, compiler: Any, before: Any, paused: Any) -> dict[str, Any]:
    """Steps 3 to 6 of a swap, once the scheduler is paused; `before` is its pause state to go back to."""
    try:
        try:
            if paused is not None:
                paused.result()
            for reason in core.model_executor.collective_rpc(WORKER_CHECK_METHOD, args=(active.to_dict(),)):
                if reason is not None:
                    _go_on(core, before)
                    return {"error": reason, "kind": BAD_POLICY}
            num_running = len(core.scheduler.running)
            core.reset_prefix_cache(reset_running_requests=True)
        except Exception as error:
            if _is_one_of_several(core):
                _end(core, "The route policy may be replaced in other engine cores")
                raise
            logger.warning("The route policy was not replaced, the old one is in force: %s", error)
            core.scheduler.set_pause_state(before)
            return {"error": f"requests could not be paused: {error}", "kind": CONFLICT}
        try:
            said = _commit(core, admission, active, compiler)
        except Exception:
            _end(core, "The route policy was replaced in parts of the engine only")
            raise
        _go_on(core, before)
        return {**said, "num_restarted": num_running - len(said["aborted"])}
    finally:
        admission.is_swapping = False


def _go_on(core: Any, before: PauseState) -> None:
    if _is_one_of_several(core) and before is PauseState.UNPAUSED:
        core.resume_scheduler()  # waits for the other cores
    else:
        core.scheduler.set_pause_state(before)


def _is_one_of_several(core: Any) -> bool:
    return bool(core.vllm_config.parallel_config.data_parallel_size > 1)


def _end(core: Any, why: str) -> None:
    logger.exception("%s: the engine ends", why)
    if hasattr(core, "input_queue"):
        core.input_queue.put_nowait((EngineCoreRequestType.EXECUTOR_FAILED, b""))


def _commit(core: Any, admission: Any, active: ActivePolicy, compiler: Any) -> dict[str, Any]:
    scheduler = core.scheduler
    previous = admission.active.digest
    requests = [request for request in scheduler.requests.values() if not request.is_finished()]
    refused = admission.replace(active, compiler, requests)
    aborted = [request.request_id for request, _ in refused]
    core.model_executor.collective_rpc(WORKER_REPLACE_METHOD, args=(active.to_dict(), list(admission.ledger)))
    scheduler.finish_requests(aborted, RequestStatus.FINISHED_ABORTED)
    for request, error in refused:
        admission.refuse(request, error)
    for request in admission.release():
        type(scheduler).add_request.__wrapped__(scheduler, request)
    logger.info("Route policy %s (%s) in force instead of %s", active.digest, active.mode, previous)
    return {"policy": active.digest, "mode": active.mode, "previous": previous, "aborted": aborted}


def route_status(core: Any, admission: Any) -> dict[str, Any]:
    """The active policy, what was counted and what the route table holds; never waits for a step on the device.

    Args:
        core: vLLM's `EngineCore`.
        admission: its `RouteAdmission`, or None.

    """
    if admission is None:
        return {"error": _OFF, "kind": CONFLICT}
    # Counts come with the steps' outputs, at most twice a second. The last ones of a burst are asked for once nobody waits; and
    # of several pipeline ranks only the last one's come with outputs.
    is_idle = not core.scheduler.has_unfinished_requests()
    has_ranks = core.vllm_config.parallel_config.pipeline_parallel_size > 1
    if admission.counts_are_stale and (is_idle or has_ranks):
        admission.absorb_counts(*core.model_executor.collective_rpc(WORKER_COUNTS_METHOD))
        admission.counts_are_stale = False
    return {
        "active": admission.active.to_dict(),
        "policy": admission.active.digest,
        "generation": admission.generation,
        "table": admission.table_use(),
        "held_requests": admission.num_held,
        "refused": admission.num_refused,
        "scored_prompts": 0 if admission.receipts.scores is None else admission.receipts.scores.num_scored,
        "flagged_prompts": 0 if admission.receipts.scores is None else admission.receipts.scores.num_flagged,
        "counts": None if admission.counts is None else admission.counts.to_dict(),
    }


def deliver_refusal(core: Any, active: ActivePolicy, request: Any, message: str) -> None:
    """End a request that the scheduler does not hold: its client gets finish reason "abort" and the message."""
    output = EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=FinishReason.ABORT,
        stop_reason=message,
        kv_transfer_params={RECEIPT_KEY: {"error": message, "policy": active.digest, "policy_mode": active.mode}},
    )
    outputs = EngineCoreOutputs(outputs=[output], finished_requests={request.request_id})
    # In one process the caller of `swap_policy` hears of it in the result.
    if hasattr(core, "output_queue"):
        core.output_queue.put_nowait((request.client_index, outputs))


def checked(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `replace_policy` or `route_status` said. Raises `SwapError` if that is an error."""
    if "error" in said:
        raise SwapError(said["error"], said["kind"])
    return said


def swap_policy(llm: Any, policy: RoutePolicy, mode: str | None = None) -> Mapping[str, Any]:
    """Replace the policy of an offline `vllm.LLM` (or `LLMEngine`) that has nothing to do.

    Args:
        llm: the engine; made with a policy or with overrides enabled.
        policy: the new policy.
        mode: "enforce" or "observe"; None: as before.

    Raises:
        SwapError: the policy does not fit, or requests are unfinished; the old policy is in force.

    """
    engine = getattr(llm, "llm_engine", llm)
    if engine.vllm_config.parallel_config.data_parallel_size > 1:
        raise SwapError("offline, each data-parallel rank is an engine of its own, and all would have to swap at once", CONFLICT)
    if engine.has_unfinished_requests():
        raise SwapError(f"{engine.get_num_unfinished_requests()} requests are unfinished; finish or abort them first", CONFLICT)
    document = {"policy": policy.to_dict(), "mode": mode}
    client = engine.engine_core
    if hasattr(client, "call_utility"):
        said = client.call_utility(REPLACE_METHOD, document)
    else:
        said = getattr(client.engine_core, REPLACE_METHOD)(document)
    said = checked(said)
    plan_guard(engine.input_processor).use(ActivePolicy(policy, said["mode"]))
    return said
