"""Start an engine for a search, in this process, with settings that fit the machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


def launch(
    model: str,
    *,
    policy: Mapping[str, Any] | str | None = None,
    jitter: Mapping[str, Any] | None = None,
    max_model_len: int | None = None,
    dtype: str = "auto",
    engine_args: Mapping[str, Any] | None = None,
) -> Any:
    """A `vllm.LLM` with overrides enabled; end it with `shutdown`.

    Args:
        model: a Hugging Face folder or hub id.
        policy: a policy that the engine enforces: its JSON form or a path.
        jitter: noise on router logits, as the engine's setting of that name.
        max_model_len: longest request; None: the model's own.
        dtype: of the weights, as vLLM takes it.
        engine_args: further arguments of `vllm.LLM`; they win over the defaults here.

    """
    # OpenMP reads it when torch is loaded. Threads that spin while they wait take the cores from whoever they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # In one process, a step costs no messages; on a GPU with tensor parallelism vLLM starts its workers all the same.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm.platforms import current_platform

    settings: dict[str, Any] = {"dtype": dtype, "disable_log_stats": True, "skip_tokenizer_init": True}
    if max_model_len is not None:
        settings["max_model_len"] = max_model_len
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # The smallest block of CPU attention: a candidate recomputes at least the block that it changes.
        settings |= {"enforce_eager": True, "block_size": 32, "max_num_seqs": 128, "max_num_batched_tokens": 4096}
    settings |= dict(engine_args or {})
    given = {"policy": policy, "jitter": jitter}
    routes = {"allow_overrides": True} | {name: value for name, value in given.items() if value is not None}
    settings["additional_config"] = {**settings.get("additional_config", {}), "unsafe_routes": routes}
    from vllm import LLM

    return LLM(model=model, **settings)


def shutdown(llm: Any) -> None:
    """Stop an engine and free its memory."""
    import gc

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
