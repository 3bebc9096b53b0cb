"""Which of vLLM's settings route control can serve under; the others are refused by name at start."""

from __future__ import annotations

from typing import Any

from vllm import envs

from ..errors import RouteError

# What runs through vLLM paths where a router may see other tokens than the step's own, in the order of the step.
_UNSUPPORTED = (
    ("data_parallel_size", 1, "--data-parallel-size 1 (run one server per replica)"),
    ("use_ubatching", False, "leave out --enable-dbo and --ubatch-size"),
    ("prefill_context_parallel_size", 1, "--prefill-context-parallel-size 1"),
    ("decode_context_parallel_size", 1, "--decode-context-parallel-size 1"),
)


# The wrappers of `symbols.py` sit in the methods of these; another class may never call them and would route nothing.
_WORKERS = ("vllm.v1.worker.gpu_worker.Worker", "vllm.v1.worker.cpu_worker.CPUWorker")
_SCHEDULERS = (None, "vllm.v1.core.sched.scheduler.Scheduler", "vllm.v1.core.sched.async_scheduler.AsyncScheduler")


def check_supported(vllm_config: Any) -> None:
    """Refuse settings under which routes could not be kept exactly apart.

    Raises:
        RouteError: names the setting, its value and what helps.

    """
    parallel = vllm_config.parallel_config
    for name, wanted, help_text in _UNSUPPORTED:
        value = getattr(parallel, name, wanted)
        if value != wanted:
            raise RouteError(f"route control does not support {name}={value}; {help_text}")
    if envs.VLLM_USE_RUST_FRONTEND:
        # It is another program: there is nobody in it who would check a plan or put a receipt together.
        raise RouteError("route control does not support VLLM_USE_RUST_FRONTEND=1; leave it unset")
    if vllm_config.speculative_config is not None:
        raise RouteError("route control does not support speculative decoding; leave out --speculative-config")
    for name, known, value in (
        ("worker_cls", _WORKERS, parallel.worker_cls),
        ("scheduler_cls", _SCHEDULERS, vllm_config.scheduler_config.scheduler_cls),
    ):
        if value not in known:
            raise RouteError(f"route control does not know {name}={value}; known are {', '.join(filter(None, known))}")
    connector = getattr(vllm_config.kv_transfer_config, "kv_connector", None)
    if connector is not None:
        # Connectors key KV by tokens or by request: they would hand one request's routes to another.
        raise RouteError(
            f"route control does not support the KV connector {connector}, which does not know routes; "
            "leave out --kv-transfer-config and --kv-offloading-size"
        )
