"""KV offloading on CPU: vLLM's own connector, scheduler and manager; only the copies, which vLLM does on GPUs, are torch's."""

from __future__ import annotations

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec, LoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

SETTINGS = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"spec_name": "CopiedBlocks", "spec_module_path": __name__, "cpu_bytes_to_use": 64 << 20},
}


class Copies(OffloadingWorker):
    """Blocks of `kv_caches` and as many chunks as the store has; each copy is done when it is asked for."""

    def __init__(self, kv_caches: CanonicalKVCaches, num_chunks: int) -> None:
        self._blocks = [cache.tensor for cache in kv_caches.tensors]
        self._chunks = [torch.zeros((num_chunks, tensor.shape[1]), dtype=tensor.dtype) for tensor in self._blocks]
        self._finished: list[TransferResult] = []
        self.num_loaded = 0

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Blocks to chunks."""
        for blocks, chunks in zip(self._blocks, self._chunks, strict=True):
            chunks[dst_spec.block_ids] = blocks[src_spec.block_ids]
        self._finished.append(TransferResult(job_id, True))
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Chunks to blocks."""
        for blocks, chunks in zip(self._blocks, self._chunks, strict=True):
            blocks[dst_spec.block_ids] = chunks[src_spec.block_ids]
        self.num_loaded += len(dst_spec.block_ids)
        self._finished.append(TransferResult(job_id, True))
        return True

    def get_finished(self) -> list[TransferResult]:
        """What was asked for since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""


class CopiedBlocks(CPUOffloadingSpec):
    """A store in memory with `Copies`."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """Without vLLM's check that this is a GPU."""
        return Copies(kv_caches, self.num_chunks)
