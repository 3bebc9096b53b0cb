"""Entry point of the `vllm.general_plugins` group: wraps the symbols of `symbols.py`.

vLLM calls `register` in the API server, the engine core and every worker, sometimes more than once. The module imports
nothing heavy: vLLM logs and then ignores a plugin that fails to import, which would leave an engine silently unrouted.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from typing import Any

OFF_SWITCH = "VLLM_UNSAFE_ROUTES_DISABLE"
# Tokens of the longer one of two steps that are checked after warm-up; the other is a decode step.
_CHECKED_TOKENS = 64
_MARK = "__unsafe_routes_wrapped__"
# The engine core's input thread and its own may both be the first to ask for the admission.
_admission_lock = threading.Lock()


def register() -> None:
    """Make vLLM route-aware in this process; a second call does nothing."""
    if os.environ.get(OFF_SWITCH, "0") not in ("", "0"):
        from .log import logger_of

        logger_of(__name__).warning("%s is set: no route policy and no override is in force in this process", OFF_SWITCH)
        return
    from . import symbols

    reason = symbols.unsupported_reason()
    if reason is not None:
        # Not asked for anything yet: leave vLLM alone, but never start an engine that wants routes controlled.
        _wrap(symbols.CREATE_CONFIG, lambda own: _refuse_config(own, reason))
        return
    for symbol, wrapper in (
        (symbols.CREATE_CONFIG, _create_engine_config),
        (symbols.ADD_CLI_ARGS, _add_cli_args),
        (symbols.FROM_CLI_ARGS, _from_cli_args),
        (symbols.PROCESS_INPUTS, _process_inputs),
        (symbols.COMPLETION_BEAMS, _to_beam_search_params),
        (symbols.CHAT_BEAMS, _to_beam_search_params),
        (symbols.PREPROCESS_REQUEST, _preprocess_add_request),
        (symbols.BLOCK_KEYS, _generate_block_hash_extra_keys),
        (symbols.ADD_REQUEST, _add_request),
        (symbols.FREE_REQUEST, _free_request),
        (symbols.FINISH_REQUESTS, _finish_requests),
        (symbols.MAKE_STATS, _make_stats),
        (symbols.UPDATE_FROM_OUTPUT, _update_from_output),
        (symbols.EXPECT_OUTPUT, _expect_output),
        (symbols.MAKE_OUTPUT, _make_request_output),
        (symbols.RESET_PREFIX_CACHE, _reset_prefix_cache),
        (symbols.RUN_OUTPUT_HANDLER, _run_output_handler),
        (symbols.LOAD_MODEL, _load_model),
        (symbols.EXECUTE_MODEL, _execute_model),
        (symbols.SAMPLE_TOKENS, _sample_tokens),
        (symbols.V1_FORWARD, _v1_forward),
        (symbols.V2_INPUTS, _v2_prepare_inputs),
    ):
        _wrap(symbol, wrapper)
    added = (_replace_policy, _status, _use_policy, _check_policy, _counts, _usage, _read_usage, _score_cells, _score_worker_cells)
    for symbol, method in zip(symbols.ADDED, added, strict=True):
        symbol.add(method)


def is_registered() -> bool:
    """Whether vLLM is route-aware in this process."""
    from . import symbols

    return hasattr(symbols.PROCESS_INPUTS.resolve()[2], _MARK)


def _wrap(symbol: Any, wrapper: Any) -> None:
    """Replace a function by `wrapper(function)`, once, wherever it was imported by name."""
    owner, name, stored = symbol.resolve()
    kind = type(stored) if isinstance(stored, classmethod | staticmethod) else None
    own = stored.__func__ if kind else stored
    if getattr(own, _MARK, False):
        return
    wrapped = functools.wraps(own)(wrapper(own))
    setattr(wrapped, _MARK, True)
    setattr(owner, name, kind(wrapped) if kind else wrapped)
    if not isinstance(owner, type):
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("vllm.") and module.__dict__.get(name) is own:
                setattr(module, name, wrapped)


def _refuse_config(own: Any, reason: str) -> Any:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from .config import CONFIG_KEY

        if (self.additional_config or {}).get(CONFIG_KEY):
            from ..errors import RouteError

            raise RouteError(reason)
        return own(self, *args, **kwargs)

    return create_engine_config


def _create_engine_config(own: Any) -> Any:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from .config import CONFIG_KEY, RouteConfig, model_shape, refuse_misspelled
        from .supported import check_supported

        additional = self.additional_config if isinstance(self.additional_config, dict) else {}
        refuse_misspelled(additional)
        section = additional.get(CONFIG_KEY)
        if section is None:
            return own(self, *args, **kwargs)
        config = RouteConfig.from_dict(section)
        # The policy's content, not its path, goes to every process and into the compile-cache hash.
        self.additional_config = {**additional, CONFIG_KEY: config.to_dict()}
        vllm_config = own(self, *args, **kwargs)
        if config.enabled:
            config.compiler(model_shape(vllm_config))
            check_supported(vllm_config, config)
        return vllm_config

    return create_engine_config


def _add_cli_args(own: Any) -> Any:
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        from .flags import add_cli_arguments

        parser = own(parser, *args, **kwargs)
        add_cli_arguments(parser)
        return parser

    return add_cli_args


def _from_cli_args(own: Any) -> Any:
    def from_cli_args(cls: Any, args: Any, *more: Any, **kwargs: Any) -> Any:
        from .flags import fold_cli_arguments

        fold_cli_arguments(args)
        return own(cls, args, *more, **kwargs)

    return from_cli_args


def _process_inputs(own: Any) -> Any:
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        from .frontend import plan_guard

        request = own(self, *args, **kwargs)
        plan_guard(self).check(request)
        return request

    return process_inputs


def _to_beam_search_params(own: Any) -> Any:
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        from ..extras import KEYS
        from .answers import current_answer
        from .frontend import RouteRequestError

        ours = [key for key in KEYS if key in (self.vllm_xargs or {})]
        if ours:
            raise RouteRequestError(f"{ours[0]} cannot be honoured with use_beam_search", parameter=ours[0])
        answer = current_answer()
        if answer is not None:
            answer.is_beam_search = True
        return own(self, *args, **kwargs)

    return to_beam_search_params


def _preprocess_add_request(own: Any) -> Any:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        admission = _core_admission(self)
        if admission is None:
            return own(self, request)
        return admission.contexts.build(request, lambda: own(self, request))

    return preprocess_add_request


def _generate_block_hash_extra_keys(own: Any) -> Any:
    from .cache import route_extra_keys

    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, next_mm_idx = own(request, start_token_idx, end_token_idx, start_mm_idx)
        ours = route_extra_keys(request, start_token_idx, end_token_idx)
        return ((*(keys or ()), *ours) if ours else keys), next_mm_idx

    return generate_block_hash_extra_keys


def _admission(scheduler: Any) -> Any:
    """The scheduler's route state; None for an engine without route control."""
    from .attributes import ADMISSION

    if ADMISSION not in scheduler.__dict__:
        from .config import route_config
        from .scheduler import RouteAdmission

        with _admission_lock:
            if ADMISSION not in scheduler.__dict__:
                enabled = route_config(scheduler.vllm_config) is not None
                scheduler.__dict__[ADMISSION] = RouteAdmission(scheduler) if enabled else None
    return scheduler.__dict__[ADMISSION]


