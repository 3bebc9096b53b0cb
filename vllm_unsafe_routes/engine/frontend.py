"""The front end: a request's plan is decoded and checked before the request is scheduled.

Runs inside `InputProcessor.process_inputs`, which the offline `LLM`, the async engine and the API server all go through.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from vllm.exceptions import VLLMValidationError

from ..compiled import CompiledPlan
from ..compiler import PlanCompiler
from ..errors import RouteError
from ..extras import (
    KEYS,
    LOGITS_KEY,
    LOGITS_START_KEY,
    ROUTE_KEYS,
    ROUTES_START_KEY,
    SCORE_KEY,
    USAGE_LABEL_KEY,
    LogitsSpec,
    RouteExtras,
    ScoreSpec,
)
from ..plan import RoutePlan
from ..policy import ActivePolicy
from ..shape import ModelShape
from ..wire import PLAN_KEY, RETURN_ROUTES_KEY
from .answers import current_answer
from .config import RouteConfig, model_shape, route_config

_GUARD = "unsafe_routes_guard"

_ENABLE_HELP = (
    "start the server with --enable-route-overrides, "
    "or the engine with additional_config={'unsafe_routes': {'allow_overrides': True}}"
)


class RouteRequestError(VLLMValidationError, RouteError):
    """A request's plan is refused; vLLM's server answers 400 with the message."""


class PlanGuard:
    """Checks the plans of one engine's requests.

    Args:
        vllm_config: the engine's config.

    """

    def __init__(self, vllm_config: Any) -> None:
        self.config: RouteConfig | None = route_config(vllm_config)
        self.compiler: PlanCompiler | None = None
        self.active = ActivePolicy()
        self.vocab_size: int = vllm_config.model_config.get_vocab_size()
        self.max_model_len = int(vllm_config.model_config.max_model_len)
        # For `metrics.py`: requests with a plan that were accepted, and refusals by `RouteError.reason`.
        self.num_accepted = 0
        self.refused: Counter[str] = Counter()
        if self.config is not None:
            self.shape = model_shape(vllm_config)
            self.use(self.config.active_policy())

    def use(self, active: ActivePolicy) -> None:
        """Check later plans under this policy; the engine core checks again those that it gets just after a swap."""
        assert self.config is not None
        self.compiler = self.config.compiler(self.shape, active)
        self.active = active

    def check(self, request: Any) -> None:
        """Check the plan of an `EngineCoreRequest` and bring its `extra_args` into the form that the engine reads.

        Raises:
            RouteRequestError: the plan cannot be honoured.

        """
        params = request.sampling_params
        try:
            take_xargs(params)
            check_usage_label(params, self.config)
            extras = RouteExtras.parse(params.extra_args if params is not None else None)
            if extras is not None:
                self._check(request, params, extras)
                self.num_accepted += extras.has_plan
        except RouteError as error:
            self.refused[error.reason] += 1
            parameter, answer = _parameter(str(error), params), current_answer()
            refused = RouteRequestError(str(error), parameter=parameter)
            if answer is not None:
                answer.refuse(str(refused), parameter)
            raise refused from None

    def _check(self, request: Any, params: Any, extras: RouteExtras) -> None:
        if self.config is None or self.compiler is None or not self.config.allow_overrides:
            raise RouteError(f"route overrides are not enabled in this engine; {_ENABLE_HELP}", "disabled")
        if request.resumable:
            raise RouteError("a streaming-input session cannot have a route plan: its prompt length is not known")
        if extras.wants_routes and self.config.seam == "logits":
            raise RouteError(f"{RETURN_ROUTES_KEY} cannot be honoured with seam 'logits', where kernels do not say what they pick")
        if extras.wants_routes or extras.logits is not None:
            # They are only known of tokens that this request computes itself.
            params.skip_reading_prefix_cache = True
        num_prompt = len(request.prompt_token_ids) if request.prompt_token_ids is not None else len(request.prompt_embeds)
        if extras.routes_start > num_prompt:
            message = f"{ROUTES_START_KEY} {extras.routes_start} is out of range for a prompt of {num_prompt} tokens"
            raise RouteError(message, "prompt")
        if extras.logits is not None:
            logits = check_logits(extras.logits, self.config, self.shape, num_prompt, params)
            extras = dataclasses.replace(extras, logits=logits)
        if extras.score is not None:
            check_score(extras.score, num_prompt, self.vocab_size)
        if extras.has_plan:
            compiled = self.compiler.compile_text(extras.plan, extras.delta)
            if self.config.seam == "logits" and not compiled.fits_logits:
                raise RouteError("seam 'logits' masks and biases only: no 'native' or explicit weights, promote or demote")
            check_prompt_length(compiled, num_prompt, extras, self.compiler.shape.top_k, self.max_model_len)
            ids = request.prompt_token_ids
            compiled.check_prompt(None if ids is None else ids[: extras.prompt_len(num_prompt)])
        ours = extras.to_extra_args()
        params.extra_args = {**{key: value for key, value in params.extra_args.items() if key not in ROUTE_KEYS}, **ours}


def _parameter(message: str, params: Any) -> str:
    """Which of a request's parameters a message is about: it begins with it, or speaks of what the first one asks."""
    given = [key for key in KEYS if params is not None and key in (params.extra_args or {})]
    return next((key for key in given if message.startswith(key)), given[0] if given else PLAN_KEY)


