"""Which of vLLM's features route control can serve under, each of its own features apart; the others are refused by name at start.

A policy is constant: each layer bans the same experts for every token, whosesoever it is. Plans hold where the tokens that a router
sees can be told apart. docs/integration.md has the same table with the proofs; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RouteError
from .config import RouteConfig

# Those accept a draft only where the target's own distribution does.
_STRICT_VERIFICATION = ("standard", "block")
# Those key KV by vLLM's block hashes, which hold the policy's digest and the plan's directives.
_KEYED_BY_BLOCK_HASH = ("OffloadingConnector", "SimpleCPUOffloadConnector")
# The wrappers of `symbols.py` sit in the methods of these; another class may never call them and would route nothing.
_WORKERS = ("vllm.v1.worker.gpu_worker.Worker", "vllm.v1.worker.cpu_worker.CPUWorker")
_SCHEDULERS = (None, "vllm.v1.core.sched.scheduler.Scheduler", "vllm.v1.core.sched.async_scheduler.AsyncScheduler")


@dataclass(frozen=True, slots=True)
class Feature:
    """A feature of vLLM that may stand in the way.

    Attributes:
        name: as docs/integration.md has it.
        asked: how a `VllmConfig` asks for it, as a user would write it; None: it does not.
        policy: why no policy can be enforced beside it; None: it can.
        plans: why no request can bring a plan; None: it can.
        router_logits: why no request can have router logits back, where plans hold; None: it can.
        monitor: why no probe can score prompts, where a policy holds; None: it can.

    """

    name: str
    asked: Callable[[Any], str | None]
    policy: str | None
    plans: str | None
    router_logits: str | None = None
    monitor: str | None = None

    def refusals(self) -> tuple[str | None, ...]:
        """Why each of `_ASKED_OF_US` cannot be had, in its order."""
        plans = self.policy or self.plans
        return self.policy, plans, plans or self.router_logits, self.policy or self.monitor


def _is_set(part: str, field: str, unset: Any = False) -> Callable[[Any], str | None]:
    def asked(vllm_config: Any) -> str | None:
        value = getattr(getattr(vllm_config, part, None), field, unset)
        return None if value == unset else f"{field}={value}"

    return asked


def _is_one_of(part: str, field: str, known: tuple[str | None, ...], wanted: bool = True) -> Callable[[Any], str | None]:
    """Asked for with a value that is known, or with `wanted` false one that is not."""

    def asked(vllm_config: Any) -> str | None:
        section = getattr(vllm_config, part, None)
        value = getattr(section, field, None)
        return f"{field}={value}" if section is not None and (value in known) == wanted else None

    return asked


def _other_connector(vllm_config: Any) -> str | None:
    name = getattr(vllm_config.kv_transfer_config, "kv_connector", None)
    return None if name is None or name in _KEYED_BY_BLOCK_HASH else f"kv_connector={name}"


def _other_balancing(vllm_config: Any) -> str | None:
    for name in ("data_parallel_external_lb", "data_parallel_hybrid_lb"):
        if getattr(vllm_config.parallel_config, name, False):
            return f"{name}=True"
    return None


def _specialized_decode(vllm_config: Any) -> str | None:
    settings = vllm_config.additional_config
    name = settings.get("decode_backend") if isinstance(settings, Mapping) else None
    return f"additional_config['decode_backend']={name}" if name == "latency_specialized" else None


def _rust_front_end(vllm_config: Any) -> str | None:
    from vllm import envs

    return "VLLM_USE_RUST_FRONTEND=1" if envs.VLLM_USE_RUST_FRONTEND else None


_PICKS_INSIDE = "its decode kernels pick experts inside themselves"
_NOT_APART = "a router may see tokens of other ranks"
FEATURES = (
    Feature("decode kernels of Kimi-K3 and DeepSeek-V4.1", _specialized_decode, _PICKS_INSIDE, _PICKS_INSIDE),
    Feature("monokernel", _is_set("kernel_config", "monokernel"), _PICKS_INSIDE, _PICKS_INSIDE),
    Feature(
        "data parallel with other balancing",
        _other_balancing,
        "policy swaps, status and counts would reach the engine cores of one server of several; let one server balance all",
        _NOT_APART,
    ),
    Feature(
        "elastic expert parallel",
        _is_set("parallel_config", "enable_elastic_ep"),
        "a rank that joins later would not know of a policy that was swapped in; leave out --enable-elastic-ep",
        _NOT_APART,
    ),
    Feature(
        "sequence-parallel experts",
        _is_set("parallel_config", "use_sequence_parallel_moe"),
        "each tensor-parallel rank routes a part of the tokens, which nobody has tried; use two of TP, DP and EP",
        _NOT_APART,
    ),
    Feature("data parallel", _is_set("parallel_config", "data_parallel_size", 1), None, None),
    Feature(
        "pipeline parallel",
        _is_set("parallel_config", "pipeline_parallel_size", 1),
        None,
        None,
        monitor="each rank has the routes of its own layers",
    ),
    Feature(
        "microbatching",
        _is_set("parallel_config", "use_ubatching"),
        "the halves of a step overwrite each other's counts; leave out --enable-dbo and --ubatch-size",
        "the halves of a step cannot be told apart; leave out --enable-dbo and --ubatch-size",
    ),
    Feature(
        "prefill context parallel",
        _is_set("parallel_config", "prefill_context_parallel_size", 1),
        "the tokens that a router sees are gathered from all ranks, which nobody has tried",
        _NOT_APART,
    ),
    Feature(
        "decode context parallel",
        _is_set("parallel_config", "decode_context_parallel_size", 1),
        None,
        "it leaves routing alone, but nobody has tried plans with it",
    ),
    Feature(
        "speculation with relaxed acceptance",
        _is_one_of("speculative_config", "rejection_sample_method", _STRICT_VERIFICATION, wanted=False),
        f"drafts are accepted that the target's routes would not give; rejection_sample_method is one of {_STRICT_VERIFICATION}",
        "drafts are accepted that the target's routes would not give",
    ),
    Feature(
        "speculation",
        _is_one_of("speculative_config", "rejection_sample_method", _STRICT_VERIFICATION),
        None,
        None,
        router_logits="logits of rejected drafts would come back",
    ),
    Feature(
        "KV offloading by block hash",
        _is_one_of("kv_transfer_config", "kv_connector", _KEYED_BY_BLOCK_HASH),
        None,
        None,
    ),
    Feature(
        "other KV connectors",
        _other_connector,
        "it keys KV by tokens or by request and would hand on what another policy computed; leave out --kv-transfer-config",
        "it keys KV by tokens or by request and would hand one request's routes to another; leave out --kv-transfer-config",
    ),
    Feature("LoRA", lambda vllm_config: None if vllm_config.lora_config is None else "enable_lora=True", None, None),
    Feature("sleep and wake", _is_set("model_config", "enable_sleep_mode"), None, None),
    Feature("expert-parallel load balancing", _is_set("parallel_config", "enable_eplb"), None, None),
    Feature("native routed experts", _is_set("aux_output_config", "enable_return_routed_experts"), None, None),
    Feature(
        "front end in Rust",
        _rust_front_end,
        "nobody in it would check a plan or put a receipt together; leave it unset",
        "nobody in it would check a plan or put a receipt together; leave it unset",
    ),
    Feature(
        "another worker class",
        _is_one_of("parallel_config", "worker_cls", _WORKERS, wanted=False),
        f"it may never call what is wrapped; known are {', '.join(_WORKERS)}",
        "it may never call what is wrapped",
    ),
    Feature(
        "another scheduler class",
        _is_one_of("scheduler_config", "scheduler_cls", _SCHEDULERS, wanted=False),
        f"it may never call what is wrapped; known are {', '.join(filter(None, _SCHEDULERS))}",
        "it may never call what is wrapped",
    ),
)


# What is refused, and the setting that asks for it; `Feature.refusals` has the same order.
_ASKED_OF_US: tuple[tuple[str, Callable[[RouteConfig], bool]], ...] = (
    ("route control does not support {}", lambda config: True),
    ("route plans (--enable-route-overrides) cannot be kept under {}", lambda config: config.allow_overrides),
    ("router logits (--router-logits-mib) cannot be handed back under {}", lambda config: config.router_logits_mib is not None),
    ("--route-monitor cannot score prompts under {}", lambda config: config.monitor is not None),
)


def check_supported(vllm_config: Any, config: RouteConfig) -> None:
    """Refuse what cannot be kept of that which `config` asks for.

    Raises:
        RouteError: names the setting, its value and the reason.

    """
    for feature in FEATURES:
        asked = feature.asked(vllm_config)
        if asked is None:
            continue
        for (what, is_wanted), why in zip(_ASKED_OF_US, feature.refusals(), strict=True):
            if why is not None and is_wanted(config):
                raise RouteError(f"{what.format(asked)}: {why}")
