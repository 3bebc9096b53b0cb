"""What becomes of each MoE architecture of one vLLM release under route control, as a table in JSON.

    python tests/cuda_binding/architectures.py [ARCHITECTURE ...]

Run by `make test-cuda-binding`, with the release's CUDA wheel first on PYTHONPATH. Every architecture is built and bound in a
process forked for it, so that a crash or a hang costs one row.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parent))
from fake_cuda import NoDeviceMemory  # isort: skip  # before anything that asks for a GPU

import configs
import vllm
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vllm import tokenizers
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry
from vllm.transformers_utils.config import _CONFIG_REGISTRY

from vllm_unsafe_routes.engine import on_meta, plugin
from vllm_unsafe_routes.engine.bind import moe_runners
from vllm_unsafe_routes.errors import RouteError

SECONDS = 180
_OVERRIDES = {"allow_overrides": True}


class NoConfigError(Exception):
    """The architecture's config is nowhere to be had."""


def defaults(model_type: str) -> dict[str, Any]:
    """What the config class of a model type fills in, cut to a few layers."""
    known = _CONFIG_REGISTRY if model_type in _CONFIG_REGISTRY else CONFIG_MAPPING
    config = configs.shortened(known[model_type]().to_dict())
    config.pop("dtype", None)
    return config


def filled(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose parts have their defaults."""
    config = {key: filled(value) if isinstance(value, dict) else value for key, value in config.items()}
    model_type = config.pop(configs.FROM_CLASS, None)
    return config if model_type is None else configs.overlay(defaults(model_type), config)


def config_of(architecture: str) -> dict[str, Any]:
    """The architecture's config.json."""
    if architecture in configs.BY_HAND:
        model_type, config = configs.BY_HAND[architecture]
        if model_type not in _CONFIG_REGISTRY and model_type not in CONFIG_MAPPING:
            _CONFIG_REGISTRY[model_type] = type("ByHand", (PretrainedConfig,), {"model_type": model_type})
    elif architecture in configs.WITHOUT_CONFIG:
        raise NoConfigError("its config class is code in the checkpoint")
    else:
        model_type, extra = configs.BY_CLASS[architecture]
        config = configs.overlay(defaults(model_type), extra)
    return {**filled(config), "model_type": model_type, "architectures": [architecture]}


def distinct(values: Sequence[str]) -> str:
    """Distinct values in order of appearance."""
    return ", ".join(dict.fromkeys(values))


def examine(architecture: str) -> dict[str, Any]:
    """The architecture's row."""
    config = config_of(architecture)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        vllm_config = EngineArgs(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=256
        ).create_engine_config()
        with NoDeviceMemory():
            model = on_meta.build_on_meta(vllm_config)
    runners = [runner for _, runner in moe_runners(model)]
    row = {
        "model_type": config["model_type"],
        "moe_layers": len(runners),
        "router": distinct([type(runner.router).__name__ for runner in runners]),
        "experts": distinct([on_meta.experts_of(runner) for runner in runners]),
    }
    try:
        on_meta.bind(model, vllm_config, _OVERRIDES)
    except RouteError as error:
        return {**row, "verdict": "refused", "why": str(error)}
    return {**row, "verdict": "bound"}


def row_of(architecture: str) -> dict[str, Any]:
    """`examine` in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.alarm(SECONDS)
        try:
            row = examine(architecture)
        except NoConfigError as error:
            row = {"verdict": "not built", "why": str(error)}
        except Exception as error:  # whatever a model's code raises is the row's reason
            if "--trace" in sys.argv:
                traceback.print_exc()
            row = {"verdict": "not built", "why": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
        os.write(writer, json.dumps(row).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"verdict": "not built", "why": f"the process ended with status {status}"}


class _Tokenizer:
    """Stands in where a model looks its special tokens up as it is built."""

    vocab: ClassVar[dict[str, int]] = defaultdict(int)

    def get_vocab(self) -> dict[str, int]:
        return self.vocab

    def convert_tokens_to_ids(self, token: str) -> int:
        return 0


def registered() -> set[str]:
    """MoE architectures that the release registers. Drafters are left out: route control refuses speculative decoding.

    Raises:
        AssertionError: the release registers one that `configs.py` does not know.

    """
    known = {*configs.BY_HAND, *configs.BY_CLASS, *configs.WITHOUT_CONFIG}
    drafters, generic = registry._SPECULATIVE_DECODING_MODELS, registry._TRANSFORMERS_BACKEND_MODELS
    models = {name: entry for name, entry in registry._VLLM_MODELS.items() if name not in drafters and name not in generic}
    by_source = {name for name, entry in models.items() if builds_experts(module_path(entry[0]))}
    unknown = by_source - known - configs.DENSE - registry._TRANSFORMERS_SUPPORTED_MODELS.keys()
    assert not unknown, f"no config for {sorted(unknown)}"
    return known & set(registry.ModelRegistry.get_supported_archs())


def module_path(name: str) -> Path:
    """A registry entry's module: a name below vLLM's models, or a whole one."""
    package = Path(vllm.__file__).parent
    inside = name.removeprefix("vllm.") if name.startswith("vllm.") else f"model_executor.models.{name}"
    path = package.joinpath(*inside.split("."))
    return path if path.is_dir() else path.with_suffix(".py")


def builds_experts(path: Path) -> bool:
    """Whether a module, or a module of models that it imports, makes MoE layers."""
    open_paths, seen = [path], {path}
    while open_paths:
        path = open_paths.pop()
        if path.is_dir():
            imported = [file for file in path.rglob("*.py") if "amd" not in file.parts]
        elif path.stem in ("interfaces", "interfaces_base", "utils", "registry") or not path.exists():
            continue
        else:
            text = path.read_text(encoding="utf-8")
            if re.search(r"\bFusedMoE(Factory)?\b|\bMoERunner\b", text):
                return True
            names = re.findall(r"^from (?:\.|vllm\.model_executor\.models\.)(\w+) import", text, re.MULTILINE)
            imported = [path.with_name(f"{name}.py") for name in names]
        open_paths += [item for item in imported if item not in seen]
        seen.update(imported)
    return False


def main(wanted: Sequence[str]) -> None:
    """Print a JSON object a line: an architecture's row."""
    tokenizers.cached_tokenizer_from_config = lambda *args, **kwargs: _Tokenizer()
    registry._LazyRegisteredModel.inspect_model_cls = lambda self: registry._ModelInfo.from_model_cls(self.load_model_cls())
    plugin.register()
    for architecture in wanted or sorted(registered()):
        print(json.dumps({"architecture": architecture, **row_of(architecture)}), flush=True)


if __name__ == "__main__":
    main([item for item in sys.argv[1:] if not item.startswith("--")])