def _core_admission(core: Any) -> Any:
    """The same, of an engine core's scheduler; the core's clients hear of requests that a swap refuses."""
    admission = _admission(core.scheduler)
    if admission is not None and not admission.is_connected:
        from .swap import deliver_refusal

        admission.connect(functools.partial(deliver_refusal, weakref.proxy(core)))
    return admission


def _add_request(own: Any) -> Any:
    def add_request(self: Any, request: Any) -> None:
        admission = _admission(self)
        if admission is None or admission.admit(request):
            own(self, request)

    return add_request


def _free_request(own: Any) -> Any:
    def free_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = own(self, request, *args, **kwargs)
        admission = _admission(self)
        if admission is not None:
            add_request = type(self).add_request.__wrapped__
            for held in admission.free(request):
                add_request(self, held)
        return result

    return free_request


def _finish_requests(own: Any) -> Any:
    def finish_requests(self: Any, request_ids: Any, finished_status: Any) -> Any:
        if request_ids is not None and not isinstance(request_ids, str):
            request_ids = list(request_ids)
        admission = _admission(self)
        held = [] if admission is None else admission.abort(request_ids, finished_status)
        return [*own(self, request_ids, finished_status), *held]

    return finish_requests


def _make_stats(own: Any) -> Any:
    def make_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
        stats = own(self, *args, **kwargs)
        admission = _admission(self)
        if stats is not None and admission is not None:
            stats.num_waiting_reqs += admission.num_held
        return stats

    return make_stats


