"""A model built on the meta device, without weights, and put under route control: to see whether it would be bound.

For `unsafe-routes doctor` (`doctor.py`) and for the table of architectures (`tests/cuda_binding`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.network_utils import get_distributed_init_method, get_open_port
from vllm.utils.torch_utils import set_default_torch_dtype

from ..errors import RouteError
from .bind import check_layer, experts_of, moe_runners
from .config import CONFIG_KEY, model_shape, route_config
from .router import RouterHooks, RouterState
from .worker import RouteController

_LOCALHOST = "127.0.0.1"
_POLICY_ALONE = RouterHooks(0, RouterState(), False, frozenset())


@dataclass(frozen=True, slots=True)
class LayerVerdict:
    """What became of one MoE layer.

    Attributes:
        layer: decoder layer index.
        name: the layer's place in the model.
        router: class of its router.
        experts: class of its expert kernels.
        at_logits: it is controlled at its logits if its kernel passes the probe at start, and for policies alone.
        refused: why it cannot be controlled; None: it can.

    """

    layer: int
    name: str
    router: str
    experts: str
    at_logits: bool
    refused: str | None


def engine_config(model: str) -> Any:
    """vLLM's config for one process and a model of which only config.json is read.

    Raises:
        ValueError: vLLM does not know the model.

    """
    return EngineArgs(model=model, load_format="dummy", skip_tokenizer_init=True).create_engine_config()


def build_on_meta(vllm_config: Any) -> torch.nn.Module:
    """Build a model without weights, as the engine would before it loads them.

    Args:
        vllm_config: of one process (no tensor or pipeline parallelism).

    """
    with set_current_vllm_config(vllm_config):
        if not model_parallel_is_initialized():  # type: ignore[no-untyped-call]
            method = get_distributed_init_method(_LOCALHOST, get_open_port())
            init_distributed_environment(1, 0, method, 0, "gloo")
            initialize_model_parallel()
        with set_default_torch_dtype(vllm_config.model_config.dtype), torch.device("meta"):
            model: torch.nn.Module = initialize_model(vllm_config)
            return model


def examine_layers(model: torch.nn.Module, vllm_config: Any) -> list[LayerVerdict]:
    """Each MoE layer on its own, so that one refusal does not hide the others.

    Raises:
        RouteError: the config does not say which layers have experts.

    """
    shape = model_shape(vllm_config)
    verdicts = []
    for name, runner in moe_runners(model):
        refused, at_logits = None, False
        try:
            at_logits = check_layer(runner, shape, _POLICY_ALONE).at_logits
        except RouteError as error:
            refused = str(error)
        verdicts.append(
            LayerVerdict(int(runner.layer_id), name, type(runner.router).__name__, experts_of(runner), at_logits, refused)
        )
    return verdicts


def bind(model: torch.nn.Module, vllm_config: Any, settings: dict[str, Any]) -> RouteController:
    """Put a built model under route control as a worker does, on the CPU.

    Args:
        model: from `build_on_meta`.
        vllm_config: what it was built with; gains the settings.
        settings: as `additional_config["unsafe_routes"]` holds them.

    Raises:
        RouteError: the engine would not start.

    """
    vllm_config.additional_config = {CONFIG_KEY: settings}
    config = route_config(vllm_config)
    assert config is not None, "settings that ask for nothing"
    with set_current_vllm_config(vllm_config):
        return RouteController(vllm_config, config, model, torch.device("cpu"))
