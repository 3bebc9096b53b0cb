"""Every vLLM symbol that the plugin wraps, in one place, with why; and the check that each is what it is expected to be."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

SUPPORTED_VLLM = ((0, 32), (0, 33))


@dataclass(frozen=True, slots=True)
class Symbol:
    """A function of vLLM that is wrapped.

    Attributes:
        module: module that owns it.
        path: attribute path inside the module.
        parameters: its leading parameter names, as the wrapper relies on them.
        why: what the wrapper adds.

    """

    module: str
    path: str
    parameters: tuple[str, ...]
    why: str

    def resolve(self) -> tuple[Any, str, Any]:
        """Owner object, attribute name and the function as stored (class and static methods unbound)."""
        owner: Any = importlib.import_module(self.module)
        *parents, name = self.path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, name, inspect.getattr_static(owner, name)

    def misfit(self) -> str | None:
        """Why the installed vLLM does not have this symbol as the wrapper relies on it; None: it has."""
        name = f"{self.module}.{self.path}"
        try:
            _, _, stored = self.resolve()
        except (ImportError, AttributeError) as error:
            return f"{name} is missing ({error}); it is needed to {self.why}"
        function = inspect.unwrap(getattr(stored, "__func__", stored))
        names = tuple(inspect.signature(function).parameters)
        if names[: len(self.parameters)] == self.parameters:
            return None
        return f"{name} takes {names}, expected {self.parameters}; it is needed to {self.why}"

    def add(self, method: Any) -> None:
        """Make `method` what this symbol names, for one of `ADDED`."""
        module, (owner, name) = importlib.import_module(self.module), self.path.split(".")
        setattr(getattr(module, owner), name, method)


_CONFIG = "vllm.engine.arg_utils"
_SCHEDULER = "vllm.v1.core.sched.scheduler"

CREATE_CONFIG = Symbol(
    _CONFIG,
    "EngineArgs.create_engine_config",
    ("self", "usage_context"),
    "read and check the settings and the policy once",
)
ADD_CLI_ARGS = Symbol(_CONFIG, "EngineArgs.add_cli_args", ("parser",), "the server's flags")
FROM_CLI_ARGS = Symbol(_CONFIG, "EngineArgs.from_cli_args", ("cls", "args"), "the server's flags")
PROCESS_INPUTS = Symbol(
    "vllm.v1.engine.input_processor",
    "InputProcessor.process_inputs",
    ("self", "request_id", "prompt", "params"),
    "check a request's plan before it is scheduled",
)
COMPLETION_BEAMS = Symbol(
    "vllm.entrypoints.openai.completion.protocol",
    "CompletionRequest.to_beam_search_params",
    ("self", "max_tokens"),
    "refuse a plan with beam search, whose inner requests would go without it",
)
CHAT_BEAMS = Symbol(
    "vllm.entrypoints.openai.chat_completion.protocol",
    "ChatCompletionRequest.to_beam_search_params",
    ("self", "max_tokens"),
    "refuse a plan with beam search, whose inner requests would go without it",
)
PREPROCESS_REQUEST = Symbol(
    "vllm.v1.engine.core",
    "EngineCore.preprocess_add_request",
    ("self", "request"),
    "give the request its compiled plan",
)
BLOCK_KEYS = Symbol(
    "vllm.v1.core.kv_cache_utils",
    "generate_block_hash_extra_keys",
    ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
    "routes are part of a KV block's identity",
)
ADD_REQUEST = Symbol(_SCHEDULER, "Scheduler.add_request", ("self", "request"), "admit a plan when the table has room")
FREE_REQUEST = Symbol(_SCHEDULER, "Scheduler._free_request", ("self", "request", "delay_free_blocks"), "give a plan's room back")
FINISH_REQUESTS = Symbol(
    _SCHEDULER,
    "Scheduler.finish_requests",
    ("self", "request_ids", "finished_status"),
    "aborts reach held requests too",
)
MAKE_STATS = Symbol(_SCHEDULER, "Scheduler.make_stats", ("self",), "held requests are waiting ones")
UPDATE_FROM_OUTPUT = Symbol(
    _SCHEDULER,
    "Scheduler.update_from_output",
    ("self", "scheduler_output", "model_runner_output"),
    "send the front end what a receipt says",
)
EXPECT_OUTPUT = Symbol(
    "vllm.v1.engine.output_processor",
    "OutputProcessor.add_request",
    ("self", "request", "prompt", "parent_req", "request_index", "queue"),
    "know which HTTP request it is for",
)
MAKE_OUTPUT = Symbol(
    "vllm.v1.engine.output_processor",
    "RequestState.make_request_output",
    ("self", "new_token_ids", "pooling_output", "finish_reason", "stop_reason", "kv_transfer_params"),
    "put a receipt together wherever a request ends",
)
RESET_PREFIX_CACHE = Symbol(
    _SCHEDULER,
    "Scheduler.reset_prefix_cache",
    ("self", "reset_running_requests"),
    "give back the KV blocks that cells are scored in, which would count as used by requests",
)
RUN_OUTPUT_HANDLER = Symbol(
    "vllm.v1.engine.async_llm", "AsyncLLM._run_output_handler", ("self",), "export metrics, follow a policy that was replaced"
)
LOAD_MODEL = Symbol("vllm.v1.worker.gpu_worker", "Worker.load_model", ("self",), "bind the routers of the loaded model")
EXECUTE_MODEL = Symbol(
    "vllm.v1.worker.gpu_worker", "Worker.execute_model", ("self", "scheduler_output"), "follow requests, report routes"
)
SAMPLE_TOKENS = Symbol("vllm.v1.worker.gpu_worker", "Worker.sample_tokens", ("self", "grammar_output"), "report routes")
V1_FORWARD = Symbol(
    "vllm.v1.worker.gpu_model_runner",
    "GPUModelRunner._model_forward",
    ("self", "input_ids", "positions"),
    "V1 runner: fill the row index when the batch is known",
)
V2_INPUTS = Symbol(
    "vllm.v1.worker.gpu.model_runner",
    "GPUModelRunner.prepare_inputs",
    ("self", "scheduler_output"),
    "V2 runner: fill the row index when the batch is known",
)
SYMBOLS = (
    CREATE_CONFIG,
    ADD_CLI_ARGS,
    FROM_CLI_ARGS,
    PROCESS_INPUTS,
    COMPLETION_BEAMS,
    CHAT_BEAMS,
    PREPROCESS_REQUEST,
    BLOCK_KEYS,
    ADD_REQUEST,
    FREE_REQUEST,
    FINISH_REQUESTS,
    MAKE_STATS,
    UPDATE_FROM_OUTPUT,
    EXPECT_OUTPUT,
    MAKE_OUTPUT,
    RESET_PREFIX_CACHE,
    RUN_OUTPUT_HANDLER,
    LOAD_MODEL,
    EXECUTE_MODEL,
    SAMPLE_TOKENS,
    V1_FORWARD,
    V2_INPUTS,
)

# Methods that vLLM's classes gain: vLLM calls them by name, clients as utility calls and the engine core over `collective_rpc`.
ADDED = (
    Symbol(
        "vllm.v1.engine.core",
        "EngineCore.unsafe_routes_replace_policy",
        ("self", "document", "claim"),
        "put another policy in force",
    ),
    Symbol("vllm.v1.engine.core", "EngineCore.unsafe_routes_status", ("self",), "the active policy, what was counted"),
    Symbol(
        "vllm.v1.worker.gpu_worker", "Worker.unsafe_routes_use_policy", ("self", "document", "planned"), "write a policy's rows"
    ),
    Symbol("vllm.v1.worker.gpu_worker", "Worker.unsafe_routes_check_policy", ("self", "document"), "can its kernels keep a policy"),
    Symbol("vllm.v1.worker.gpu_worker", "Worker.unsafe_routes_counts", ("self",), "what was counted so far"),
    Symbol("vllm.v1.engine.core", "EngineCore.unsafe_routes_usage", ("self", "ask"), "how often experts were picked"),
    Symbol("vllm.v1.worker.gpu_worker", "Worker.unsafe_routes_read_usage", ("self", "wait"), "how often experts were picked"),
    Symbol("vllm.v1.engine.core", "EngineCore.unsafe_routes_score_cells", ("self", "items"), "score candidates between two steps"),
    Symbol(
        "vllm.v1.worker.gpu_worker",
        "Worker.unsafe_routes_score_cells",
        ("self", "reserve", "generation", "items"),
        "score candidates between two steps",
    ),
)


def unsupported_reason() -> str | None:
    """Why the installed vLLM cannot be controlled; None if it can."""
    import vllm

    version = str(vllm.__version__)
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdecimal())
    if release not in SUPPORTED_VLLM:
        supported = ", ".join(".".join(map(str, item)) for item in SUPPORTED_VLLM)
        return f"vLLM {version} is not supported by vllm-unsafe-routes (supported: {supported})"
    misfits = (misfit for symbol in SYMBOLS if (misfit := symbol.misfit()) is not None)
    return next((f"vLLM {version}: {misfit}" for misfit in misfits), None)
