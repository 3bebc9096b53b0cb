"""What stock vLLM's CPU communicator lacks for data parallel: gathering and scattering of uneven parts. A plugin of vLLM.

`install` writes the metadata that makes it one into a folder, for `PYTHONPATH`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Concatenate every rank's part, of `sizes` rows."""
    if isinstance(input_, list):
        return [all_gatherv(self, part, dim, sizes) for part in input_]
    sizes = sizes or [len(input_)] * self.world_size
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
    """Add up all ranks' rows and keep this rank's part, of `sizes` rows."""
    sizes = sizes or [len(input_) // self.world_size] * self.world_size
    total = input_.contiguous().clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    start = sum(sizes[: self.rank_in_group])
    return total[start : start + sizes[self.rank_in_group]].clone()


def register() -> None:
    """Called by vLLM in every process."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = all_gatherv, reduce_scatterv


def install(folder: Path) -> str:
    """Make `folder` one that brings this module and its entry point; returns it for `PYTHONPATH`."""
    shutil.copy(__file__, folder)
    metadata = folder / "cpu_collectives-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-collectives\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\ncpu_collectives = cpu_collectives:register\n")
    return str(folder)