def take_xargs(params: Any) -> None:
    """Give a request what the `vllm_xargs` of its HTTP request has for us, where the endpoint left them out.

    Args:
        params: vLLM's `SamplingParams`; None for pooling.

    """
    answer = current_answer()
    if answer is None or (params is not None and any(key in KEYS for key in params.extra_args or ())):
        return
    ours = answer.xargs()
    if not ours:
        return
    if params is None:
        raise RouteError(f"{next(iter(ours))} cannot be honoured by a request that generates nothing")
    params.extra_args = {**(params.extra_args or {}), **ours}


def check_usage_label(params: Any, config: RouteConfig | None) -> None:
    """Refuse a label that nothing is counted under."""
    label = ((params and params.extra_args) or {}).get(USAGE_LABEL_KEY)
    if label is None:
        return
    labels = (config and config.usage) or ()
    if label not in labels:
        known = f"is not one of {', '.join(labels)}" if labels else "needs an engine that counts by label"
        raise RouteError(f"{USAGE_LABEL_KEY} {repr(label)[:80]} {known}; --route-usage-labels names them", "disabled")


def check_score(score: ScoreSpec, num_prompt: int, vocab_size: int) -> None:
    """Refuse a score that lies outside the prompt or the vocabulary."""
    if score.end_row > num_prompt:
        raise RouteError(f"{SCORE_KEY}: row {score.end_row - 1} is out of range for a prompt of {num_prompt} tokens", "prompt")
    largest = int(score.token_ids.max())
    if largest >= vocab_size:
        raise RouteError(f"{SCORE_KEY}: token id {largest} is out of range for a vocabulary of {vocab_size}")


def check_logits(spec: LogitsSpec, config: RouteConfig, shape: ModelShape, num_prompt: int, params: Any) -> LogitsSpec:
    """Refuse layers without experts and what is larger than the engine's limit; returns the spec with all its layers named."""
    limit = config.router_logits_mib
    if limit is None:
        raise RouteError(
            f"{LOGITS_KEY} is not enabled in this engine; start the server with --router-logits-mib, "
            "or the engine with 'router_logits_mib' beside 'allow_overrides'",
            "disabled",
        )
    layers = spec.layers or shape.moe_layers
    for layer in layers:
        if layer not in shape.slot_of_layer:
            raise RouteError(f"{LOGITS_KEY}: layer {layer} has no experts; MoE layers are {shape.describe_layers()}")
    if spec.start > num_prompt:
        raise RouteError(f"{LOGITS_START_KEY} {spec.start} is out of range for a prompt of {num_prompt} tokens", "prompt")
    num_tokens = len(spec.within(0, num_prompt + max(params.max_tokens, 1) - 1))
    size = num_tokens * len(layers) * shape.num_experts * np.dtype(np.float32).itemsize * params.n
    if size > limit << 20:
        raise RouteError(
            f"{LOGITS_KEY}: {num_tokens} tokens x {len(layers)} layers x {shape.num_experts} experts of {params.n} samples are "
            f"{size / (1 << 20):.1f} MiB, more than router_logits_mib {limit}; name fewer layers or positions"
        )
    return dataclasses.replace(spec, layers=tuple(layers))


def check_prompt_length(compiled: CompiledPlan, num_prompt: int, extras: RouteExtras, top_k: int, max_model_len: int) -> None:
    """Refuse a position past the prompt; of a plan that is bound to its prompt, only one past the longest request."""
    if compiled.max_position < num_prompt:
        return
    bound = compiled.prompt is not None
    if bound and compiled.max_position >= max_model_len:
        raise RouteError(f"position {compiled.max_position} is out of range for requests of {max_model_len} tokens", "prompt")
    listed = [
        (max(item.positions), item.layer)
        for item in (RoutePlan.from_string(extras.plan).directives if extras.plan is not None and not bound else ())
        if not isinstance(item.positions, str)
    ]
    if extras.delta:
        width = 2 + top_k
        listed += [(extras.delta[at + 1], extras.delta[at]) for at in range(0, len(extras.delta), width)]
    position, layer = max(listed, default=(-1, -1))
    if position < num_prompt:
        return
    raise RouteError(f"layer {layer}, position {position}: the prompt has {num_prompt} tokens (0-{num_prompt - 1})", "prompt")


def plan_guard(input_processor: Any) -> PlanGuard:
    """The guard of one front end's requests, made with its first one."""
    guard: PlanGuard | None = input_processor.__dict__.get(_GUARD)
    if guard is None:
        guard = input_processor.__dict__[_GUARD] = PlanGuard(input_processor.vllm_config)
    return guard