def _update_from_output(own: Any) -> Any:
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any) -> Any:
        admission = _admission(self)
        if admission is None:
            return own(self, scheduler_output, model_runner_output, *args, **kwargs)
        admission.absorb(model_runner_output)
        outputs = own(self, scheduler_output, model_runner_output, *args, **kwargs)
        admission.receipts.attach(outputs, admission.active)
        return outputs

    return update_from_output


def _expect_output(own: Any) -> Any:
    from .answers import current_answer

    def add_request(
        self: Any, request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, queue: Any = None, **kwargs: Any
    ) -> None:
        answer = current_answer()
        if answer is not None and queue is not None:
            answer.attach(queue)
        own(self, request, prompt, parent_req, request_index, queue, **kwargs)

    return add_request


def _make_request_output(own: Any) -> Any:
    from .assembly import with_receipt

    def make_request_output(
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        kv_transfer_params: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        kv_transfer_params = with_receipt(self, kv_transfer_params, finish_reason is not None)
        return own(self, new_token_ids, pooling_output, finish_reason, stop_reason, kv_transfer_params, *args, **kwargs)

    return make_request_output


def _reset_prefix_cache(own: Any) -> Any:
    from .attributes import RESERVE

    def reset_prefix_cache(self: Any, *args: Any, **kwargs: Any) -> bool:
        reserve = self.__dict__.get(RESERVE)
        if reserve is not None:
            reserve.give_back()
        return bool(own(self, *args, **kwargs))

    return reset_prefix_cache


def _run_output_handler(own: Any) -> Any:
    def _run_output_handler(self: Any) -> None:
        own(self)
        monitor_of(self)

    return _run_output_handler


def monitor_of(llm: Any) -> Any:
    """The route monitor of an `AsyncLLM`, which runs in its event loop; None for an engine without route control."""
    from .attributes import MONITOR

    if MONITOR not in llm.__dict__:
        from .config import route_config
        from .metrics import RouteMonitor

        enabled = route_config(llm.vllm_config) is not None
        llm.__dict__[MONITOR] = RouteMonitor(llm) if enabled else None
    return llm.__dict__[MONITOR]


def _replace_policy(self: Any, document: dict[str, Any], claim: str | None = None) -> Any:
    from .swap import replace_policy

    return replace_policy(self, _core_admission(self), document, claim)


def _status(self: Any) -> dict[str, Any]:
    from .swap import route_status

    return route_status(self, _core_admission(self))


def _use_policy(self: Any, document: dict[str, Any], planned: list[str]) -> None:
    from .worker import replace_worker_policy

    replace_worker_policy(self, document, planned)


def _check_policy(self: Any, document: dict[str, Any]) -> Any:
    from .worker import check_worker_policy

    return check_worker_policy(self, document)


def _counts(self: Any) -> Any:
    from .worker import worker_counts

    return worker_counts(self)


def _usage(self: Any, ask: str) -> dict[str, Any]:
    from .usage import core_usage

    return core_usage(self, _core_admission(self), ask)


def _read_usage(self: Any, wait: bool) -> Any:
    from .worker import worker_usage

    return worker_usage(self, wait)


def _score_cells(self: Any, items: list[dict[str, Any]]) -> dict[str, Any]:
    from .cell_blocks import score_cells

    return score_cells(self, _core_admission(self), items)


def _score_worker_cells(self: Any, reserve: bytes, generation: int, items: list[dict[str, Any]]) -> dict[str, Any]:
    from .cell_worker import score_worker_cells

    return score_worker_cells(self, reserve, generation, items)


def _load_model(own: Any) -> Any:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        from .config import route_config

        config = route_config(self.vllm_config)
        if config is not None:
            from .attributes import CONTROLLER
            from .worker import RouteController

            controller = RouteController(self.vllm_config, config, self.model_runner.get_model(), self.device)
            setattr(self.model_runner, CONTROLLER, controller)
            _check_after_warm_up(self, controller)
            if self.vllm_config.parallel_config.data_parallel_size > 1:
                from .data_parallel import leave_dummies_out

                leave_dummies_out(self, controller)

    return load_model


def _check_after_warm_up(worker: Any, controller: Any) -> None:
    """Replace the worker's warm-up by one that ends with a check; on the instance, because the CPU worker has its own."""
    from .worker import end_warm_up

    own = worker.compile_or_warm_up_model

    def compile_or_warm_up_model() -> Any:
        times = own()
        num_tokens = min(_CHECKED_TOKENS, worker.scheduler_config.max_num_batched_tokens)
        end_warm_up(controller, worker.execute_dummy_batch, lambda: worker.model_runner._dummy_run(num_tokens, skip_eplb=True))
        return times

    worker.compile_or_warm_up_model = compile_or_warm_up_model


def _execute_model(own: Any) -> Any:
    from vllm.distributed.parallel_state import get_pp_group

    from .attributes import CONTROLLER

    def execute_model(self: Any, scheduler_output: Any) -> Any:
        controller = self.model_runner.__dict__.get(CONTROLLER)
        if controller is None:
            return own(self, scheduler_output)
        controller.update(scheduler_output)
        output = own(self, scheduler_output)
        state = self.model_runner.execute_model_state
        hidden_states = state.hidden_states if state is not None and get_pp_group().is_last_rank else None
        controller.end_forward(self.model_runner.model, hidden_states)
        return controller.report(output)

    return execute_model


def _sample_tokens(own: Any) -> Any:
    from .attributes import CONTROLLER

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        controller = self.model_runner.__dict__.get(CONTROLLER)
        return output if controller is None else controller.report(output)

    return sample_tokens


def _v1_forward(own: Any) -> Any:
    from .attributes import CONTROLLER

    def _model_forward(self: Any, input_ids: Any = None, positions: Any = None, *args: Any, **kwargs: Any) -> Any:
        controller = self.__dict__.get(CONTROLLER)
        if controller is not None:
            # The call's positions may be three-dimensional rotary ones; the runner's own are the plain ones.
            num_tokens = positions.shape[-1]
            controller.begin_forward(self.input_batch.req_ids, self.query_start_loc.gpu, self.positions[:num_tokens])
        return own(self, input_ids, positions, *args, **kwargs)

    return _model_forward


def _v2_prepare_inputs(own: Any) -> Any:
    from .attributes import CONTROLLER

    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = own(self, *args, **kwargs)
        controller = self.__dict__.get(CONTROLLER)
        if controller is not None:
            controller.begin_forward(batch.req_ids, batch.query_start_loc, batch.positions)
        return batch

    return prepare_inputs
