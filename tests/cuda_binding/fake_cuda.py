"""An H100 that is not there: vLLM's CUDA platform on a machine without a GPU, for models on the meta device.

Import this module before torch and vLLM, in a process of its own. Nothing may be computed afterwards, only built: whatever asks
for the device gets an answer, whatever would use it fails.
"""

from __future__ import annotations

import os
import types
from typing import Any

os.environ.update(
    CUDA_VISIBLE_DEVICES="0",
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_USE_FLASHINFER_SAMPLER="0",
)

import torch
import triton.backends
import triton.runtime
import vllm.utils.import_utils
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget

NAME = "NVIDIA H100 80GB HBM3"
CAPABILITY = (9, 0)
_GIB = 1 << 30
_MEMORY = types.SimpleNamespace(total=80 * _GIB, free=79 * _GIB, used=_GIB)
_PROPERTIES = types.SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=_MEMORY.total,
    multi_processor_count=132,
    L2_cache_size=50 << 20,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    warp_size=32,
    gcnArchName="",
)


class _Stream:
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True


class _TritonDriver:
    """What modules ask of Triton's driver as they are imported."""

    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": _PROPERTIES.shared_memory_per_block_optin,
            "multiprocessor_count": _PROPERTIES.multi_processor_count,
        }
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], _PROPERTIES.warp_size)


class NoDeviceMemory(TorchFunctionMode):
    """What would be allocated on the device is on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if isinstance(device, int) or (isinstance(device, str | torch.device) and torch.device(device).type == "cuda"):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _answer(**answers: Any) -> dict[str, Any]:
    """Functions that take anything and give their answer."""
    return {name: lambda *args, _value=value, **kwargs: _value for name, value in answers.items()}


def _install() -> None:
    nvml = vllm.utils.import_utils.import_pynvml()
    functions = _answer(
        nvmlInit=None,
        nvmlShutdown=None,
        nvmlDeviceGetCount=1,
        nvmlDeviceGetCudaComputeCapability=CAPABILITY,
        nvmlDeviceGetName=NAME,
        nvmlDeviceGetUUID="GPU-0",
        nvmlDeviceGetMemoryInfo=_MEMORY,
        nvmlDeviceGetHandleByIndex=0,
        nvmlSystemGetCudaDriverVersion=13000,
    )
    for name, function in functions.items():
        setattr(nvml, name, function)
    functions = _answer(
        is_available=True,
        device_count=1,
        current_device=0,
        set_device=None,
        synchronize=None,
        get_device_properties=_PROPERTIES,
        get_device_capability=CAPABILITY,
        get_device_name=NAME,
        mem_get_info=(_MEMORY.free, _MEMORY.total),
        current_stream=_Stream(),
    )
    for name, value in {**functions, "Stream": _Stream, "Event": _Event}.items():
        setattr(torch.cuda, name, value)
    triton.backends.backends["nvidia"].driver.is_active = staticmethod(lambda: True)
    triton.runtime.driver.set_active(_TritonDriver())


_install()

from vllm.platforms import current_platform  # noqa: E402  # resolved while NVML answers

assert current_platform.is_cuda(), current_platform
