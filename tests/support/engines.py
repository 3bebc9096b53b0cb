"""Real vLLM engines on CPU, in this process, small and quick to start."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

BLOCK_SIZE = 32
# DeepSeek on CPU: vLLM's kernel for interleaved rotary embeddings disagrees with its own torch code, and its latent attention for
# AMX, which it prefers on processors that have AMX, cannot do float32.
_MLA_IN_FLOAT32 = {"compilation_config": {"custom_ops": ["none"]}, "attention_backend": "CPU_MLA"}
SETTINGS: dict[str, dict[str, Any]] = {"deepseek_v2": _MLA_IN_FLOAT32, "deepseek_v3": _MLA_IN_FLOAT32}


def use_v2_runner_on_cpu() -> None:
    """Let vLLM's V2 model runner, with its Triton kernels interpreted, serve on CPU; call before vLLM is imported."""
    import types

    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from triton.backends import backends

    backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True))


if os.environ.get("UNSAFE_ROUTES_TEST_RUNNER") == "v2":
    use_v2_runner_on_cpu()


@contextmanager
def engine(model: Path, routes: dict[str, Any] | None = None, **settings: Any) -> Iterator[Any]:
    """An offline `LLM`; `routes` is `additional_config["unsafe_routes"]`, None leaves the plugin unconfigured."""
    from vllm import LLM

    options: dict[str, Any] = dict(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=64,
        max_num_batched_tokens=1024,
        block_size=BLOCK_SIZE,
        seed=0,
        disable_log_stats=True,
    )
    options.update(settings)
    if routes is not None:
        options["additional_config"] = {"unsafe_routes": routes}
    llm = LLM(**options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def generate(llm: Any, prompts: list[list[int]], extras: list[dict[str, Any] | None], **sampling: Any) -> list[Any]:
    """Run prompts (token ids) together; returns `RequestOutput`s in order."""
    from vllm import SamplingParams, TokensPrompt

    options: dict[str, Any] = dict(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=0, detokenize=False)
    options.update(sampling)
    params = [SamplingParams(extra_args=extra, **options) for extra in extras]
    return llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False)


def chosen_logprobs(output: Any, with_prompt: bool = False) -> list[float]:
    """Log-probability of each token of a finished request, prompt tokens first if they were asked for."""
    values = []
    if with_prompt:
        for token, row in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            values.append(row[token].logprob)
    completion = output.outputs[0]
    values += [row[token].logprob for token, row in zip(completion.token_ids, completion.logprobs, strict=True)]
    return values


def random_prompt(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    """Made-up token ids, special tokens left out."""
    return [rng.randrange(3, vocab_size) for _ in range(length)]
